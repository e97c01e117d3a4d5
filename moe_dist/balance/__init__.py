"""Which expert should live where: loads of a routing, a balancer with and without copies, files of placements."""
