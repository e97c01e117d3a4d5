"""Dispatch: this rank's rows, slots and weights as stores into the windows of those that compute them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from moe_dist.exchange.nvlink import window
from moe_dist.exchange.nvlink.flags import (
    COPIED,
    FLAGS,
    NUMBER,
    PHASE,
    ROWS,
    STEP,
    TICKETS,
    await_flags,
    end_phase,
    few,
    ranks,
    region_of,
    shared,
    tell,
)
from moe_dist.exchange.nvlink.window import Ends, Visit
from moe_dist.exchange.served import choices, served_by
from moe_dist.kernels.triton.launch import as_bits, launch
from moe_dist.kernels.triton.quantize import quantized
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import FP8_MAX, TINY
from moe_dist.model.routing import Routing
from moe_dist.model.sizes import cdiv, power_of_2, row_bytes
from moe_dist.step import Arrivals

GROUP, WIDEST = 128, 16384  # columns with one scale; of a row that is quantized as it is sent
LARGEST, LEAST = tl.constexpr(FP8_MAX), tl.constexpr(TINY)
WORDS = 2048  # of a row that one program moves
# Tokens a rank up to which rows are quantized as they are sent. A launch that quantizes more of them reads a row once
# and sends it while others are read; whether that is quicker than a launch before it, no GPU has shown.
QUANTIZED_UP_TO = 512
COPIED_FLAGS = window.FLAGS + window.COPIED * window.MOST_RANKS


def send_rows(
    visit: Visit,
    parts: list[Tensor],
    placement: Placement,
    routing: Routing,
    ends: Ends,
    copied: bool = False,
    quantize: bool = False,
) -> None:
    """This rank's tokens to where they are computed; returns when everybody's are here, as streams go. `parts`: what
    their rows consist of, which may lie in their own place already. `copied`: to all other ranks by copy engines, and
    everybody's slots and weights are here then, but rows only as their flags say. `quantize`: the one part is bf16, and
    is sent as FP8 with a scale for each 128 columns."""
    inputs, sizes, constants = choices(placement, routing, ends.rank)
    parts = [part.contiguous() for part in parts]
    if quantize:
        _send_quantized(visit, parts[0], inputs, sizes, constants, ends)
        return
    starts = visit.regions.row_starts
    own = [visit.window.view(at, tuple(part.shape), part.dtype) for at, part in zip(starts, parts, strict=False)]
    to_own = any(part.data_ptr() != there.data_ptr() for part, there in zip(parts, own, strict=True))
    words = [row_bytes(part) // 4 if to_own or not copied else 0 for part in parts]
    scale_words = words[1] if len(parts) > 1 else 0
    block = min(WORDS, power_of_2(max(words[0], 1)))
    grid = visit.bucket, max(1, cdiv(words[0], block)), 1
    at_once = few(grid)
    if copied:
        launch(_set_number, (1, 1, 1), (visit.window.words,), (), ())
        visit.copies.copy(_row_copies(visit, parts, ends), in_turn=True)
    launch(
        _send_rows,
        grid,
        (parts[0], parts[-1], *inputs, visit.served_TW, *shared(visit.window)),
        (
            *(visit.tokens, visit.bucket, *sizes, words[0], scale_words),
            *(starts[0], starts[1] if scale_words else 0, starts[-2], starts[-1], ends.limit_ns),
        ),
        (
            *constants,
            *ranks(ends),
            power_of_2(max(scale_words, 1)),
            block,
            False,
            to_own,
            not copied,
            at_once,
            ends.waits,
            at_once and ends.early,
        ),
    )
    if not at_once:
        end_phase(visit.window, ROWS.value, ends)


def few_rows(bucket: int, hidden: int) -> bool:
    """Whether so many rows can be quantized as they are sent: each program keeps a whole row."""
    return bucket <= QUANTIZED_UP_TO and hidden <= WIDEST


def _send_quantized(
    visit: Visit,
    x_TH: Tensor,
    inputs: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    constants: tuple[int, ...],
    ends: Ends,
) -> None:
    hidden, starts = x_TH.shape[1], visit.regions.row_starts
    grid, groups = (visit.bucket, 1, 1), cdiv(hidden, GROUP)
    at_once = few(grid)
    launch(
        _send_rows,
        grid,
        (x_TH, x_TH, *inputs, visit.served_TW, *shared(visit.window)),
        (visit.tokens, visit.bucket, *sizes, hidden // 4, groups, starts[0], starts[1], *starts[-2:], ends.limit_ns),
        (
            *(*constants, *ranks(ends), power_of_2(groups), 1, True, True, True),
            *(at_once, ends.waits, at_once and ends.early),
        ),
    )
    if not at_once:
        end_phase(visit.window, ROWS.value, ends)


def _row_copies(visit: Visit, parts: list[Tensor], ends: Ends) -> list[tuple[Tensor, Tensor]]:
    """(place, part) of this rank's rows on every other rank, and behind each rank's the flag there. First to the rank
    that they are the first part for."""
    number, pairs = visit.window.view(4 * NUMBER.value, (1,), torch.int32), []
    for step in range(1, ends.world):
        peer = (ends.rank - step) % ends.world
        for part, start in zip(parts, visit.regions.row_starts[:-2], strict=True):
            at = start + step * visit.bucket * row_bytes(part)
            pairs.append((visit.window.peer_view(peer, at, tuple(part.shape), part.dtype), part))
        pairs.append((visit.window.peer_view(peer, 4 * (COPIED_FLAGS + step), (1,), torch.int32), number))
    return pairs


def arrivals(visit: Visit, ends: Ends) -> Arrivals:
    """When copied rows are here."""
    words = visit.window.words
    flags_P, step = words[COPIED_FLAGS : COPIED_FLAGS + ends.world], words[STEP.value : STEP.value + 1]
    return Arrivals(flags_P, step, visit.window.failed, visit.bucket, ends.rank, ends.limit_ns, COPIED.value)


def await_copies(visit: Visit, ends: Ends) -> None:
    """Returns when all copied rows are here, as streams go."""
    if ends.waits:
        launch(_await_copies, (1, 1, 1), shared(visit.window)[:2], (ends.rank, ends.limit_ns), ranks(ends))


@triton.jit
def _set_number(header):
    """What copies of this step leave behind them."""
    tl.store(header + NUMBER, tl.load(header + STEP) + 1)


@triton.jit(do_not_specialize=["rank", "LIMIT_NS"])
def _await_copies(header, failed, rank, LIMIT_NS, W: tl.constexpr, LANES: tl.constexpr):
    number = tl.load(header + STEP) + 1
    tl.store(header + FLAGS + COPIED * PHASE, number)  # of its own rows
    tl.debug_barrier()
    await_flags(header, failed, COPIED, rank, number, LIMIT_NS, W, LANES)


@triton.jit(do_not_specialize=["T", "rank", "own_group", "LIMIT_NS"])
def _send_rows(
    values, scales, ids, weights, slot_table, group_table, copy_counts, served, header, failed, peers,
    T, BUCKET, rank, own_group, EXPERTS, COPIES, VALUE_WORDS, SCALE_WORDS, VALUES_AT, SCALES_AT, SLOTS_AT, WEIGHTS_AT,
    LIMIT_NS, K: tl.constexpr, TP: tl.constexpr, REPLICATED: tl.constexpr, PLACES: tl.constexpr, W: tl.constexpr,
    LANES: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr, QUANTIZES: tl.constexpr, TO_OWN: tl.constexpr,
    TO_OTHERS: tl.constexpr, ENDS: tl.constexpr, WAITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program for each of the bucket's tokens and each BLOCK words of its row. Every peer gets the token's slots
    there and its weights, -1 and 0 for padding; its row goes to those that hold one of its experts, as TO_OWN and
    TO_OTHERS say. On the rank p places before this one, row t has the place p · BUCKET + t, so nobody counts.
    `served`[t, w]: whether rank w sends a sum back. If it QUANTIZES, `values` are bf16, and a program has a whole row
    in SCALES groups of 128 columns."""
    if EARLY:  # the next launch waits for all that this one does
        cuda.gdc_launch_dependents()
    token, part = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, PLACES)
    beside = tl.arange(0, SCALES)
    real = token < T
    scaled = (beside < SCALE_WORDS) & real & (part == 0)
    if QUANTIZES:
        column = beside[:, None] * 128 + tl.arange(0, 128)[None, :]
        inside = (column < VALUE_WORDS * 4) & real
        found = tl.load(values + token.to(tl.int64) * VALUE_WORDS * 4 + column, mask=inside, other=0.0).to(tl.float32)
        codes, scale = quantized(found, tl.max(tl.abs(found), 1), LARGEST, LEAST)
        words = codes.to(tl.float8e4nv)
    else:
        column = part * BLOCK + tl.arange(0, BLOCK)
        inside = (column < VALUE_WORDS) & real
        words = tl.load(as_bits(values) + token.to(tl.int64) * VALUE_WORDS + column, mask=inside)
        scale = tl.load(as_bits(scales) + token.to(tl.int64) * SCALE_WORDS + beside, mask=scaled)
    tokens = token + tl.zeros((1,), tl.int32)
    for step in tl.static_range(1, W + 1):
        peer = (rank + step) % W  # its own memory last: others may wait
        to = tl.load(peers + step % W)
        row = tl.cast((W - step) * BUCKET, tl.int64) + token
        at, expert, here = served_by(ids, slot_table, group_table, copy_counts, tokens, T, peer // TP, own_group,
                                     EXPERTS, COPIES, K, REPLICATED, PLACES)  # fmt: skip
        wanted = tl.max(tl.max(here.to(tl.int32), 1), 0) > 0
        carried = TO_OWN if step == W else TO_OTHERS
        if carried & wanted:
            if QUANTIZES:
                tl.store(region_of(to, VALUES_AT, tl.float8e4nv) + row * VALUE_WORDS * 4 + column, words, mask=inside)
            else:
                tl.store(region_of(to, VALUES_AT, tl.int32) + row * VALUE_WORDS + column, words, mask=inside)
        if part == 0:
            if carried & wanted:
                SCALE: tl.constexpr = tl.float32 if QUANTIZES else tl.int32
                tl.store(region_of(to, SCALES_AT, SCALE) + row * SCALE_WORDS + beside, scale, mask=scaled)
            slot = tl.load(slot_table + (peer // TP) * EXPERTS + expert, mask=here, other=-1)
            weight = tl.load(weights + at, mask=here, other=0.0)
            slots_there = region_of(to, SLOTS_AT, tl.int32) + row * K
            weights_there = region_of(to, WEIGHTS_AT, tl.float32) + row * K
            tl.store(slots_there + place[None, :], slot, mask=place[None, :] < K)
            tl.store(weights_there + place[None, :], weight, mask=place[None, :] < K)
            tl.store(served + token * W + peer, wanted.to(tl.int8), mask=real)
    if ENDS:
        tl.debug_barrier()  # the ticket speaks for all threads of the block
        blocks = tl.num_programs(0) * tl.num_programs(1)
        if tl.atomic_add(header + TICKETS + ROWS, 1, sem="acq_rel", scope="sys") == blocks - 1:
            tl.store(header + TICKETS + ROWS, 0)
            number = tl.load(header + STEP) + 1
            tell(header, peers, rank, ROWS, number, W, LANES)
            if WAITS:
                await_flags(header, failed, ROWS, 0, number, LIMIT_NS, W, LANES)
