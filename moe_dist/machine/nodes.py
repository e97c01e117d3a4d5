"""The nodes that ranks are spread over: how many ranks each gets, and what must not cross from one to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Strategy = Literal["STRICT_PACK", "PACK", "SPREAD"]


@dataclass(frozen=True)
class Nodes:
    """`room`: how many ranks each node can take. `strategy`: Ray's, by which it spreads them (`ray.strategy`): all on
    one node, on few nodes, or evenly over all of them. None: ranks are placed already, `room[n]` of them on node n."""

    room: tuple[int, ...]
    strategy: Strategy | None = None

    def of(self, world: int) -> tuple[int, ...]:
        """How many of `world` ranks each used node gets; ranks are numbered node by node. Before they are placed this
        is what Ray aims at: others may have taken a part of a node meanwhile."""
        if self.strategy is None:
            return self.room
        if self.strategy == "STRICT_PACK" or (self.strategy == "PACK" and max(self.room, default=world) >= world):
            return (world,)
        return _spread(self.room, world) if self.strategy == "SPREAD" else _packed(self.room, world)


def _packed(room: Sequence[int], world: int) -> tuple[int, ...]:
    """The roomiest nodes first, each as full as it gets."""
    found, left = [], world
    for size in sorted(room, reverse=True):
        if left > 0:
            found.append(min(size, left))
            left -= found[-1]
    return _with_rest(found, left)


def _spread(room: Sequence[int], world: int) -> tuple[int, ...]:
    """One rank to each node in turn, as long as it has room."""
    found, left = [0] * len(room), world
    while left > 0 and any(taken < size for taken, size in zip(found, room, strict=True)):
        for node, size in enumerate(room):
            if left > 0 and found[node] < size:
                found[node] += 1
                left -= 1
    return _with_rest([taken for taken in found if taken], left)


def _with_rest(found: list[int], left: int) -> tuple[int, ...]:
    """Where the nodes are too small, the rest stands by itself: starting the ranks says that they don't fit."""
    return tuple([*found, left] if left > 0 else found)


def crosses(tp: int, ranks: Sequence[int]) -> str:
    """Why TP groups of `tp` ranks would not each lie on one node, where the nodes have so many ranks; empty: they do.
    Ranks are numbered node by node, so nothing but their numbers decides: no other order would help."""
    if all(count % tp == 0 for count in ranks):
        return ""
    return f"the {tp} ranks of a TP group must be on one node, and the nodes have {told(ranks)} ranks"


def told(ranks: Sequence[int]) -> str:
    return " + ".join(map(str, ranks))
