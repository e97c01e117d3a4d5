"""Loads of a routing: (token, expert) pairs by expert, and by rank under a placement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.model.placement import Placement, imbalance
from moe_dist.model.routing import Routing


@dataclass(frozen=True)
class RankLoads:
    """By rank: `pairs` that it computes, and `active`, its experts that have any."""

    pairs: list[int]
    active: list[int]

    @property
    def imbalance(self) -> float:
        """Most pairs over mean pairs; 1.0 is perfect balance."""
        return imbalance(self.pairs)


def expert_loads(routing: Routing, num_experts: int) -> list[int]:
    """Pairs of each expert; an id of -1 counts nowhere."""
    ids = routing.ids_TK.long()
    return torch.bincount(ids[ids >= 0], minlength=num_experts).tolist()


def rank_loads(routing: Routing, placement: Placement, bounds: Sequence[tuple[int, int]] | None) -> RankLoads:
    """What each rank computes of a routing of the whole group. `bounds[r]` is rank r's run of the tokens; None: all
    tokens are on every rank. Where an expert has copies, the one counts that serves the pair in a real step."""
    rows_T, sources_T = _origins(routing.tokens, bounds)
    groups_TK = placement.serving_groups(routing.ids_TK, rows_T, sources_T)
    slots_TK = placement.slots_served(routing.ids_TK, groups_TK)
    most = max(map(len, placement.homes))
    served = (groups_TK * most + slots_TK)[groups_TK >= 0]
    busy_GS = torch.bincount(served, minlength=placement.ep * most).view(placement.ep, most) > 0
    active = busy_GS.sum(1).tolist()
    return RankLoads(
        placement.rows_per_rank(groups_TK), [active[rank // placement.tp] for rank in range(placement.world)]
    )


def _origins(tokens: int, bounds: Sequence[tuple[int, int]] | None) -> tuple[Tensor, Tensor | None]:
    """Each token's index on its source rank and that rank, as the exchanges number them."""
    rows_T = torch.arange(tokens, device="cpu")
    if bounds is None:
        return rows_T, None
    starts = torch.tensor([start for start, _ in bounds], device="cpu")
    counts = torch.tensor([stop - start for start, stop in bounds], device="cpu")
    sources_T = torch.arange(len(bounds), device="cpu").repeat_interleave(counts)
    return rows_T - starts[sources_T], sources_T
