"""Gather rows by index, and add up rows by position."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def take_rows(rows: Tensor, index_S: Tensor) -> Tensor:
    """See kernels.take_rows."""
    out = rows.new_empty(index_S.shape[0], *rows.shape[1:])
    row_bytes = rows[0].nbytes if len(rows) else 0
    if not out.numel() or not row_bytes:
        return out
    words = torch.int32 if row_bytes % 4 == 0 else torch.uint8
    source, target = rows.reshape(len(rows), -1).view(words), out.view(len(out), -1).view(words)
    width = source.shape[1]
    block = min(2048, triton.next_power_of_2(width))
    _take_rows[(len(out), triton.cdiv(width, block))](source, index_S, target, width, block, num_warps=4)
    return out


@triton.jit
def _take_rows(source, index, target, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(source + tl.load(index + row).to(tl.int64) * width + column, mask=inside)
    tl.store(target + row * width + column, values, mask=inside)


def sum_rows(rows_RH: Tensor, position_TW: Tensor) -> Tensor:
    """See kernels.sum_rows."""
    tokens, world = position_TW.shape
    hidden = rows_RH.shape[1]
    y_TH = rows_RH.new_empty(tokens, hidden)
    if y_TH.numel():
        block = min(1024, triton.next_power_of_2(hidden))
        grid = (tokens, triton.cdiv(hidden, block))
        _sum_rows[grid](rows_RH, position_TW, y_TH, hidden, position_TW.stride(0), position_TW.stride(1), world, block)
    return y_TH


@triton.jit
def _sum_rows(rows, position, y, hidden, stride_t, stride_w, WORLD: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for w in tl.static_range(WORLD):
        row = tl.load(position + token * stride_t + w * stride_w).to(tl.int64)
        if row >= 0:
            total += tl.load(rows + row * hidden + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * hidden + column, total.to(y.dtype.element_ty), mask=inside)
