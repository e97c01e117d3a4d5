"""Flags in the peers' memory that say what is there: how the phases of a step are ordered, and why that is enough.

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

import triton
import triton.language as tl
from torch import Tensor

from moe_dist.comm.symmetric import Symmetric
from moe_dist.exchange.nvlink import window
from moe_dist.exchange.nvlink.window import Ends
from moe_dist.kernels.triton.launch import launch
from moe_dist.model.sizes import power_of_2

ROWS, SUMS, COPIED = tl.constexpr(window.ROWS), tl.constexpr(window.SUMS), tl.constexpr(window.COPIED)  # phases
STEP, NUMBER, TICKETS = tl.constexpr(window.STEP), tl.constexpr(window.NUMBER), tl.constexpr(window.TICKETS)
FLAGS, PHASE = tl.constexpr(window.FLAGS), tl.constexpr(window.MOST_RANKS)
FEW = 512  # thread blocks up to which the last one, or each, sees to the flags; of more a launch of its own is quicker


def few(grid: tuple[int, int, int]) -> bool:
    """Whether a launch of so many thread blocks sees to the flags itself."""
    return grid[0] * grid[1] <= FEW


def end_phase(memory: Symmetric, phase: int, ends: Ends) -> None:
    """By a launch of its own: earlier ones have written this rank's part."""
    launch(_meet, (1, 1, 1), shared(memory), (ends.rank, ends.limit_ns), (phase, *ranks(ends), ends.waits))


def shared(memory: Symmetric) -> tuple[Tensor, Tensor, Tensor]:
    """What flags need: header, failed, peers."""
    return memory.words, memory.failed, memory.addresses_W


def ranks(ends: Ends) -> tuple[int, int]:
    """W and LANES."""
    return ends.world, power_of_2(ends.world)


def launched(early: bool) -> dict[str, bool]:
    """Options of a launch; `early`: of one that may begin before the launch before has ended, and waits by itself."""
    return {"launch_pdl": True} if early else {}


@triton.jit
def region_of(address, AT, TYPE: tl.constexpr):
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
def tell(header, peers, rank, phase: tl.constexpr, number, W: tl.constexpr, LANES: tl.constexpr):
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
    tell(header, peers, rank, phase, number, W, LANES)
    if WAITS:
        await_flags(header, failed, phase, 0, number, LIMIT_NS, W, LANES)
    if phase == SUMS:
        tl.store(header + STEP, number)


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
def await_flags(header, failed, phase: tl.constexpr, first, number, LIMIT_NS, W: tl.constexpr, LANES: tl.constexpr):
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


@triton.jit
def last_phase(header, failed, peers, rank, LIMIT_NS, W: tl.constexpr, LANES: tl.constexpr, WAITS: tl.constexpr):
    """In every program of the step's last launch: the first one sets the flags, which say that earlier launches have
    done this rank's part of the phase, and all wait for everybody's."""
    number = tl.load(header + STEP) + 1
    if tl.program_id(0) + tl.program_id(1) == 0:
        tell(header, peers, rank, SUMS, number, W, LANES)
    if WAITS:
        await_flags(header, failed, SUMS, 0, number, LIMIT_NS, W, LANES)
    tl.debug_barrier()  # every thread of the block has seen the flags
    if tl.atomic_add(header + TICKETS + SUMS, 1, sem="relaxed") == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.store(header + TICKETS + SUMS, 0)
        tl.store(header + STEP, number)  # all have read it
