"""Places that are no regular files: descriptors of this process by their names, devices and FIFOs."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from pathlib import Path

DESCRIPTOR = re.compile(
    r"/dev/(stdin|stdout|stderr)|/(?:dev/fd|proc/(?:self|thread-self|(\d+))(?:/task/\d+)?/fd)/(\d{1,9})"
)
OLDEST_DESCRIPTORS = 1 << 12  # so many are looked at; a shell's own start at 10 or below 256
STANDARD = {"stdin": 0, "stdout": 1, "stderr": 2}
READER_S = 5.0  # that a FIFO's reader may come later than we do


def open_descriptors(inherited: bool) -> frozenset[int]:
    """Of this process, now. `inherited`: only what its parent gave it; what Python opens is never passed on."""
    found = set()
    for descriptor in range(OLDEST_DESCRIPTORS):
        with contextlib.suppress(OSError):
            if os.get_inheritable(descriptor) or not inherited:
                found.add(descriptor)
    return frozenset(found)


def descriptor_of(path: Path) -> int | None:
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


def open_device(path: Path, mode: int) -> int:
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
