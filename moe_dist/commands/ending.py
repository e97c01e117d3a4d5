"""How the command ends: each way out has its exit code and one line on standard error."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe_dist.commands.terminal import reader_is_gone, say, silence, take_any_text
from moe_dist.errors import MoeDistError, RankFailure
from moe_dist.exits.exit_codes import (
    BROKEN_PIPE,
    CLUSTER_LOST,
    HUNG_UP,
    INTERRUPTED,
    NOT_WRITTEN,
    TERMINATED,
    TOO_SMALL,
    UNEXPECTED,
    code_of,
)
from moe_dist.exits.signals import Signals

LAST_WORDS_S = 10.0
TELLING_S = 1.0  # that the thread which ends a process waits for another one's last words
LOOK_S = 2.0  # that it may take to see who has died
WORDS = {TERMINATED: "terminated", HUNG_UP: "hung up", INTERRUPTED: "interrupted"}


class Ending:
    """What must be known to end well, whatever happens. `kept` says what was measured so far and where it is; `results`
    is what was measured, where no file keeps it. Under torchrun every rank runs the command, and only the one that
    `speaks` says anything and leaves its exit code (`leave_code`, which returns what went wrong). torchrun sends
    SIGTERM to all ranks when one has died: then it is the death that is to be told, which `death` knows."""

    def __init__(
        self,
        speaks: Callable[[], bool],
        leave_code: Callable[[int], str],
        death: Callable[[], RankFailure | None] = lambda: None,
    ) -> None:
        self.speaks, self.leave_code, self.as_json = speaks, leave_code, False
        self._death_of = death
        self._death: RankFailure | None = None
        self._telling = threading.Lock()  # the main thread and the one that hears of signals may come to it at once
        self._code: int | None = None  # once it was told
        self.kept = ""
        self.results: dict[str, Any] | None = None
        self.signals = Signals(self._look, self._last_words)

    def code_of(self, command: Callable[[], int], last: bool) -> int:
        """Run it and return its exit code. `last`: nothing else runs in this process afterwards."""
        take_any_text()
        with self.signals:
            code = self._guarded(command)
            if problem := self.leave_code(code):
                say(problem, "red")
            if last:
                self._leave(code)
        return code

    def _guarded(self, command: Callable[[], int]) -> int:
        try:
            try:
                code = command()
            except BaseException as error:
                with self._telling:
                    code = self._code = self._told(error)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            code = BROKEN_PIPE
        except KeyboardInterrupt:  # one that comes after the end was told changes nothing about it
            code = self.signals.code if self._code is None else self._code
        except OSError as error:  # of standard output
            say(f"standard output can't be written: {error.strerror or error}", "red")
            code = NOT_WRITTEN
        silence(sys.stdout)
        return code

    def _leave(self, code: int) -> None:
        self.signals.end_at_once_from_now_on(code)
        if code == CLUSTER_LOST:  # Ray's own clean-up would ask a cluster that is gone, for a minute
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _told(self, error: BaseException) -> int:
        """Say in one line how it ended, and return the exit code."""
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            raise error
        if isinstance(error, SystemExit):  # of a handler that Ray has set; the thread that hears of signals is as quick
            time.sleep(0.1)
        died = isinstance(error, RankFailure) and getattr(error, "own", False)
        if (self.signals.signum is not None and not died) or isinstance(error, KeyboardInterrupt):
            return self._interrupted(error)
        if isinstance(error, MoeDistError):
            self._report(type(error).__name__, str(error))
            return code_of(error)
        if isinstance(error, MemoryError):
            self._report("MemoryError", f"not enough memory: {error}".rstrip(": "))
            return TOO_SMALL
        path = _traceback_file(error) if self.speaks() else None
        said = f"an unexpected error, a fault of moe_dist: {type(error).__name__}: {error}"
        where = f"its traceback is in {path}; please report it with that file" if path else "please report it"
        self._report(type(error).__name__, f"{said}; {where}")
        if self.speaks() and path is None:
            traceback.print_exception(error)
        return UNEXPECTED

    def _report(self, name: str, message: str) -> None:
        if not self.speaks():
            time.sleep(LAST_WORDS_S)  # torchrun ends all ranks as soon as one ends: the first must have spoken by then
            return
        self._print_json(name, message)
        say(message + (f"; {self.kept}" if self.kept else ""), "red")

    def _print_json(self, name: str, message: str) -> None:
        if self.as_json:
            document: dict[str, Any] = {"error": name, "message": message}
            if self.kept:
                document |= {"kept": self.kept} | ({"results": self.results} if self.results else {})
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(document, allow_nan=False), flush=True)

    def _look(self) -> bool:
        """As soon as SIGTERM comes: later, ranks that it has ended would pass for dead. True if one is."""
        if self.signals.signum == signal.SIGTERM:
            self._death = self._death_of()
        return self._death is not None

    def _interrupted(self, error: BaseException | None = None) -> int:
        """Say what a signal means, and return the exit code. `error`: what ended the command when it came, or the
        signal's own exception, raised while the command was ending of another. Of a rank that has died that one knows
        more than that its process is gone."""
        if self.signals.signum is not None:
            self.signals.was_heard.wait(LOOK_S)
        if self._death is not None:
            rank = self._death.rank
            known = (cause for cause in _chain(error) if isinstance(cause, RankFailure) and cause.rank == rank)
            told = next(known, self._death)
            if self.speaks():
                self._report(type(told).__name__, str(told))
            return code_of(self._death)
        if self.speaks():
            word = WORDS[self.signals.code]
            with contextlib.suppress(OSError):
                self._print_json(word, self.kept or word)
            say(word + (f": {self.kept}" if self.kept else ""))
        return self.signals.code

    def _last_words(self) -> int:
        if self._telling.acquire(timeout=TELLING_S):
            code = self._interrupted() if self._code is None else self._code  # never released: the process ends
        else:
            code = self.signals.code if self._death is None else code_of(self._death)
        self.leave_code(code)
        return code


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and those that it was raised in the course of, the last first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _traceback_file(error: BaseException) -> Path | None:
    """In a folder that only this user can read: messages may hold paths and values."""
    try:
        path = Path(tempfile.mkdtemp(prefix="moe-dist-")) / "traceback.txt"
        path.write_text("".join(traceback.format_exception(error)), errors="backslashreplace")
        return path
    except OSError:
        return None
