"""Standard output and standard error: consoles that show text of unknown origin as text, and streams that take any."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from moe_dist.errors import OutputError
from moe_dist.messages import logs
from moe_dist.messages.printable import one_line, printable

WIDTH = 80  # of tables where neither a terminal nor COLUMNS says how wide they may be
LEVEL_OF = {"red": "error", "yellow": "warning"}  # of a line, by its colour
# Beyond, COLUMNS is a slip, or the 0 of a terminal whose size nobody has set: with that rich prints nothing, with 1 it
# takes minutes.
NARROWEST, WIDEST = 20, 1000


class Terminal(Console):
    """A rich console without markup, emoji codes and highlighting, on which control characters are seen and not obeyed:
    names, paths and messages come from files and from other programs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)
        if not NARROWEST <= self.width <= WIDEST:
            self.width = WIDTH if self.width < NARROWEST else WIDEST

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                shown = "\n".join(map(printable, segment.text.split("\n")))
                yield segment if shown == segment.text else Segment(shown, segment.style)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich itself would end the process with exit code 1


def terminal(quiet: bool = False) -> Terminal:
    """For tables on standard output."""
    console = Terminal(quiet=quiet)
    told = console.is_terminal or os.environ.get("COLUMNS", "").isdigit()
    return console if told else Terminal(width=WIDTH, quiet=quiet)


def show(console: Terminal, table: RenderableType) -> None:
    """A table whose cells are never cut: on a terminal that is too narrow for it, its lines are longer."""
    least = console.measure(table).minimum
    console.width = max(console.width, least)
    console.print(table)


def say(text: object, style: str | None = None) -> None:
    """One line on standard error. Never fails: there is nobody left to tell."""
    if logs.as_json():
        logs.write(one_line(text), LEVEL_OF.get(style or "", "info"))
        return
    with contextlib.suppress(OSError, ValueError):
        Terminal(stderr=True).print(f"moe-dist: {one_line(text)}", style=style, soft_wrap=True)


@contextlib.contextmanager
def to_standard_output() -> Iterator[None]:
    """Around what prints results. Raises OutputError where they can't be written; BrokenPipeError passes."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError("standard output", error.strerror or str(error)) from None


def take_any_text() -> None:
    """A character that the terminal's encoding lacks is replaced; it is no reason to fail. Nor is a stream that was
    closed from the start: what would go there goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (and no file that is opened later gets its number)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def closed_from_the_start(stream: TextIO) -> bool:
    """Whether `take_any_text` has put it there: standard streams that are open have names of their own."""
    return getattr(stream, "name", None) == os.devnull


def reader_is_gone() -> bool:
    """Whether standard output or standard error is a pipe that nobody reads any more."""
    return any(_nobody_reads(stream) for stream in (sys.stdout, sys.stderr))


def _nobody_reads(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # closed, or no file at all
        return False


def silence(stream: TextIO) -> None:
    """What is still buffered goes nowhere: at its exit the interpreter would fail on it, with a code of its own."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
