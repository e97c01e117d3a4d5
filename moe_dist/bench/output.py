"""Where `--out` keeps results: a file that is replaced whole, or a device, a pipe or a descriptor that is written
through at the end."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import select
import socket
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from moe_dist.errors import ConfigError, OutputError
from moe_dist.files import read_small_text

Say = Callable[[str], None]
Document = dict[str, Any]

DESCRIPTOR = re.compile(
    r"/dev/(stdin|stdout|stderr)|/(?:dev/fd|proc/(?:self|thread-self|(\d+))(?:/task/\d+)?/fd)/(\d{1,9})"
)
OLDEST_DESCRIPTORS = 1 << 12  # so many are looked at; a shell's own start at 10 or below 256
STANDARD = {"stdin": 0, "stdout": 1, "stderr": 2}
READER_S = 5.0  # that a FIFO's reader may come later than we do
STALL_S = 30.0  # that a reader may take nothing
LARGEST_SEEN = 64 << 20  # bytes of an older results file that is looked into
REFUSED = "a file, a link to one, a pipe, a terminal or /dev/null"


class Output(ABC):
    """`rows` are in the file by now. What could not be written is in `problem`, said once, and measuring goes on: the
    next row tries again."""

    def __init__(self, path: Path, say: Say) -> None:
        self.path, self.rows = path, 0
        self.claim: Any = None  # what keeps other commands away, until it is closed or gone
        self.problem: OutputError | None = None
        self._say = say

    def update(self, document: Document) -> None:
        """After each row."""
        return

    def close(self, document: Document) -> None:
        """At the end, whatever the end was."""
        if self.problem or len(document["rows"]) > self.rows:
            self._keep(document)
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
        """Raises OSError."""

    def _keep(self, document: Document) -> None:
        try:
            self.write(json.dumps(document, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            if self.problem is None:
                self._say(f"{self.path} can't be written: {said(error)}; measuring goes on")
            self.problem = OutputError(self.path, f"{said(error)} ({self.kept})")
        else:
            self.rows, self.problem = len(document["rows"]), None


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
            with open(descriptor, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(descriptor)  # a full disk or quota shows here at the latest
            if _state(self.target) not in (self._state, None):
                self.rows = 0
                raise OSError(errno.EBUSY, "something else has written to it since")
            try:
                self._put(partial, text)
            finally:
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
            self.target.write_text(text)

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
    """What is no regular file is never replaced: the whole document goes through an open descriptor, once."""

    def __init__(self, path: Path, say: Say, descriptor: int) -> None:
        super().__init__(path, say)
        self._descriptor = descriptor
        self._standard = _same_file(descriptor, STANDARD["stdout"])

    @property
    def on_standard_output(self) -> bool:
        return self._standard

    def write(self, text: str) -> None:
        left = memoryview(text.encode())
        with contextlib.closing(os.fdopen(self._descriptor, "wb", buffering=0)):
            while left:
                _, ready, _ = select.select([], [self._descriptor], [], STALL_S)
                if not ready:
                    raise OSError(errno.ETIMEDOUT, f"its reader took nothing for {STALL_S:.0f} s")
                with contextlib.suppress(BlockingIOError):
                    left = left[os.write(self._descriptor, left[: select.PIPE_BUF]) :]  # so much never waits


def rows_in(rows: int, place: str) -> str:
    return f"{rows} rows are {place}" if rows > 1 else f"{('no row', '1 row')[rows]} is {place}"


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


def _claimed(target: Path) -> socket.socket:
    """Two commands that replace one file would lose each other's rows. This name of the system (an abstract socket's)
    ends with the process that has it, however that ends, and leaves nothing behind. Raises OSError where another one
    has it; one in another container or on another machine shows when it has written."""
    folder = os.stat(target.parent)
    key = f"{folder.st_dev} {folder.st_ino} ".encode() + os.fsencode(target.name)
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind("\0moe-dist-out-" + hashlib.sha256(key).hexdigest())
    except OSError:
        claim.close()
        raise OSError(errno.EBUSY, "another command that is running writes to it") from None
    return claim


def said(error: OSError) -> str:
    return error.strerror or str(error)


def open_output(
    path: Path | str,
    say: Say,
    given: Container[int] | None = None,
    reads: Iterable[Path | str] = (),
    older: Callable[[Path], str] | None = None,
) -> Output:
    """Before anything is measured: results that can't be kept are minutes lost. Makes missing folders, and says which
    older results will be overwritten; a file that holds anything else stays. `given`: the descriptors that may be
    written to, where not all may. `reads`: files and folders that the command reads. `older`: says what a file holds
    that is there already, and raises ConfigError for one that must stay; None: only results may be overwritten. Raises
    ConfigError."""
    folder, path = os.fspath(path).endswith("/"), Path(path)
    try:
        if folder:
            raise OSError(errno.EISDIR, "it ends with /, as a folder's name does")
        _refuse_inputs(path, reads)
        descriptor = _descriptor_of(path)
        if descriptor is not None:
            if given is not None and descriptor not in given:
                raise OSError(errno.EBADF, "no such descriptor was given to this process")
            return Through(path, say, os.dup(descriptor))
        target = Path(os.path.realpath(path))
        for parent in (path.parent, target.parent):  # the second of a link that points at nothing yet
            _make_folder(parent)
        try:
            found = os.stat(path)
        except FileNotFoundError:
            found = None
        if found is None or stat.S_ISREG(found.st_mode):
            claim = _claimed(target)
            output = _regular(path, found, say, older or _older_results)
            output.claim = claim
            return output
        return Through(path, say, _open_device(path, found.st_mode))
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        problem = said(error) if isinstance(error, OSError) else str(error)
        raise ConfigError("out", str(path), f"can't be written: {problem}", REFUSED) from None


def _refuse_inputs(path: Path, reads: Iterable[Path | str]) -> None:
    target = Path(os.path.realpath(path))
    for given in reads:
        found = Path(os.path.realpath(given))
        same = target == found or (target.exists() and found.exists() and target.samefile(found))
        if same or found in target.parents:
            rule = f"would be written over {given}," if same else f"lies in {given},"
            raise ConfigError("out", str(path), f"{rule} which this command reads", "a file beside what is read")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        wrong = (part for part in (path, *path.parents) if os.path.lexists(part) and not part.is_dir())
        raise OSError(errno.ENOTDIR, f"{next(wrong, path)} is no folder") from None


def open_descriptors(inherited: bool) -> frozenset[int]:
    """Of this process, now. `inherited`: only what its parent gave it; what Python opens is never passed on."""
    found = set()
    for descriptor in range(OLDEST_DESCRIPTORS):
        with contextlib.suppress(OSError):
            if os.get_inheritable(descriptor) or not inherited:
                found.add(descriptor)
    return frozenset(found)


def _regular(path: Path, found: os.stat_result | None, say: Say, older: Callable[[Path], str]) -> Output:
    file = File(path, say, in_place=found is not None and found.st_nlink > 1)
    if found is None:
        file.target.parent.mkdir(parents=True, exist_ok=True)  # of a link that points at nothing yet
    else:
        if not os.access(path, os.W_OK):
            raise OSError(errno.EACCES, "it is read-only")
        if found.st_size:
            say(f"{path} is overwritten: it holds {older(path)}")
    with file.partial():
        return file


def _older_results(path: Path) -> str:
    """What they are, for the line that says that they are overwritten. ConfigError for anything else: a name that was
    mistyped must not cost a file."""
    try:
        document = json.loads(read_small_text(path, LARGEST_SEEN))
        count = len(document["rows"])
        return f"{count} row{'s' * (count != 1)} of {str(document['date'])[:40]}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        rule = "is there already and holds no results of moe-dist; it is not overwritten"
        raise ConfigError("out", str(path), rule, "a new name, or a file of earlier results") from None


def _descriptor_of(path: Path) -> int | None:
    """The number of a descriptor of this process that `path` names, through links too: /dev/stdout, /dev/fd/3. Opened
    anew, a file behind it would be written from its start, over what is there."""
    seen = Path(os.path.abspath(path))
    for _ in range(40):
        if match := DESCRIPTOR.fullmatch(str(seen)):
            if match[2] and int(match[2]) != os.getpid():
                raise OSError(errno.EPERM, f"it is a descriptor of another process, {match[2]}")
            return STANDARD[match[1]] if match[1] else int(match[3])
        if not seen.is_symlink():
            return None
        parent = Path(os.path.realpath(seen.parent))  # which may be a link to /dev/fd
        if DESCRIPTOR.fullmatch(str(parent / seen.name)):
            seen = parent / seen.name
            continue
        seen = Path(os.path.normpath(parent / os.readlink(seen)))
    return None


def _open_device(path: Path, mode: int) -> int:
    if stat.S_ISCHR(mode):
        return os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISFIFO(mode):
        return _open_fifo(path)
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISBLK, "a disk"), (stat.S_ISSOCK, "a socket"))
    raise OSError(errno.EINVAL, "it is " + next((kind for test, kind in kinds if test(mode)), "something else"))


def _open_fifo(path: Path) -> int:
    """Open from now on, so that the reader sees its end with the results'."""
    deadline = time.monotonic() + READER_S
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > deadline:
                raise OSError(
                    errno.ENXIO, f"a FIFO that nobody has opened for reading within {READER_S:.0f} s"
                ) from None
        time.sleep(0.1)
