"""Progress on standard error: a live line where a person looks, plain lines every few seconds where a log does."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY_S = 5.0


class Reporter:
    """`shown(text)` says what is going on, `step()` that one of `total` is done. `remaining`: also about how much time
    is left, for steps that are much alike."""

    def __init__(self, total: int, quiet: bool = False, remaining: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._live: Progress | None = None
        if self._console.is_terminal:
            times = (TimeElapsedColumn(), *[TimeRemainingColumn()] * remaining)
            columns = (BarColumn(), MofNCompleteColumn(), *times, TextColumn("{task.description}"))
            self._live = Progress(*columns, console=self._console, transient=True)
            self._task = self._live.add_task("", total=total)
        self._total, self._done, self._last = total, 0, 0.0
        self._start, self._remaining = time.monotonic(), remaining

    def __enter__(self) -> Reporter:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def shown(self, text: str) -> None:
        if self._live:
            self._live.update(self._task, description=text)
        elif time.monotonic() - self._last > EVERY_S:
            self._last = time.monotonic()
            line = f"[{self._done}/{self._total}] {text}{self._left()}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def said(self, text: str) -> None:
        """A line that stays."""
        self._console.print(f"moe-dist: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def _left(self) -> str:
        if not self._remaining or not self._done:
            return ""
        seconds = (time.monotonic() - self._start) / self._done * (self._total - self._done)
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"

    def step(self) -> None:
        self._done += 1
        if self._live:
            self._live.advance(self._task)
