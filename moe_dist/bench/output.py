"""Where `--out` keeps results: a file that is replaced whole, or a device, a pipe or a descriptor that is written
through at the end."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import select
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from moe_dist.bench.devices import STANDARD, descriptor_of, open_device
from moe_dist.bench.guards import claimed, make_folder, older_results, refuse_inputs
from moe_dist.errors import ConfigError, OutputError
from moe_dist.messages.counts import count_of, verb

Say = Callable[[str], None]
Document = dict[str, Any]

STALL_S = 30.0  # that a reader may take nothing
REFUSED = "a file, a link to one, a pipe, a terminal or /dev/null"


class Output(ABC):
    """`rows` are in the file by now. What could not be written is in `problem`, said once, and measuring goes on: the
    next row tries again."""

    def __init__(self, path: Path, say: Say) -> None:
        self.path, self.rows = path, 0
        self._entries = 0
        self.claim: Any = None  # what keeps other commands away, until it is closed or gone
        self.problem: OutputError | None = None
        self._say = say

    def update(self, document: Document) -> None:
        """After each row."""
        return

    def close(self, document: Document) -> None:
        """At the end, whatever the end was."""
        if self.problem or _entries(document) > self._entries:
            self._keep(document)
        self.release()

    def holds(self, document: Document) -> None:
        """What is there from an earlier run."""
        self.rows, self._entries = len(document["rows"]), _entries(document)

    def release(self) -> None:
        """Another command may write there. Nothing more is written; may be called twice."""
        if self.claim is not None:
            self.claim.close()

    @property
    def on_standard_output(self) -> bool:
        """Whether the results are what standard output gets."""
        return False

    @property
    def kept(self) -> str:
        """How much is where, for the line that says how a command ended."""
        return rows_in(self.rows, f"in {self.path}")

    @abstractmethod
    def write(self, text: str) -> None:
        """Instead of what is there. Raises OSError."""

    @abstractmethod
    def append(self, text: str) -> None:
        """Behind what is there, at once. Raises OSError."""

    def _keep(self, document: Document) -> None:
        try:
            self.write(json.dumps(document, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            if self.problem is None:
                self._say(f"{self.path} can't be written: {said(error)}; measuring goes on")
            self.problem = OutputError(self.path, f"{said(error)} ({self.kept})")
        else:
            self.holds(document)
            self.problem = None


class File(Output):
    """A regular file, replaced whole after each row: a reader never sees half of it, and what was complete stays until
    more is. A link is followed; mode and owner of a file that is there stay. `in_place`: one with several names, which
    must stay one file, is written over, and only when a copy has shown that there is room. What somebody else has put
    there meanwhile is left alone."""

    def __init__(self, path: Path, say: Say, in_place: bool = False) -> None:
        super().__init__(path, say)
        self.target, self._in_place = Path(os.path.realpath(path)), in_place
        self._state = _state(self.target)

    def update(self, document: Document) -> None:
        self._keep(document)

    def write(self, text: str) -> None:
        with self.partial() as (partial, descriptor):
            with open(descriptor, "w", encoding="utf-8") as file:  # a page says that it is; the locale may be another's
                file.write(text)
                file.flush()
                os.fsync(descriptor)  # a full disk or quota shows here at the latest
            if _state(self.target) not in (self._state, None):
                self.rows = self._entries = 0
                raise _changed()
            try:
                self._put(partial, text)
            finally:
                self._state = _state(self.target)

    def append(self, text: str) -> None:
        """In one write, which the end of this process can't cut; what a full disk has cut is taken back."""
        if _state(self.target) != self._state:
            raise _changed()
        descriptor = os.open(self.target, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            before, data = os.fstat(descriptor).st_size, text.encode()
            if os.write(descriptor, data) < len(data):
                os.ftruncate(descriptor, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
            self._state = _state(self.target)

    def _put(self, partial: Path, text: str) -> None:
        if not self._in_place:
            try:
                os.replace(partial, self.target)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                self._in_place = True  # a mount point of its own, as containers have them
        if self._in_place:
            self.target.write_text(text, encoding="utf-8")

    @contextlib.contextmanager
    def partial(self) -> Iterator[tuple[Path, int]]:
        """A new file beside the target that nobody else has, and that is gone at the end."""
        partial = self.target.parent / f".moe-dist-{os.getpid()}-{secrets.token_hex(4)}.partial"
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with contextlib.suppress(FileNotFoundError):
                old = os.stat(self.target)
                with contextlib.suppress(OSError):
                    os.fchown(descriptor, old.st_uid, old.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
            yield partial, descriptor
        finally:
            with contextlib.suppress(OSError):  # written and closed already
                os.close(descriptor)
            partial.unlink(missing_ok=True)


class Through(Output):
    """What is no regular file is never replaced: text goes through an open descriptor, a document as a whole, once."""

    def __init__(self, path: Path, say: Say, descriptor: int) -> None:
        super().__init__(path, say)
        self._descriptor = descriptor
        self._standard = _same_file(descriptor, STANDARD["stdout"])

    @property
    def on_standard_output(self) -> bool:
        return self._standard

    def write(self, text: str) -> None:
        try:
            self.append(text)
        finally:
            self.release()

    def append(self, text: str) -> None:
        left = memoryview(text.encode())
        regular = stat.S_ISREG(os.fstat(self._descriptor).st_mode)
        most = len(left) if regular else select.PIPE_BUF  # so much never waits
        while left:
            _, ready, _ = select.select([], [self._descriptor], [], STALL_S)
            if not ready:
                raise OSError(errno.ETIMEDOUT, f"its reader took nothing for {STALL_S:.0f} s")
            with contextlib.suppress(BlockingIOError):
                left = left[os.write(self._descriptor, left[:most]) :]

    def release(self) -> None:
        super().release()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _entries(document: Document) -> int:
    """Cases whose measuring has come to something."""
    return len(document["rows"]) + len(document.get("failed", ()))


def _changed() -> OSError:
    return OSError(errno.EBUSY, "something else has written to it since")


def rows_in(rows: int, place: str) -> str:
    return f"{count_of(rows, 'row') if rows else 'no row'} {verb(max(rows, 1), 'are')} {place}"


def _state(path: Path) -> tuple[int, int] | None:
    """By which a file that was written to is known. None: there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _same_file(one: int, other: int) -> bool:
    try:
        return os.path.sameopenfile(one, other)
    except OSError:  # one of them is closed
        return False


def said(error: OSError) -> str:
    return error.strerror or str(error)


def open_output(
    path: Path | str,
    say: Say,
    given: Container[int] | None = None,
    reads: Iterable[Path | str] = (),
    field: str = "out",
    resumed: bool = False,
    older: Callable[[Path], str] | None = None,
) -> Output:
    """Before anything is measured: results that can't be kept are minutes lost. Makes missing folders, and says which
    older results will be overwritten; a file that holds anything else stays. `given`: the descriptors that may be
    written to, where not all may. `reads`: files and folders that the command reads. `field`: what names `path` in
    errors. `resumed`: older results are to be kept. `older`: says what a file holds that is there already, and raises
    ConfigError for one that must stay; None: only results may be overwritten. Raises ConfigError."""
    folder, path = os.fspath(path).endswith("/"), Path(path)
    try:
        if folder:
            raise OSError(errno.EISDIR, "it ends with /, as a folder's name does")
        refuse_inputs(path, reads, field)
        descriptor = descriptor_of(path)
        if descriptor is not None:
            if given is not None and descriptor not in given:
                raise OSError(errno.EBADF, "no such descriptor was given to this process")
            return Through(path, say, os.dup(descriptor))
        target = Path(os.path.realpath(path))
        for parent in (path.parent, target.parent):  # the second of a link that points at nothing yet
            make_folder(parent)
        try:
            found = os.stat(path)
        except FileNotFoundError:
            found = None
        if found is None or stat.S_ISREG(found.st_mode):
            claim = claimed(target)
            output = _regular(path, found, say, older or partial(older_results, field=field), resumed)
            output.claim = claim
            return output
        return Through(path, say, open_device(path, found.st_mode))
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        problem = said(error) if isinstance(error, OSError) else str(error)
        raise ConfigError(field, str(path), f"can't be written: {problem}", REFUSED) from None


def _regular(path: Path, found: os.stat_result | None, say: Say, older: Callable[[Path], str], resumed: bool) -> Output:
    file = File(path, say, in_place=found is not None and found.st_nlink > 1)
    if found is None:
        file.target.parent.mkdir(parents=True, exist_ok=True)  # of a link that points at nothing yet
    else:
        if not os.access(path, os.W_OK):
            raise OSError(errno.EACCES, "it is read-only")
        if found.st_size:
            holds = older(path)
            if not resumed:
                say(f"{path} is overwritten: it holds {holds}")
    with file.partial():
        return file
