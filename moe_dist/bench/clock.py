"""The clock: every iteration of every rank, all ranks starting together."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from moe_dist.comm import Comm
from moe_dist.messages.notices import notice

# A replay is one launch. The device sleeps first, so that the host has queued it and the start event before the ranks
# meet: then launch latency of this measuring loop, which steps queued in a row don't have, is not counted. How long
# hosts take differs (an all-reduce alone is launched in 0.1 to 0.2 ms), so the sleep grows until all are early.
SLEEP_CYCLES = 400_000  # about 0.2 ms, to begin with
MOST_CYCLES = 64 * SLEEP_CYCLES


def time_steps(
    comm: Comm, step: Callable[[], object], iters: int, queued: bool, before: Callable[[int], object] | None = None
) -> list[float]:
    """Microseconds of each of `iters` calls of `step` on this rank. `before` is called outside of the timed span, with
    the number of the iteration that comes next, and again where that is repeated.

    On a CPU by its clock, behind a barrier. On a GPU by CUDA events, behind an all-reduce of one value that lines the
    ranks' streams up. `queued`: `step` is a graph replay, and counts only where every rank's host had launched it
    before its stream got there; else it is repeated behind a longer sleep. Otherwise the host's launches are part of
    the time.
    """
    if comm.device.type != "cuda":
        return [_on_cpu(comm, step, partial(before, number) if before else None) for number in range(iters)]
    times: list[float] = []
    cycles = SLEEP_CYCLES if queued else 0
    while len(times) < iters:
        if before is not None:
            before(len(times))
        took, late = _on_device(comm, step, cycles)
        if queued and comm.agree_max(int(late)):
            if cycles < MOST_CYCLES:
                cycles *= 2
                continue
            notice("the host launches too late to time graphs alone: some of their times hold its launches")
        times.append(took)
    return times


def _on_cpu(comm: Comm, step: Callable[[], object], before: Callable[[], object] | None) -> float:
    if before is not None:
        before()
    comm.barrier()
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e6


def _on_device(comm: Comm, step: Callable[[], object], cycles: int) -> tuple[float, bool]:
    """Microseconds of one call, and whether the stream had got to its beginning before all of it was launched."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    comm.barrier()
    if cycles:
        torch.cuda._sleep(cycles)
    comm.align()
    begin.record()
    step()
    late = begin.query()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3, late
