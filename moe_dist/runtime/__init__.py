"""Where ranks come from: Ray actors, or torchrun. Both run the same functions on the same RankContext."""
