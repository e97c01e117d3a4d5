"""The clock: every iteration of every rank, all ranks starting together."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from moe_dist.comm import Comm

# A replay is one launch. The device sleeps this long first, so that the host has queued it and the start event before
# the ranks meet: then launch latency of this measuring loop, which steps queued in a row don't have, is not counted.
SLEEP_CYCLES = 400_000  # about 0.2 ms


def time_steps(comm: Comm, step: Callable[[], object], iters: int, queued: bool) -> list[float]:
    """Microseconds of each of `iters` calls of `step` on this rank.

    On a GPU by CUDA events, behind an all-reduce of one value that lines the ranks' streams up; on a CPU by its clock,
    behind a barrier. `queued`: `step` is a graph replay. Otherwise the host's launches are part of the time.
    """
    times = []
    cuda = comm.device.type == "cuda"
    for _ in range(iters):
        comm.barrier()
        if not cuda:
            start = time.perf_counter()
            step()
            times.append((time.perf_counter() - start) * 1e6)
            continue
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if queued:
            torch.cuda._sleep(SLEEP_CYCLES)
        comm.align()
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1e3)
    return times
