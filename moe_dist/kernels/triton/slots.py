"""Global expert ids to a rank's local slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.kernels.triton.launch import launch
from moe_dist.model.placement import Placement, tables_on
from moe_dist.model.sizes import cdiv
from moe_dist.step.workspace import Take

SLOTS_TOGETHER = 512


def slots_on(placement: Placement, rank: int, ids_RK: Tensor, take: Take) -> Tensor:
    """See Placement.slots_on; every expert has one copy."""
    table = tables_on(placement, ids_RK.device).slots_GE
    slots_RK = take(tuple(ids_RK.shape), torch.int32)
    tensors, sizes = (ids_RK.contiguous(), table, slots_RK), (ids_RK.numel(), rank // placement.tp, table.shape[1])
    launch(_slots_on, (cdiv(sizes[0], SLOTS_TOGETHER), 1, 1), tensors, sizes, (SLOTS_TOGETHER,))
    return slots_RK


@triton.jit(do_not_specialize=["own_group"])
def _slots_on(ids, slot_table, slots, PAIRS, own_group, EXPERTS, BLOCK: tl.constexpr):
    """A group's last entry, behind those of its experts, is that of no expert."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + pair, mask=pair < PAIRS, other=-1)
    expert = tl.where((expert < 0) | (expert >= EXPERTS), EXPERTS - 1, expert)
    tl.store(slots + pair, tl.load(slot_table + own_group * EXPERTS + expert), mask=pair < PAIRS)
