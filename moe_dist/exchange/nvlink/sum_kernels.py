"""Combine: partial sums as stores into the windows of those whose tokens they are, and their sum there."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from moe_dist.exchange.nvlink.engines import Ranges
from moe_dist.exchange.nvlink.flags import SUMS, end_phase, few, last_phase, launched, ranks, region_of, shared
from moe_dist.exchange.nvlink.window import Ends, Visit
from moe_dist.kernels.triton.launch import as_bits, launch
from moe_dist.model.sizes import cdiv, power_of_2, row_bytes

WORDS, VALUES = 2048, 1024  # of a sum that one program sends, and adds


def send_sums(visit: Visit, sums_RH: Tensor, ends: Ends) -> None:
    """The partial sums of the rows that came, back to where they came from."""
    (rows, top_k), words, ahead = visit.slots_RK.shape, row_bytes(sums_RH) // 4, visit.ahead
    ahead = ahead._replace(width=ahead.width * sums_RH.itemsize // 4)
    block, programs = _blocks(words, ahead, WORDS)
    launch(
        _send_sums,
        (rows, programs, 1),
        (sums_RH, visit.slots_RK, visit.window.addresses_W),
        (visit.bucket, ends.rank, words, *ahead, visit.sums_at),
        (top_k, power_of_2(top_k), ends.world, block),
    )


def add_sums(visit: Visit, own: Tensor | None, apart: int, y_TH: Tensor, ends: Ends) -> None:
    """This rank's finished tokens, as soon as everybody's sums are here. `own`, `apart`: as sinks.Finished has them."""
    tokens, hidden = y_TH.shape
    block, programs = _blocks(hidden, visit.ahead, VALUES)
    grid = max(1, tokens), programs, 1
    at_once = few(grid)
    # A step with copies has waited for them too, not for one launch alone.
    early = at_once and ends.early and not (visit.ahead.number or visit.copies.used)
    if not at_once:
        end_phase(visit.window, SUMS.value, ends)
    came = visit.window.view(visit.sums_at, *visit.regions.sums)
    launch(
        _add_sums,
        grid,
        (came, came if own is None else own, visit.served_TW, y_TH, *shared(visit.window)),
        (tokens, visit.bucket, hidden, *visit.ahead, apart, ends.rank, ends.limit_ns),
        (*ranks(ends), block, own is not None, at_once, ends.waits, early),
        **launched(early),
    )


def _blocks(columns: int, ahead: Ranges, most: int) -> tuple[int, int]:
    """How wide a program's part of a row is, and how many it takes: each range that goes ahead has its own."""
    others = columns - ahead.columns
    block = min(most, power_of_2(max(ahead.width, others)))
    return block, ahead.number * cdiv(ahead.width, block) + cdiv(others, block)


@triton.jit
def _columns(H, WIDTH, RANGES, BLOCK: tl.constexpr):
    """A program's part of a row, by its second number: of one of RANGES ranges of WIDTH columns or of the others, which
    are the first column, how many there are, and BLOCK of them counted from there. In a region they begin at their
    first column times the region's rows."""
    parts = tl.cdiv(WIDTH, BLOCK)
    part = tl.program_id(1)
    range_of = tl.minimum(part // tl.maximum(parts, 1), RANGES)
    first = range_of * WIDTH
    # 16 bytes or more, whatever is counted
    width = tl.multiple_of(tl.where(range_of < RANGES, WIDTH, H - first), 8)
    part -= range_of * parts
    return first.to(tl.int64), width, part * BLOCK + tl.arange(0, BLOCK)


@triton.jit(do_not_specialize=["rank"])
def _send_sums(
    sums, slots, peers, BUCKET, rank, WORDS, WIDTH, RANGES, SUMS_AT, K: tl.constexpr, PLACES: tl.constexpr,
    W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each computed row and each BLOCK words of its sum. They go back to where the row came from, to
    the place [this rank, its range of words, token]."""
    source = (tl.program_id(0) + 1) % W  # from this rank on: in turns, and every rank begins with another one
    token = tl.program_id(0) // W
    row = source.to(tl.int64) * BUCKET + token
    place = tl.arange(0, PLACES)
    slot = tl.load(slots + row * K + place, mask=place < K, other=-1)
    if tl.max(slot, 0) >= 0:
        first, width, column = _columns(WORDS, WIDTH, RANGES, BLOCK)
        inside = column < width
        words = tl.load(as_bits(sums) + row * WORDS + first + column, mask=inside)
        there = region_of(tl.load(peers + source), SUMS_AT, tl.int32)
        there += (rank.to(tl.int64) * WORDS + first) * BUCKET + token.to(tl.int64) * width
        tl.store(there + column, words, mask=inside)


@triton.jit(do_not_specialize=["T", "rank", "LIMIT_NS"])
def _add_sums(
    came, own, served, y, header, failed, peers, T, BUCKET, H, WIDTH, RANGES, APART, rank, LIMIT_NS, W: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr, ENDS: tl.constexpr, WAITS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """y[token] = the sum of what came back for it, in float32, in the order of ranks. With OWN, the first APART columns
    of what this rank has for itself lie in `own`, as the first among the sums of all rows. With ENDS the phase ends
    here. EARLY: it was launched while the one before still ran."""
    if EARLY:
        cuda.gdc_wait()
    token = tl.program_id(0)
    if ENDS:
        last_phase(header, failed, peers, rank, LIMIT_NS, W, LANES, WAITS)
    first, width, column = _columns(H, WIDTH, RANGES, BLOCK)
    inside = (column < width) & (token < T)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for peer in tl.static_range(W):
        if tl.load(served + token * W + peer, mask=token < T, other=0) != 0:
            theirs = came + (tl.cast(H, tl.int64) * peer + first) * BUCKET
            if OWN and (peer == rank) & (first < APART):
                theirs = own + first * W * BUCKET
            at = theirs + token.to(tl.int64) * width + column
            total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token.to(tl.int64) * H + first + column, total.to(y.dtype.element_ty), mask=inside)
