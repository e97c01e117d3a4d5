"""Ids and weights of tokens to where another package's kernel reads them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_dist.kernels.triton.launch import launch
from moe_dist.model.sizes import cdiv

TOGETHER = 512


def put_pairs(ids_TK: Tensor, weights_TK: Tensor, num_experts: int, ids_BK: Tensor, weights_BK: Tensor) -> None:
    """See kernels.put_pairs."""
    tensors = (ids_TK.contiguous(), weights_TK.contiguous(), ids_BK, weights_BK)
    sizes = (ids_TK.numel(), ids_BK.numel(), num_experts)
    launch(_put_pairs, (cdiv(sizes[1], TOGETHER), 1, 1), tensors, sizes, (TOGETHER,))


@triton.jit
def _put_pairs(ids, weights, ids_out, weights_out, PAIRS, PLACES, EXPERTS, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + place, mask=place < PAIRS, other=-1)
    known = (expert >= 0) & (expert < EXPERTS)
    weight = tl.load(weights + place, mask=known, other=0.0)
    inside = place < PLACES
    tl.store(ids_out + place, tl.where(known, expert, -1).to(ids_out.dtype.element_ty), mask=inside)
    tl.store(weights_out + place, weight, mask=inside)
