"""Which rank serves which (token, expert) pair, for kernels that send rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_dist.model.placement import Placement, tables_on
from moe_dist.model.routing import Routing
from moe_dist.model.sizes import power_of_2


def choices(
    placement: Placement, routing: Routing, rank: int
) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[int, ...]]:
    """What tells a kernel who serves which pair: tensors, sizes, constants, each in the order of its parameters."""
    tables = tables_on(placement, routing.ids_TK.device)
    experts, copies, top_k = tables.slots_GE.shape[1], tables.groups_EC.shape[1], routing.ids_TK.shape[1]
    chosen = routing.ids_TK.contiguous(), routing.weights_TK.contiguous()
    return (
        (*chosen, tables.slots_GE, tables.groups_EC, tables.copies_E),
        (rank, rank // placement.tp, experts, copies),
        (top_k, placement.tp, copies > 1, power_of_2(top_k)),
    )


@triton.jit
def served_by(
    ids, slot_table, group_table, copy_counts, token, T, group, own_group, EXPERTS, COPIES, K: tl.constexpr,
    REPLICATED: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """(place in [T, K], expert, whether `group` serves it) of each pair of these tokens."""
    place = tl.arange(0, PLACES)[None, :]
    pair = (token < T)[:, None] & (place < K)
    at = token[:, None] * K + place
    expert = tl.load(ids + at, mask=pair, other=-1)
    known = pair & (expert >= 0) & (expert < EXPERTS - 1)  # the last entry is that of no expert
    expert = tl.where(known, expert, 0)
    if REPLICATED:
        copy = (token[:, None] + expert) % tl.load(copy_counts + expert, mask=known, other=1).to(tl.int32)
        serving = tl.load(group_table + expert * COPIES + copy, mask=known, other=-1).to(tl.int32)
        own_slot = tl.load(slot_table + own_group * EXPERTS + expert, mask=known, other=-1)
        serving = tl.where(own_slot >= 0, own_group, serving)
    else:
        serving = tl.load(group_table + expert, mask=known, other=-1).to(tl.int32)
    return at, expert, known & (serving == group)
