"""What a layer is given: random numbers, routings and weights."""
