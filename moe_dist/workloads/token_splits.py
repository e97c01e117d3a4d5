"""How many of a step's tokens each rank has, where they are sharded."""

from __future__ import annotations

from moe_dist.model.spec import TokenSplit, split_bounds
from moe_dist.workloads.streams import Stream

FEWEST_FOR_IDLE = 3  # ranks, of which one can be idle and the others still differ


def token_bounds(tokens: int, world: int, split: TokenSplit, seed: int) -> list[tuple[int, int]]:
    """The run of tokens [start, stop) of each rank, one behind the other; `tokens` in all.

    even: equal shares, ceil first, floor after. ragged: shares in the ratio of exponential draws, so that every
    division of the tokens is about as likely as another, and of three ranks or more one at random has no token: data
    parallel attention, where each rank has requests of its own. one_rank: one rank at random has all of them.
    """
    if split == "even" or world == 1:
        return split_bounds(tokens, world)
    stream = Stream("token split", split, tokens, world, seed)
    chosen = int(stream.integers(world, 1))
    if split == "one_rank":
        shares = [float(rank == chosen) for rank in range(world)]
    else:
        drawn = stream.uniform(world).double().clamp_min(1e-9).log().neg()
        shares = [0.0 if rank == chosen and world >= FEWEST_FOR_IDLE else float(drawn[rank]) for rank in range(world)]
    total, so_far, stops = sum(shares), 0.0, []
    for share in shares:
        so_far += share
        stops.append(round(tokens * so_far / total))
    return list(zip([0, *stops[:-1]], stops, strict=True))


def most_tokens(tokens: int, world: int, split: TokenSplit, seed: int) -> int:
    """That a rank has."""
    return max(stop - start for start, stop in token_bounds(tokens, world, split, seed))
