"""What crosses NVLink, as stores into the peers' memory, and the flags that say it is there.

One window of memory on each rank (window.py) holds a header and two areas: rows that came in, and partial sums that
came back. In a phase, launches or copies write into one area of every peer. A launch then sets this rank's flag for
that phase on every peer to the step's number. Where copies carry the rows, flag "rows" speaks of slots and weights
only, and a last copy to each peer sets a flag "copied rows" there.

**Why no barrier and no second buffer are needed.** A step has two phases, and in each a rank waits for the flags of all
ranks before it goes on.
- A rank writes rows of step g only after it has all flags "sums" of step g - 1. A peer sets that flag after its GEMMs,
  which were the last to read the rows of step g - 1 there: launches of a stream run one after the other.
- A rank writes sums of step g only after it has all flags "rows" of step g. A peer sets that flag after its final sums
  of step g - 1, which were the last to read that area there.
- Copies run on streams of their own, behind an event of the step's stream, which has waited for the other phase's
  flags by then. Before it sets the flags "sums" it waits for all of them. So they too lie between flags, and no step
  begins while a copy still reads its scratch, or writes to a peer.
- Copied rows may come later than flag "rows". Who reads them waits for their own flag. Who doesn't, since no expert
  here needs them, has waited for that rank's flag "rows", which is what the second point asks for.
**Why what a flag announces is there.** It is stored with release at system scope by a thread that comes after all of
this rank's writes of the phase: in a later launch of the stream, or in the same one by the block that took the last
ticket. Blocks take tickets with acquire and release after their threads met at a barrier, so the last one has seen what
all others wrote. The peer reads flags with acquire at system scope. Its later launches see all of it, and so do threads
that meet at a barrier afterwards. PTX's memory model orders these: causality goes from one scope to another. A copy is
done, and its writes are where they belong, before a launch or copy begins whose stream has waited for it: so a flag
that is copied comes behind the rows.
**Numbers wrap around**, after 60 hours of 100 us steps: they are compared by their difference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.exchange.nvlink import window
from moe_dist.exchange.nvlink.window import Ends, Visit
from moe_dist.exchange.served import choices, served_by
from moe_dist.kernels.triton.launch import as_bits, launch
from moe_dist.kernels.triton.quantize import quantized
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import FP8_MAX, TINY
from moe_dist.model.routing import Routing
from moe_dist.model.sizes import cdiv, power_of_2, row_bytes
from moe_dist.step import Arrivals

ROWS, SUMS, COPIED = tl.constexpr(window.ROWS), tl.constexpr(window.SUMS), tl.constexpr(window.COPIED)  # phases
STEP, NUMBER, TICKETS = tl.constexpr(window.STEP), tl.constexpr(window.NUMBER), tl.constexpr(window.TICKETS)
FLAGS, PHASE = tl.constexpr(window.FLAGS), tl.constexpr(window.MOST_RANKS)
GROUP, WIDEST = 128, 16384  # columns with one scale; of a row that is quantized as it is sent
LARGEST, LEAST = tl.constexpr(FP8_MAX), tl.constexpr(TINY)
WORDS, VALUES = 2048, 1024  # of a row, of a sum, that one program moves
COPIED_FLAGS = window.FLAGS + window.COPIED * window.MOST_RANKS
FEW = 512  # thread blocks up to which the last one, or each, sees to the flags; of more a launch of its own is quicker


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
    at_once = grid[0] * grid[1] <= FEW
    if copied:
        launch(_set_number, (1, 1, 1), (visit.window.words,), (), ())
        visit.copies.copy(_row_copies(visit, parts, ends), in_turn=True)
    launch(
        _send_rows,
        grid,
        (parts[0], parts[-1], *inputs, visit.served_TW, *_shared(visit)),
        (
            *(visit.tokens, visit.bucket, *sizes, words[0], scale_words),
            *(starts[0], starts[1] if scale_words else 0, starts[-2], starts[-1], ends.limit_ns),
        ),
        (
            *constants,
            *_ranks(ends),
            power_of_2(max(scale_words, 1)),
            block,
            False,
            to_own,
            not copied,
            at_once,
            ends.waits,
        ),
    )
    if not at_once:
        launch(_meet, (1, 1, 1), _shared(visit), (ends.rank, ends.limit_ns), (ROWS.value, *_ranks(ends), ends.waits))


def few_rows(bucket: int, hidden: int) -> bool:
    """Whether so many rows can be quantized as they are sent: each program keeps a whole row."""
    return bucket <= FEW and hidden <= WIDEST


def _send_quantized(
    visit: Visit,
    x_TH: Tensor,
    inputs: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    constants: tuple[int, ...],
    ends: Ends,
) -> None:
    hidden, starts = x_TH.shape[1], visit.regions.row_starts
    groups = cdiv(hidden, GROUP)
    launch(
        _send_rows,
        (visit.bucket, 1, 1),
        (x_TH, x_TH, *inputs, visit.served_TW, *_shared(visit)),
        (visit.tokens, visit.bucket, *sizes, hidden // 4, groups, starts[0], starts[1], *starts[-2:], ends.limit_ns),
        (*constants, *_ranks(ends), power_of_2(groups), 1, True, True, True, True, ends.waits),
    )


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
        launch(_await_copies, (1, 1, 1), _shared(visit)[:2], (ends.rank, ends.limit_ns), _ranks(ends))


def send_sums(visit: Visit, sums_RH: Tensor, ends: Ends) -> None:
    """The partial sums of the rows that came, back to where they came from."""
    (rows, top_k), words, ahead = visit.slots_RK.shape, row_bytes(sums_RH) // 4, visit.ahead * sums_RH.itemsize // 4
    block, programs = _blocks(words, ahead, WORDS)
    launch(
        _send_sums,
        (rows, programs, 1),
        (sums_RH, visit.slots_RK, visit.window.addresses_W),
        (visit.bucket, ends.rank, words, ahead, visit.sums_at),
        (top_k, power_of_2(top_k), ends.world, block),
    )


def add_sums(visit: Visit, own: Tensor | None, apart: int, y_TH: Tensor, ends: Ends) -> None:
    """This rank's finished tokens, as soon as everybody's sums are here. `own`, `apart`: as sinks.Finished has them."""
    tokens, hidden = y_TH.shape
    block, programs = _blocks(hidden, visit.ahead, VALUES)
    grid = max(1, tokens), programs, 1
    at_once = grid[0] * grid[1] <= FEW
    if not at_once:
        launch(_meet, (1, 1, 1), _shared(visit), (ends.rank, ends.limit_ns), (SUMS.value, *_ranks(ends), ends.waits))
    came = visit.window.view(visit.sums_at, *visit.regions.sums)
    launch(
        _add_sums,
        grid,
        (came, came if own is None else own, visit.served_TW, y_TH, *_shared(visit)),
        (tokens, visit.bucket, hidden, visit.ahead, apart, ends.rank, ends.limit_ns),
        (*_ranks(ends), block, own is not None, at_once, ends.waits),
    )


def _blocks(columns: int, ahead: int, most: int) -> tuple[int, int]:
    """How wide a program's part of a row is, and how many it takes: the columns that go ahead have their own."""
    block = min(most, power_of_2(max(ahead, columns - ahead)))
    return block, cdiv(ahead, block) + cdiv(columns - ahead, block)


