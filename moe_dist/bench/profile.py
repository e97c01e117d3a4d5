"""A trace of a few steps by torch.profiler, one file a rank, which Perfetto and chrome://tracing show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from moe_dist.bench.case import Case
from moe_dist.bench.output import said
from moe_dist.bench.prepared import Prepared, routed
from moe_dist.errors import OutputError
from moe_dist.runtime.context import RankContext
from moe_dist.step import Stages

SUFFIX = ".trace.json.gz"


class Ranges(Stages):
    """Stages as ranges of torch.profiler and, on a GPU, of NVTX. It is no clock: it has no totals."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(True, device)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        with record_function(name), self._nvtx(name):
            yield

    @contextmanager
    def _nvtx(self, name: str) -> Iterator[None]:
        if not self._cuda:
            yield
            return
        with torch.cuda.nvtx.range(name):
            yield


def trace_file(case: Case, rank: int) -> Path:
    """Where this rank's trace of a profiled case is."""
    assert case.profile is not None
    return Path(case.profile.folder) / f"{case.profile.name}-rank{rank}{SUFFIX}"


def profile_steps(context: RankContext, case: Case, step: Prepared) -> None:
    """Run the steps that `case.profile` asks for, and one before them, under the profiler; collective. Each step is a
    range ProfilerStep#N, and its stages are ranges in it, but for a graph, which is replayed. Raises OutputError where
    the trace can't be written or is there already."""
    if case.profile is None:
        return
    context.progress(f"{case.label}: profiling")
    path, cuda = trace_file(case, context.rank), context.device.type == "cuda"
    ranges = Ranges(context.device)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    with profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=case.profile.steps)) as traced:
        for number in range(1 + case.profile.steps):
            step.take(number % len(step.steps))
            _run(step, ranges)
            if cuda:  # what still runs when the profiler stops is not in its trace
                torch.cuda.synchronize()
            if number < case.profile.steps:
                traced.step()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)
        traced.export_chrome_trace(str(path))
    except OSError as error:
        raise OutputError(path, said(error)) from None


def _run(step: Prepared, ranges: Ranges) -> None:
    if step.graph is not None:
        step.call()
        return
    step.module(step.x, routed(step.module, step.routings), max_tokens_per_rank=step.bucket, stages=ranges)
