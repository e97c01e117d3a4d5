"""What a gated shared expert counts for, token by token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.kernels.triton.launch import launch
from moe_dist.model.sizes import power_of_2
from moe_dist.step.workspace import Take

MOST_TOGETHER = 2048  # columns that a program reads at a time


def token_gate(x_RH: Tensor, gate_1H: Tensor, take: Take) -> Tensor:
    """See kernels.token_gate."""
    R, H = x_RH.shape
    weights_R1 = take((R, 1), torch.float32)
    launch(_token_gate, (R, 1, 1), (x_RH, gate_1H, weights_R1), (), (H, min(MOST_TOGETHER, power_of_2(H))))
    return weights_R1


@triton.jit
def _token_gate(x, gate, weights, H: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    products = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in tl.range(0, H, BLOCK):
        column = start + tl.arange(0, BLOCK)
        of_token = tl.load(x + row * H + column, mask=column < H, other=0.0).to(tl.float32)
        products += of_token * tl.load(gate + column, mask=column < H, other=0.0).to(tl.float32)
    tl.store(weights + row, tl.sigmoid(tl.sum(products)))
