"""What a rank is doing, in memory that other processes of its machine can read at any time: while it is busy, stopped
or dead. A killed process sends no last message, and a heartbeat once a second is older than the failure."""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import signal
import struct
import sys
import threading
import time
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

# sequence; times of the last sign of life, of the status, of the last note; the status's limit in seconds; op, status,
# where the working thread was at the last sign of life
_LAYOUT = struct.Struct("=qdddd32s160s96s")
_TIMES, _OP, _STATUS, _WHERE = slice(8, 40), slice(40, 72), slice(72, 232), slice(232, 328)
# Code that waits for others: a rank that is there is in a collective indeed.
_COLLECTIVES = (str(Path(__file__).parent.parent / "comm"), os.path.join("torch", "distributed"))

STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
RUN = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")  # one run of torchrun


@dataclass(frozen=True)
class Sight:
    """One rank as others see it. `op`: the collective it is in, or "". `finished`: its function has returned.
    `stopped`: its process is; `traced`: by a debugger. `ended`: how its process ended. `silent_s`: seconds since it
    gave a sign of life. `noted_s`: seconds since a collective of its began or ended, or since its status, whichever
    came last; `limit_s`: how many its status allows, 0 where it sets no limit. `fresh`: it gave a sign of life since
    then, and `where` is the line of Python that it was at, "" inside of a collective."""

    rank: int
    doing: str
    op: str
    sequence: int
    silent_s: float = 0.0
    doing_s: float = 0.0
    finished: bool = False
    stopped: bool = False
    traced: bool = False
    ended: str | None = None
    noted_s: float = 0.0
    limit_s: float = 0.0
    fresh: bool = False
    where: str = ""


class Pulse:
    """A rank's own record. Lives in anonymous memory: nothing is left on disk, whatever ends the process."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("moe-dist-pulse") if hasattr(os, "memfd_create") else -1
        if self.fd >= 0:
            os.ftruncate(self.fd, _LAYOUT.size)
        memory = memoryview(mmap.mmap(self.fd, _LAYOUT.size))  # -1: memory of this process alone
        # Words and texts are stored whole: struct.pack_into would write zeros first, which others may read.
        self._sequence, self._times = memory[: _TIMES.start].cast("q"), memory[_TIMES].cast("d")
        self._op, self._status, self._where = memory[_OP], memory[_STATUS], memory[_WHERE]
        self._thread = threading.get_ident()
        self.beat()
        self.status("starting")

    def note(self, op: str, sequence: int) -> None:
        """As Comm.noted: called at both ends of each collective, so it takes no more than a microsecond or two."""
        self._sequence[0] = sequence
        self._times[2] = time.monotonic()
        self._op[:] = _padded(op, 32)

    @property
    def op(self) -> str:
        """The collective that this rank is in, or ""."""
        return bytes(self._op).rstrip(b"\0").decode(errors="replace")

    def status(self, text: str, limit_s: float = 0.0) -> None:
        """`limit_s`: the most seconds from one collective to the next, and in one, while this status lasts; 0: none."""
        self._thread = threading.get_ident()  # the one that works: whoever says what it does
        self._times[3] = 0.0  # the old limit must not meet the new status, nor the new limit the old time
        self._times[1] = self._times[2] = time.monotonic()
        self._times[3] = limit_s
        self._status[:] = _padded(text, 160)

    def beat(self) -> None:
        """A sign of life, by another thread than the one that works."""
        self._where[:] = _padded(_where(self._thread), 96)
        self._times[0] = time.monotonic()


class Peer:
    """Another process's record, and that process's end. Raises OSError where it lies on another machine."""

    def __init__(self, rank: int, pid: int, fd: int) -> None:
        self.rank, self.pid = rank, pid
        with open(f"/proc/{pid}/fd/{fd}", "rb") as record:
            self._memory = mmap.mmap(record.fileno(), _LAYOUT.size, prot=mmap.PROT_READ)
        self._pidfd = os.pidfd_open(pid)

    def sight(self, finished: bool = False) -> Sight:
        sequence, beat, since, noted, limit_s, op, status, where = _LAYOUT.unpack(self._memory[:])
        now = time.monotonic()  # one clock for all processes of a machine
        doing, running, place = (text.rstrip(b"\0").decode(errors="replace") for text in (status, op, where))
        ended = self.ended()
        state = _state(self.pid) if ended is None else ""
        return Sight(
            self.rank, doing, running, sequence, max(0.0, now - beat), max(0.0, now - since), finished,
            stopped=state in STOPPED, traced=state == psutil.STATUS_TRACING_STOP, ended=ended,
            noted_s=max(0.0, now - noted), limit_s=limit_s, fresh=beat > noted, where=place if beat > noted else "",
        )  # fmt: skip

    def ended(self) -> str | None:
        """How its process ended, None while it lives."""
        code = self._code()
        if code is None and psutil.pid_exists(self.pid):
            return None
        code = self._code() if code is None else code  # it may have ended between the two questions
        return "its process died" if code is None else describe_end(code)

    def _code(self) -> int | None:
        """Of a process that has ended, as far as the kernel still knows it."""
        code = _exit_code(self._pidfd)
        return _zombie_code(self.pid) if code is None else code

    def gone(self, within_s: float) -> bool:
        """Whether its process ends within so long."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(max(0.0, within_s) * 1e3))

    def kill(self) -> None:
        """End its process at once, also a stopped one. The descriptor can't mean another that has its number now."""
        with suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        self._memory.close()
        os.close(self._pidfd)


