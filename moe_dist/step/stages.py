"""Where a step's time goes: exclusive times of named stages, on the CPU's clock or by CUDA events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch

STAGES = ("dispatch", "convert", "quantize", "gemm1", "activation", "gemm2", "combine")
NOTHING = nullcontext()

# What ended at each boundary (a stage, or None between stages), and the CPU's clock or a CUDA event.
Marks = list[tuple[str | None, Any]]


class Stages:
    """`with stages("gemm1"):` books the time inside, less what inner stages take. Does nothing unless switched on.

    On CUDA every boundary is an event, so nothing waits for the device until `totals_us` is read; there it also opens
    an NVTX range, which profilers show. Captured into a CUDA graph, the events become nodes of it, and each replay
    records them anew: `take` them then.
    """

    def __init__(self, on: bool = False, device: torch.device | None = None) -> None:
        self.on = on
        self._cuda = device is not None and device.type == "cuda"
        self._marks: Marks = []
        self._stack: list[str] = []

    def __call__(self, name: str) -> AbstractContextManager[None]:
        return self._stage(name) if self.on else NOTHING

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self._mark()
        self._stack.append(name)
        if self._cuda:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            self._mark()
            self._stack.pop()
            if self._cuda:
                torch.cuda.nvtx.range_pop()

    def _mark(self) -> None:
        """Close the running segment: it belongs to the innermost open stage."""
        now: Any = time.perf_counter()
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
            now.record()
        self._marks.append((self._stack[-1] if self._stack else None, now))

    def saw(self, path: Any, rows: Any) -> None:
        """Told what runs and the rows that dispatch gave this rank, where it is switched on; for whoever counts."""

    def take(self) -> Marks:
        """The boundaries since the last call."""
        marks, self._marks = self._marks, []
        return marks

    def totals_us(self) -> dict[str, float]:
        """Microseconds by stage since the last call; every stage of STAGES is there."""
        return totals_us(self.take())


def totals_us(marks: Marks) -> dict[str, float]:
    """See Stages.totals_us. Waits until the last boundary was reached."""
    if marks and hasattr(marks[-1][1], "synchronize"):
        marks[-1][1].synchronize()
    totals = dict.fromkeys(STAGES, 0.0)
    for (_, before), (name, after) in pairwise(marks):
        if name is not None:
            totals[name] = totals.get(name, 0.0) + _elapsed_us(before, after)
    return totals


def _elapsed_us(before: Any, after: Any) -> float:
    return float(before.elapsed_time(after) * 1e3 if hasattr(before, "elapsed_time") else (after - before) * 1e6)


NO_STAGES = Stages()
