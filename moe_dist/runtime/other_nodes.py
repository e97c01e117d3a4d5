"""The nodes of a group's ranks other than the driver's own: which of them is gone, long before Ray says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import ray

from moe_dist.errors import RankFailure
from moe_dist.messages.counts import noun
from moe_dist.runtime.services import Greeter

RAYLET = "raylet"


class OtherNode(NamedTuple):
    address: str
    ranks: tuple[int, ...]


class OtherNodes:
    """Ray itself counts a node as dead after 15 s and more. Here two refusals of its raylet a second apart are enough,
    or two attempts to reach it that no machine answers."""

    def __init__(self, places: Sequence[dict[str, Any]], silence_timeout_s: float) -> None:
        """`places`: of each rank, as its actor tells it."""
        own = ray.get_runtime_context().get_node_id()
        raylets = {node["NodeID"]: f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}" for node in ray.nodes()}
        self._nodes: dict[str, OtherNode] = {}
        addresses = {}
        for rank, place in enumerate(places):
            if (node := place["node"]) == own:
                continue
            known = self._nodes.get(node, OtherNode(place["address"], ()))
            self._nodes[node] = known._replace(ranks=(*known.ranks, rank))
            addresses[node] = raylets[node]
        self._greeter = Greeter(addresses, silence_timeout_s)

    def check(self, beats: Sequence[tuple[str, float, int]], suspicious: bool = False) -> None:
        """Raise RankFailure for the first rank of a node that is gone. `beats`: what each rank was last heard doing,
        for how long, and its number. `suspicious`: a rank failed, so ask now, and once is enough."""
        if suspicious:
            self._greeter.ask()
        for node, cause in list(self._greeter.causes.items()):
            address, ranks = self._nodes[node]
            doing, _, sequence = beats[ranks[0]]
            lost = f"its node {address} was lost, with {noun(len(ranks), 'rank')} {', '.join(map(str, ranks))}"
            raise RankFailure(ranks[0], doing, sequence, f"{lost}: the {RAYLET} there {cause}")

    def close(self) -> None:
        self._greeter.close()
