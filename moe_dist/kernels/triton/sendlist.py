"""Which token goes to which rank, and in what order: the whole preparation of an all-to-all in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def send_lists(
    ids_TK: Tensor,
    weights_TK: Tensor,
    slots_GE: Tensor,
    groups_EC: Tensor,
    copies_E: Tensor,
    own_group: int,
    tp: int,
    bucket: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See kernels.send_lists."""
    tokens, top_k = ids_TK.shape
    world, device = slots_GE.shape[0] * tp, ids_TK.device
    order_TW = torch.empty(tokens, world, dtype=torch.int32, device=device)
    token_WB = torch.empty(world, bucket, dtype=torch.int32, device=device)
    slots_WBK = torch.empty(world, bucket, top_k, dtype=torch.int32, device=device)
    weights_WBK = torch.empty(world, bucket, top_k, dtype=torch.float32, device=device)
    counts_W = torch.empty(world, dtype=torch.int32, device=device)
    places = triton.next_power_of_2(top_k)
    block = max(16, min(512, 4096 // places, triton.next_power_of_2(max(tokens, 1))))
    _send_lists[(world,)](
        ids_TK, weights_TK, slots_GE, groups_EC, copies_E, order_TW, token_WB, slots_WBK, weights_WBK, counts_W,
        tokens, bucket, own_group, slots_GE.shape[1], groups_EC.shape[1], top_k, tp, groups_EC.shape[1] > 1,
        places, block, num_warps=8,
    )  # fmt: skip
    return order_TW, token_WB, slots_WBK, weights_WBK, counts_W


@triton.jit
def _send_lists(
    ids, weights, slot_table, group_table, copy_counts, orders, tokens_out, slots_out, weights_out, counts,
    T, BUCKET, own_group, EXPERTS, COPIES, K: tl.constexpr, TP: tl.constexpr, REPLICATED: tl.constexpr,
    PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each target rank. It walks the tokens in order, so a running count orders what it takes."""
    target = tl.program_id(0)
    world = tl.num_programs(0)
    group = target // TP
    place = tl.arange(0, PLACES)[None, :]
    taken = 0
    for start in range(0, T, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < T
        pair = (inside[:, None]) & (place < K)
        at = token[:, None] * K + place
        expert = tl.load(ids + at, mask=pair, other=-1)
        known = pair & (expert >= 0)
        expert = tl.maximum(expert, 0)
        if REPLICATED:
            copy = (token[:, None] + expert) % tl.load(copy_counts + expert, mask=known, other=1).to(tl.int32)
            serving = tl.load(group_table + expert * COPIES + copy, mask=known, other=-1).to(tl.int32)
            own_slot = tl.load(slot_table + own_group * EXPERTS + expert, mask=known, other=-1)
            serving = tl.where(own_slot >= 0, own_group, serving)
        else:
            serving = tl.load(group_table + expert, mask=known, other=-1).to(tl.int32)
        here = known & (serving == group)
        wanted = tl.max(here.to(tl.int32), 1)
        order = taken + tl.cumsum(wanted, 0) - 1
        takes = wanted > 0
        tl.store(orders + token * world + target, tl.where(takes, order, -1), mask=inside)
        row = target * BUCKET + order
        tl.store(tokens_out + row, token, mask=takes)
        slot = tl.load(slot_table + group * EXPERTS + expert, mask=here, other=-1)
        weight = tl.load(weights + at, mask=here, other=0.0)
        out = row[:, None].to(tl.int64) * K + place
        stored = takes[:, None] & (place < K)
        tl.store(slots_out + out, slot, mask=stored)
        tl.store(weights_out + out, weight, mask=stored)
        taken += tl.sum(wanted, 0)
    tl.store(counts + target, taken)
    for start in range(taken, BUCKET, BLOCK):
        row = start + tl.arange(0, BLOCK)
        padding = row < BUCKET
        tl.store(tokens_out + target * BUCKET + row, tl.zeros((BLOCK,), tl.int32) - 1, mask=padding)
        out = (target * BUCKET + row)[:, None].to(tl.int64) * K + place
        stored = padding[:, None] & (place < K)
        tl.store(slots_out + out, tl.zeros((BLOCK, PLACES), tl.int32) - 1, mask=stored)
        tl.store(weights_out + out, tl.zeros((BLOCK, PLACES), tl.float32), mask=stored)
