"""Partial sums of replicated tokens, added up: an all-reduce in two steps.

Every rank has a share of the tokens. First the weighted sum, or `send_shares`, stores each token's partial sum in the
window of the rank whose share it is in. `add_share` waits for flags "rows" and adds them up there. `gather_shares`
waits for flags "sums" and reads all totals from where they are.

It is the same protocol as that of rows and sums (flags.py), so layers of both kinds can share a window. In the first
phase ranks write into the first area of their peers, and a rank sets its flag "sums" after it has read its own. In the
second phase a rank writes into its own second area, which others read, after it has all flags "rows" of this step. A
peer sets that flag after it has read the totals of the step before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from moe_dist.exchange.nvlink.flags import (
    ROWS,
    STEP,
    SUMS,
    await_flags,
    end_phase,
    few,
    last_phase,
    launched,
    ranks,
    region_of,
    shared,
    tell,
)
from moe_dist.exchange.nvlink.sum_kernels import VALUES, WORDS
from moe_dist.exchange.nvlink.window import Ends
from moe_dist.kernels.triton.launch import as_bits, launch
from moe_dist.model.sizes import cdiv, power_of_2, row_bytes

if TYPE_CHECKING:
    from moe_dist.exchange.nvlink.replicated import Reduction


def send_shares(step: Reduction, sums_TH: Tensor, ends: Ends) -> None:
    """Sums that the backend has not stored by itself."""
    words = row_bytes(sums_TH) // 4
    block = min(WORDS, power_of_2(words))
    launch(
        _send_shares,
        (step.tokens, cdiv(words, block), 1),
        (sums_TH, step.window.by_rank_W),
        (step.tokens, step.share, ends.rank, words, step.sums_at),
        (block,),
    )


def add_share(step: Reduction, ends: Ends) -> None:
    """This rank's share, as soon as everybody's sums are here."""
    block = min(VALUES, power_of_2(step.hidden))
    grid = step.share, cdiv(step.hidden, block), 1
    at_once = few(grid)
    early = at_once and ends.early
    if not at_once:
        end_phase(step.window, ROWS.value, ends)
    shape = step.share, step.hidden
    came = step.window.view(step.sums_at, (ends.world, *shape), step.dtype)
    total = step.window.view(step.totals_at, shape, step.dtype)
    here = max(0, min(step.share, step.tokens - ends.rank * step.share))
    launch(
        _add_share,
        grid,
        (came, total, *shared(step.window)),
        (here, step.share, step.hidden, ends.rank, ends.limit_ns),
        (*ranks(ends), block, at_once, ends.waits, early),
        **launched(early),
    )


def gather_shares(step: Reduction, y_TH: Tensor, ends: Ends) -> None:
    """All tokens, as soon as everybody has added up its share."""
    words = row_bytes(y_TH) // 4
    block = min(WORDS, power_of_2(words))
    grid = step.tokens, cdiv(words, block), 1
    at_once = few(grid)
    early = at_once and ends.early
    if not at_once:
        end_phase(step.window, SUMS.value, ends)
    launch(
        _gather_shares,
        grid,
        (y_TH, step.window.by_rank_W, *shared(step.window)),
        (step.share, words, step.totals_at, ends.rank, ends.limit_ns),
        (*ranks(ends), block, at_once, ends.waits, early),
        **launched(early),
    )


@triton.jit(do_not_specialize=["T", "rank"])
def _send_shares(sums, by_rank, T, EACH, rank, WORDS, AT, BLOCK: tl.constexpr):
    """One program for each token and each BLOCK words of its sum, which goes to the place [this rank, token of the
    share]."""
    token = (tl.program_id(0) + (rank + 1) * EACH) % T  # every rank begins with another target
    target = token // EACH
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(as_bits(sums) + token.to(tl.int64) * WORDS + column, mask=column < WORDS)
    there = region_of(tl.load(by_rank + target), AT, tl.int32) + (tl.cast(rank, tl.int64) * EACH + token % EACH) * WORDS
    tl.store(there + column, words, mask=column < WORDS)


@triton.jit(do_not_specialize=["HERE", "rank", "LIMIT_NS"])
def _add_share(
    came, total, header, failed, peers, HERE, EACH, H, rank, LIMIT_NS, W: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr, ENDS: tl.constexpr, WAITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """total[t] = the sum of came[:, t] in float32, in the order of ranks, for the first HERE tokens. With ENDS the
    first program sets the flags, which say that earlier launches have stored this rank's sums, and all wait.
    EARLY: it was launched while the one before still ran, as the next one is."""
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    token, part = tl.program_id(0), tl.program_id(1)
    if ENDS:
        number = tl.load(header + STEP) + 1
        if token + part == 0:
            tell(header, peers, rank, ROWS, number, W, LANES)
        if WAITS:
            await_flags(header, failed, ROWS, 0, number, LIMIT_NS, W, LANES)
        tl.debug_barrier()  # every thread of the block has seen the flags
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside = (column < H) & (token < HERE)
    found = tl.zeros((BLOCK,), dtype=tl.float32)
    for source in tl.static_range(W):
        at = (tl.cast(EACH, tl.int64) * source + token) * H + column
        found += tl.load(came + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + token.to(tl.int64) * H + column, found.to(total.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rank", "LIMIT_NS"])
def _gather_shares(
    y, by_rank, header, failed, peers, EACH, WORDS, AT, rank, LIMIT_NS, W: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr, ENDS: tl.constexpr, WAITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y[token] from the rank whose share it is in. With ENDS and EARLY as `_add_sums`."""
    if EARLY:
        cuda.gdc_wait()
    if ENDS:
        last_phase(header, failed, peers, rank, LIMIT_NS, W, LANES, WAITS)
    token = (tl.program_id(0) + (rank + 1) * EACH) % tl.num_programs(0)  # every rank begins with another source
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = region_of(tl.load(by_rank + token // EACH), AT, tl.int32) + (token % EACH).to(tl.int64) * WORDS
    words = tl.load(there + column, mask=column < WORDS)
    tl.store(as_bits(y) + token.to(tl.int64) * WORDS + column, words, mask=column < WORDS)
