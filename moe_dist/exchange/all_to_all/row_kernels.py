"""Gather the rows to send, and add up those that came back."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_dist.kernels.triton.launch import as_bits, launch
from moe_dist.model.sizes import cdiv, power_of_2, row_bytes
from moe_dist.step.workspace import Take


def take_sends(rows: Tensor, token_WB: Tensor, counts_W: Tensor | None, rank: int, take: Take) -> tuple[Tensor, Tensor]:
    """See lists.take_sends."""
    world, bucket = token_WB.shape
    send = take(((world - 1) * bucket, *rows.shape[1:]), rows.dtype)
    receive = take((world * bucket, *rows.shape[1:]), rows.dtype)
    if not receive.numel() or not len(rows):
        return send, receive
    width = row_bytes(rows)
    words = width % 4 == 0
    if words:
        width //= 4
    block = min(2048, power_of_2(width))
    compact = counts_W is not None
    launch(
        _take_sends,
        (bucket, world, cdiv(width, block)),
        (rows.contiguous(), token_WB, token_WB if counts_W is None else counts_W, send, receive),
        (width, rank),
        (words, compact, power_of_2(world), block),
        num_warps=4,
    )
    return send, receive


@triton.jit(do_not_specialize=["rank"])
def _take_sends(
    source, token, counts, send, receive, width, rank, WORDS: tl.constexpr, COMPACT: tl.constexpr,
    TARGETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    source, send, receive = as_bits(source, WORDS), as_bits(send, WORDS), as_bits(receive, WORDS)
    place, to, bucket = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    taken = tl.load(token + to * bucket + place).to(tl.int64)
    if taken >= 0:
        if COMPACT:
            lower = tl.arange(0, TARGETS)
            start = tl.sum(tl.load(counts + lower, mask=(lower < to) & (lower != rank), other=0), 0)
        else:
            start = (to - (to > rank).to(tl.int32)) * bucket
        column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        values = tl.load(source + taken * width + column, mask=inside)
        if to == rank:
            tl.store(receive + place.to(tl.int64) * width + column, values, mask=inside)
        else:
            tl.store(send + (start + place).to(tl.int64) * width + column, values, mask=inside)


def sum_rows(
    back_SH: Tensor, own_RH: Tensor, order_TW: Tensor, counts_W: Tensor | None, bucket: int, rank: int
) -> Tensor:
    """See lists.sum_rows."""
    tokens, world = order_TW.shape
    hidden = back_SH.shape[1]
    y_TH = back_SH.new_empty(tokens, hidden)
    if y_TH.numel():
        block = min(1024, power_of_2(hidden))
        grid = (tokens, cdiv(hidden, block), 1)
        counts = order_TW if counts_W is None else counts_W
        constants = (counts_W is not None, world, block)
        launch(_sum_rows, grid, (back_SH, own_RH, order_TW, counts, y_TH), (hidden, bucket, rank), constants)
    return y_TH


@triton.jit(do_not_specialize=["bucket", "rank"])
def _sum_rows(
    back, own, order, counts, y, hidden, bucket, rank, COUNTED: tl.constexpr, WORLD: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    start = tl.zeros((), dtype=tl.int64)
    for w in tl.static_range(WORLD):
        place = tl.load(order + token * WORLD + w).to(tl.int64)
        if w == rank:
            if place >= 0:
                total += tl.load(own + place * hidden + column, mask=inside, other=0.0).to(tl.float32)
        else:
            if place >= 0:
                total += tl.load(back + (start + place) * hidden + column, mask=inside, other=0.0).to(tl.float32)
            if COUNTED:
                start += tl.load(counts + w).to(tl.int64)
            else:
                start += bucket
    tl.store(y + token * hidden + column, total.to(y.dtype.element_ty), mask=inside)