def ranks_here() -> dict[int, list[int]]:
    """The living processes of this machine that work for each rank of this run of torchrun, by the environment that
    they were started with: the rank's own, and what it has started."""
    found: dict[int, list[int]] = {}
    environments: dict[int, dict[str, str]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # ended, or somebody else's
            environments[process.pid] = process.environ()
    own = environments.get(os.getpid(), {})
    for pid, its in environments.items():
        if all(its.get(name) == own.get(name) for name in RUN) and its.get("RANK", "").isdecimal():
            found.setdefault(int(its["RANK"]), []).append(pid)
    return found


def stopped(pid: int) -> bool:
    return _state(pid) in STOPPED


def _state(pid: int) -> str:
    try:
        return psutil.Process(pid).status()
    except psutil.Error:
        return ""


def siblings_ended_by(signals: Container[int]) -> bool:
    """Whether a process that this one's parent has started, and not waited for yet, was ended by one of these."""
    for pid in psutil.pids():
        fields = _stat(pid)
        if fields and fields[0] == "Z" and int(fields[1]) == os.getppid() and int(fields[-1]) & 0x7F in signals:
            return True
    return False


def _where(thread: int) -> str:
    """File, line and function that this thread is at; "" where it is in a collective, has ended, or asks itself: a
    frame in a variable of its own would keep all that it holds until garbage is collected."""
    if thread == threading.get_ident():
        return ""
    frame = sys._current_frames().get(thread)
    if frame is None or any(part in frame.f_code.co_filename for part in _COLLECTIVES):
        return ""
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def _padded(text: str, size: int) -> bytes:
    return text.encode(errors="replace")[:size].ljust(size, b"\0")


def describe_end(code: int) -> str:
    """A wait status in words, with what usually sends SIGKILL."""
    if not os.WIFSIGNALED(code):
        return f"its process died with exit code {os.waitstatus_to_exitcode(code)}"
    number = os.WTERMSIG(code)
    name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
    hint = "; where nobody sent it, the kernel did, because memory ran out" if number == signal.SIGKILL else ""
    return f"its process died of {name}{hint}"


def _exit_code(pidfd: int) -> int | None:
    """PIDFD_GET_INFO with PIDFD_INFO_EXIT: struct pidfd_info of linux/pidfd.h."""
    info = struct.Struct("<QQ11Ii")
    wanted, request = 1 << 3, (3 << 30) | (info.size << 16) | (0xFF << 8) | 11
    buffer = bytearray(info.pack(wanted, 0, *[0] * 11, 0))
    try:
        fcntl.ioctl(pidfd, request, buffer)
    except OSError:  # an older kernel, or nothing left to tell
        return None
    found = info.unpack(buffer)
    return found[-1] if found[0] & wanted else None


def _stat(pid: int) -> list[str]:
    """The fields from the state on. psutil gives all of them but the last, a zombie's exit code."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()
    except OSError:
        return []


def _zombie_code(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[-1]) if fields and fields[0] == "Z" else None
