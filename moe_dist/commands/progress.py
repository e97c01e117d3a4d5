"""Progress on standard error: a live line where a person looks, plain lines every few seconds where a log does."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moe_dist.commands.terminal import LEVEL_OF, Terminal
from moe_dist.messages import logs
from moe_dist.messages.printable import one_line

EVERY_S = 5.0


class Reporter:
    """`shown(text)` says what is going on, `step()` that one of `total` is done. `remaining`: also about how much time
    is left, for steps that are much alike; of others `step` is told."""

    def __init__(self, total: int, quiet: bool = False, remaining: bool = False) -> None:
        self._console = Terminal(stderr=True, quiet=quiet)
        self._live: Progress | None = None
        if self._console.is_terminal and not logs.as_json():
            times = (TimeElapsedColumn(), *[TimeRemainingColumn()] * remaining)
            columns = (BarColumn(), MofNCompleteColumn(), *times, TextColumn("{task.description}", markup=False))
            self._live = Progress(*columns, console=self._console, transient=True)
            self._task = self._live.add_task("", total=total)
        self._total, self._done, self._last = total, 0, 0.0
        self._start, self._remaining = time.monotonic(), remaining
        self._end: float | None = None

    def __enter__(self) -> Reporter:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def shown(self, text: str) -> None:
        if self._live:
            self._live.update(self._task, description=one_line(text) + (self._left() if self._end else ""))
        elif time.monotonic() - self._last > EVERY_S:
            self._last = time.monotonic()
            self._print(f"[{self._done}/{self._total}] {one_line(text)}{self._left()}")

    def said(self, text: str) -> None:
        """A line that stays."""
        self._print(one_line(text) if logs.as_json() else f"moe-dist: {one_line(text)}", "yellow")

    def _print(self, line: str, style: str | None = None) -> None:
        if logs.as_json():
            if not self._console.quiet:
                logs.write(line, LEVEL_OF.get(style or "", "info"))
            return
        try:
            self._console.print(line, style=style, soft_wrap=True)
        except BrokenPipeError:
            raise
        except OSError:  # a log on a full disk is no reason to stop
            self._console.quiet = True

    def _left(self) -> str:
        if self._end is not None:
            seconds = self._end - time.monotonic()
        elif self._remaining and self._done:
            seconds = (time.monotonic() - self._start) / self._done * (self._total - self._done)
        else:
            return ""
        if seconds < 1:  # or later than was thought
            return ""
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"

    def step(self, left: int | None = None, seconds: float | None = None) -> None:
        """`left`: how many are left, where that may be another number than before less one; `seconds`: how long they
        will take about."""
        self._done += 1
        if left is not None:
            self._total = self._done + left
        if seconds is not None:
            self._end = time.monotonic() + seconds
        if self._live:
            self._live.update(self._task, completed=self._done, total=self._total)