def _shared(visit: Visit) -> tuple[Tensor, Tensor, Tensor]:
    return visit.window.words, visit.window.failed, visit.window.addresses_W


def _ranks(ends: Ends) -> tuple[int, int]:
    return ends.world, power_of_2(ends.world)


@triton.jit
def _there(address, AT, TYPE: tl.constexpr):
    """A region of a peer's memory, which begins at a multiple of 16 bytes: rows move so many at a time."""
    return tl.multiple_of((address + AT).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _nanoseconds():
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def _seen(addresses):
    """32-bit words at these addresses; what their writers wrote before is seen from here on."""
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.b32 $0, [$1];", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _tell(header, peers, rank, phase: tl.constexpr, number, W: tl.constexpr, LANES: tl.constexpr):
    """This rank's flag of a phase on every rank, with all writes of this block and of those whose tickets it has
    seen."""
    lane = tl.arange(0, LANES)
    theirs = tl.load(peers + lane, mask=lane < W, other=0).to(tl.pointer_type(tl.int32))
    flags = theirs + FLAGS + phase * PHASE + rank
    tl.atomic_xchg(flags, tl.zeros_like(lane) + number, mask=lane < W, sem="release", scope="sys")


@triton.jit(do_not_specialize=["rank", "LIMIT_NS"])
def _meet(
    header, failed, peers, rank, LIMIT_NS, phase: tl.constexpr, W: tl.constexpr, LANES: tl.constexpr,
    WAITS: tl.constexpr,
):  # fmt: skip
    """A phase ends: earlier launches have written this rank's part."""
    number = tl.load(header + STEP) + 1
    _tell(header, peers, rank, phase, number, W, LANES)
    if WAITS:
        _await(header, failed, phase, 0, number, LIMIT_NS, W, LANES)
    if phase == SUMS:
        tl.store(header + STEP, number)


@triton.jit
def _set_number(header):
    """What copies of this step leave behind them."""
    tl.store(header + NUMBER, tl.load(header + STEP) + 1)


@triton.jit(do_not_specialize=["rank", "LIMIT_NS"])
def _await_copies(header, failed, rank, LIMIT_NS, W: tl.constexpr, LANES: tl.constexpr):
    number = tl.load(header + STEP) + 1
    tl.store(header + FLAGS + COPIED * PHASE, number)  # of its own rows
    tl.debug_barrier()
    _await(header, failed, COPIED, rank, number, LIMIT_NS, W, LANES)


@triton.jit
def _missing(flags, phase: tl.constexpr, number):
    """Flags of rows and sums are set in every step, so an older one is behind `number` by few. Those of copies may be
    as old as the window; no rank sets one before all have ended the step before."""
    if phase == COPIED:
        return _seen(flags) != number
    return _seen(flags) - number < 0


@triton.jit
def _fence():
    """What was stored before is there for everybody before what is stored next."""
    tl.inline_asm_elementwise("fence.acq_rel.sys; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _await(header, failed, phase: tl.constexpr, first, number, LIMIT_NS, W: tl.constexpr, LANES: tl.constexpr):
    """Until all flags of a phase are here, but no longer than LIMIT_NS: then `failed` gets the phase (from 1 on), a
    rank that is missing, and the number of the step. `first`: whose flag is the first one."""
    lane = tl.arange(0, LANES)
    own = header + FLAGS + phase * PHASE + tl.minimum(lane, W - 1)
    missing = _missing(own, phase, number)
    began = _nanoseconds()
    in_time = began >= 0
    while (tl.max(missing.to(tl.int32), 0) > 0) & in_time:
        missing = _missing(own, phase, number)
        in_time = _nanoseconds() - began < LIMIT_NS
    if tl.max(missing.to(tl.int32), 0) > 0:
        tl.store(failed + 1, (tl.max(tl.where(missing, tl.minimum(lane, W - 1), -1), 0) + first) % W)
        tl.store(failed + 2, number)
        _fence()
        tl.store(failed, phase + 1)


@triton.jit(do_not_specialize=["T", "rank", "own_group", "LIMIT_NS"])
def _send_rows(
    values, scales, ids, weights, slot_table, group_table, copy_counts, served, header, failed, peers,
    T, BUCKET, rank, own_group, EXPERTS, COPIES, VALUE_WORDS, SCALE_WORDS, VALUES_AT, SCALES_AT, SLOTS_AT, WEIGHTS_AT,
    LIMIT_NS, K: tl.constexpr, TP: tl.constexpr, REPLICATED: tl.constexpr, PLACES: tl.constexpr, W: tl.constexpr,
    LANES: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr, QUANTIZES: tl.constexpr, TO_OWN: tl.constexpr,
    TO_OTHERS: tl.constexpr, ENDS: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """One program for each of the bucket's tokens and each BLOCK words of its row. Every peer gets the token's slots
    there and its weights, -1 and 0 for padding; its row goes to those that hold one of its experts, as TO_OWN and
    TO_OTHERS say. On the rank p places before this one, row t has the place p · BUCKET + t, so nobody counts.
    `served`[t, w]: whether rank w sends a sum back. If it QUANTIZES, `values` are bf16, and a program has a whole row
    in SCALES groups of 128 columns."""
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
                tl.store(_there(to, VALUES_AT, tl.float8e4nv) + row * VALUE_WORDS * 4 + column, words, mask=inside)
            else:
                tl.store(_there(to, VALUES_AT, tl.int32) + row * VALUE_WORDS + column, words, mask=inside)
        if part == 0:
            if carried & wanted:
                SCALE: tl.constexpr = tl.float32 if QUANTIZES else tl.int32
                tl.store(_there(to, SCALES_AT, SCALE) + row * SCALE_WORDS + beside, scale, mask=scaled)
            slot = tl.load(slot_table + (peer // TP) * EXPERTS + expert, mask=here, other=-1)
            weight = tl.load(weights + at, mask=here, other=0.0)
            slots_there = _there(to, SLOTS_AT, tl.int32) + row * K
            weights_there = _there(to, WEIGHTS_AT, tl.float32) + row * K
            tl.store(slots_there + place[None, :], slot, mask=place[None, :] < K)
            tl.store(weights_there + place[None, :], weight, mask=place[None, :] < K)
            tl.store(served + token * W + peer, wanted.to(tl.int8), mask=real)
    if ENDS:
        tl.debug_barrier()  # the ticket speaks for all threads of the block
        blocks = tl.num_programs(0) * tl.num_programs(1)
        if tl.atomic_add(header + TICKETS + ROWS, 1, sem="acq_rel", scope="sys") == blocks - 1:
            tl.store(header + TICKETS + ROWS, 0)
            number = tl.load(header + STEP) + 1
            _tell(header, peers, rank, ROWS, number, W, LANES)
            if WAITS:
                _await(header, failed, ROWS, 0, number, LIMIT_NS, W, LANES)


@triton.jit
def _columns(H, AHEAD, BLOCK: tl.constexpr):
    """A program's part of a row, by its second number: of the AHEAD columns or of the others, which are the first
    column, how many there are, and BLOCK of them counted from there. In a region they begin at their first column times
    the region's rows."""
    parts = tl.cdiv(AHEAD, BLOCK)
    part = tl.program_id(1)
    first = tl.where(part < parts, 0, AHEAD)
    width = tl.multiple_of(tl.where(part < parts, AHEAD, H - AHEAD), 8)  # 16 bytes or more, whatever is counted
    part -= tl.where(part < parts, 0, parts)
    return first.to(tl.int64), width, part * BLOCK + tl.arange(0, BLOCK)


@triton.jit(do_not_specialize=["rank"])
def _send_sums(
    sums, slots, peers, BUCKET, rank, WORDS, AHEAD, SUMS_AT, K: tl.constexpr, PLACES: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each computed row and each BLOCK words of its sum. They go back to where the row came from, to
    the place [this rank, AHEAD words or the others, token]."""
    source = (tl.program_id(0) + 1) % W  # from this rank on: in turns, and every rank begins with another one
    token = tl.program_id(0) // W
    row = source.to(tl.int64) * BUCKET + token
    place = tl.arange(0, PLACES)
    slot = tl.load(slots + row * K + place, mask=place < K, other=-1)
    if tl.max(slot, 0) >= 0:
        first, width, column = _columns(WORDS, AHEAD, BLOCK)
        inside = column < width
        words = tl.load(as_bits(sums) + row * WORDS + first + column, mask=inside)
        there = _there(tl.load(peers + source), SUMS_AT, tl.int32)
        there += (rank.to(tl.int64) * WORDS + first) * BUCKET + token.to(tl.int64) * width
        tl.store(there + column, words, mask=inside)


@triton.jit
def _last_phase(header, failed, peers, rank, LIMIT_NS, W: tl.constexpr, LANES: tl.constexpr, WAITS: tl.constexpr):
    """In every program of the step's last launch: the first one sets the flags, which say that earlier launches have
    done this rank's part of the phase, and all wait for everybody's."""
    number = tl.load(header + STEP) + 1
    if tl.program_id(0) + tl.program_id(1) == 0:
        _tell(header, peers, rank, SUMS, number, W, LANES)
    if WAITS:
        _await(header, failed, SUMS, 0, number, LIMIT_NS, W, LANES)
    tl.debug_barrier()  # every thread of the block has seen the flags
    if tl.atomic_add(header + TICKETS + SUMS, 1, sem="relaxed") == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.store(header + TICKETS + SUMS, 0)
        tl.store(header + STEP, number)  # all have read it


@triton.jit(do_not_specialize=["T", "rank", "LIMIT_NS"])
def _add_sums(
    came, own, served, y, header, failed, peers, T, BUCKET, H, AHEAD, APART, rank, LIMIT_NS, W: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr, ENDS: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """y[token] = the sum of what came back for it, in float32, in the order of ranks. With OWN, the first APART columns
    of what this rank has for itself lie in `own`, as the first among the sums of all rows. With ENDS the phase ends
    here."""
    token = tl.program_id(0)
    if ENDS:
        _last_phase(header, failed, peers, rank, LIMIT_NS, W, LANES, WAITS)
    first, width, column = _columns(H, AHEAD, BLOCK)
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
