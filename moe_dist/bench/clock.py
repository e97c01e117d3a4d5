"""The clock: every iteration of every rank, all ranks starting together; steps in a queue; and what the clock itself
costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from math import ceil
from statistics import median

import torch

from moe_dist.comm import Comm
from moe_dist.engine.graph import capture
from moe_dist.messages.notices import notice

# A replay is one launch. The device sleeps first, so that the host has queued it and the start event before the ranks
# meet: then launch latency of this measuring loop, which steps queued in a row don't have, is not counted. How long
# hosts take differs (an all-reduce alone is launched in 0.1 to 0.2 ms), so the sleep grows until all are early.
SLEEP_CYCLES = 400_000  # about 0.2 ms, to begin with
MOST_CYCLES = 64 * SLEEP_CYCLES

CHAINED, FEWEST_CHAINED = 32, 4  # steps in a queue
# A queue is shorter where it would take longer than this, in µs. On a CPU a step is as long as hundreds on a GPU, and
# its queue says nothing about serving: it must not make comparisons there much slower.
CHAIN_US = {"cuda": 2e6, "cpu": 3e4}
EMPTY_STEPS = 20


def time_steps(
    comm: Comm,
    step: Callable[[], object],
    iters: int,
    queued: bool,
    before: Callable[[int], object] | None = None,
    calls: int = 1,
) -> list[float]:
    """Microseconds of each of `iters` times `calls` calls of `step` on this rank. `before` is called outside of the
    timed span, with the number of the iteration that comes next, and again where that is repeated.

    On a CPU by its clock, behind a barrier. On a GPU by CUDA events, behind an all-reduce of one value that lines the
    ranks' streams up. `queued`: `step` is a graph replay, and counts only where every rank's host had launched it
    before its stream got there; else it is repeated behind a longer sleep. Otherwise the host's launches are part of
    the time.
    """
    if comm.device.type != "cuda":
        return [_on_cpu(comm, step, partial(before, number) if before else None, calls) for number in range(iters)]
    times: list[float] = []
    cycles = SLEEP_CYCLES if queued else 0
    while len(times) < iters:
        if before is not None:
            before(len(times))
        took, late = _on_device(comm, step, cycles, calls)
        if queued and comm.agree_max(int(late)):
            if cycles < MOST_CYCLES:
                cycles *= 2
                continue
            what = "some times of theirs" if calls == 1 else "some chained_us"
            notice(f"the host launches graphs later than a GPU wants them: {what} hold its launches")
        times.append(took)
    return times


def chain_length(comm: Comm, step_us: float) -> int:
    """How many steps a queue has, the same on all ranks: CHAINED, or as many as CHAIN_US allows for steps as long as
    the slowest rank's `step_us`, but FEWEST_CHAINED at least. Collective."""
    slowest = max(comm.agree_max(ceil(step_us)), 1)
    return max(FEWEST_CHAINED, min(CHAINED, int(CHAIN_US[comm.device.type] / slowest)))


def time_chain(comm: Comm, step: Callable[[], object], steps: int, queued: bool) -> float:
    """Microseconds a step on this rank, of `steps` that are launched one behind another, none waiting for the end of
    the one before; by the clock of `time_steps`, which is around all of them. Collective."""
    (whole,) = time_steps(comm, step, 1, queued, calls=steps)
    return whole / steps


def time_nothing(comm: Comm, queued: bool) -> float:
    """Microseconds that the clock finds for a step that does nothing on this rank, median of EMPTY_STEPS: what it adds
    to each time. `queued`: for the replay of a graph, of one kernel that sets one number, since an empty graph is none.
    Collective."""
    if not queued:
        return median(time_steps(comm, lambda: None, EMPTY_STEPS, queued))
    number = torch.zeros(1, dtype=torch.float32, device=comm.device)
    graph, _ = capture(number.zero_, number.zero_)
    return median(time_steps(comm, graph.replay, EMPTY_STEPS, queued))


def _on_cpu(comm: Comm, step: Callable[[], object], before: Callable[[], object] | None, calls: int) -> float:
    if before is not None:
        before()
    comm.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) * 1e6


def _on_device(comm: Comm, step: Callable[[], object], cycles: int, calls: int) -> tuple[float, bool]:
    """Microseconds of the calls, and whether the stream had got to the first one before it was launched, or had nothing
    left to do before a later one was."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    comm.barrier()
    if cycles:
        torch.cuda._sleep(cycles)
    comm.align()
    begin.record()
    step()
    late = begin.query()
    for _ in range(calls - 1):
        late = torch.cuda.current_stream().query() or late
        step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3, late
