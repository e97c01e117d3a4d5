"""SIGINT, SIGTERM and SIGHUP: an exception in the main thread, and an end in bounded time wherever that thread is."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from moe_dist.exits.exit_codes import HUNG_UP, INTERRUPTED, TERMINATED
from moe_dist.exits.interrupted import Interrupted

CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED, signal.SIGHUP: HUNG_UP}
ENDING = tuple(CODES)
PATIENCE_S = 15.0  # for ranks to be freed and results to be written after a signal
HURRY_S = 4.0  # where another rank has died: what waits for it will not end by itself, and it is promised in 5
START_S = 2.0  # where nothing but the start of a cluster runs: there are no ranks to free
LOOK_AGAIN_S = 0.2  # at what is under way, once a signal has come
AGAIN_S = 1.0  # a second signal after so long means now; torchrun passes one on at once that all ranks got already

_running: Signals | None = None  # of the command that runs
_starting: Callable[[], None] | None = None  # what ends a start that is under way
_heard: int | None = None  # the first signal of the command that runs, or ran last
_final: int | None = None  # the exit code that this process is ending with


def code_after_signal() -> int | None:
    """The exit code of a process that is ending because a signal came; None of any other."""
    return None if _heard is None else _final


def check() -> None:
    """Raise again where a signal of the command that runs has come and its exception got lost, as in code of others."""
    if _running is not None:
        _running.check()


def came() -> bool:
    """Whether one has come that ends the command that runs."""
    return _running is not None and _running.signum is not None


@contextmanager
def starting(end: Callable[[], None]) -> Iterator[None]:
    """Around the start of something in C++, which Python's handlers wait for: inside, a signal ends the process after
    START_S, and `end` is called before, from another thread. The signal is looked for again behind it."""
    global _starting
    _starting = end
    try:
        yield
    finally:
        _starting = None
    check()


class Signals:
    """A context manager. The first signal raises a KeyboardInterrupt in the main thread, whichever it was: that is the
    one exception that comes through a wait inside of Ray. `signum` says which.

    A thread hears of the signal too, through the wakeup descriptor: the C handler writes to it, whatever the main
    thread does and whoever replaced the Python handler. Where the main thread is stuck in C++ or a second signal comes,
    it calls `last_words` and ends the process with the exit code that those return. It calls `heard` at once after the
    first signal, which returns whether there is nothing to be patient for; `was_heard` is set then. Nor is there while
    a cluster starts (`starting`).
    """

    def __init__(self, heard: Callable[[], bool], last_words: Callable[[], int]) -> None:
        self.signum: int | None = None
        self.was_heard = threading.Event()
        self._heard, self._last_words = heard, last_words
        self._raised = False
        self._held: set[int | signal.Signals] | None = None
        self._before: dict[int, object] = {}
        self._pipe: tuple[int, int] | None = None

    @property
    def code(self) -> int:
        return next((code for number, code in CODES.items() if number == self.signum), INTERRUPTED)

    def __enter__(self) -> Signals:
        global _heard, _running
        _heard = None
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may set handlers
        self._before = {number: signal.getsignal(number) for number in ENDING}
        self.install()
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._pipe = read, write
        self._wakeup_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        os.register_at_fork(before=self._hold, after_in_parent=self._release, after_in_child=self._forget)
        self._watcher = threading.Thread(target=self._watch, args=(read,), daemon=True, name="signals")
        self._watcher.start()
        _running = self
        return self

    def install(self) -> None:
        """Again after `ray.init`, which sets a handler of its own. A signal that was ignored when the process started
        (nohup) stays so."""
        for number in ENDING:
            if number in self._before and self._before[number] != signal.SIG_IGN:
                signal.signal(number, self._raise)

    def __exit__(self, *_: object) -> None:
        global _running
        if self._pipe is None:
            return
        _running = None
        read, write = self._pipe
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.write(write, b"\0")
        self._watcher.join()
        os.close(read)
        os.close(write)
        self._pipe = None

    def check(self) -> None:
        """Raise again where the exception got lost: in a callback from C++, or in a destructor."""
        if self.signum is not None:
            self._raised = True
            raise Interrupted

    def end_at_once_from_now_on(self, code: int) -> None:
        """While the interpreter shuts down: the command has its exit code already."""
        global _final
        _final = code
        for number in self._before:
            if self._before[number] != signal.SIG_IGN:
                self._before[number] = lambda *_: os._exit(code)

    def _raise(self, number: int, _: FrameType | None) -> None:
        self._hear(number)
        if not self._raised:  # once: what is under way then ends the command, and is not to be disturbed
            self._raised = True
            raise Interrupted

    def _hear(self, number: int) -> None:
        global _heard
        self.signum = _heard = self.signum or number

    def _watch(self, read: int) -> None:
        first, hurry = None, False
        while True:
            ready, _, _ = select.select([read], [], [], None if first is None else LOOK_AGAIN_S)
            number = os.read(read, 1)[0] if ready else None
            if number == 0:
                return
            end, waited_s = _starting, 0.0 if first is None else time.monotonic() - first
            patience_s = START_S if end else HURRY_S if hurry else PATIENCE_S
            if waited_s > patience_s or (number in ENDING and waited_s > AGAIN_S):
                code = self.code
                if end is not None:
                    with suppress(Exception):
                        end()
                try:
                    code = self._last_words()
                finally:
                    os._exit(code)
            if first is None and number in ENDING:
                first = time.monotonic()
                self._hear(number)
                try:
                    hurry = self._heard()
                finally:
                    self.was_heard.set()

    def _hold(self) -> None:
        """A forked child has handlers and pipe of its parent until it forgets them, and its signals are its own."""
        if self._pipe is not None:
            self._held = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)

    def _release(self) -> None:
        if self._held is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._held)
            self._held = None

    def _forget(self) -> None:
        if self._pipe is not None:
            if threading.current_thread() is threading.main_thread():  # of the child: the thread that forked it
                signal.set_wakeup_fd(-1)
                for number, handler in self._before.items():
                    if handler != signal.SIG_IGN:  # what is started under nohup outlives its terminal as a whole
                        signal.signal(number, signal.SIG_DFL)
            self._pipe = None
        self._release()
