"""Progress on standard error: a live line where a person looks, plain lines every few seconds where a log does."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

EVERY_S = 5.0


class Reporter:
    """`shown(text)` says what is going on, `step()` that one of `total` is done."""

    def __init__(self, total: int, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._live: Progress | None = None
        if self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            self._live = Progress(*columns, console=self._console, transient=True)
            self._task = self._live.add_task("", total=total)
        self._total, self._done, self._last = total, 0, 0.0

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
            self._console.print(f"[{self._done}/{self._total}] {text}", highlight=False, markup=False, soft_wrap=True)

    def step(self) -> None:
        self._done += 1
        if self._live:
            self._live.advance(self._task)
