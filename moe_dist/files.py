"""Reading small text files of unknown origin: a config that is a FIFO, a device or gigabytes long must not hang or
fill the memory."""

from __future__ import annotations

import errno
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

from moe_dist.errors import ConfigError

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def require_text(field: str, value: str, kind: str = "argument") -> None:
    """ConfigError for what came in as other bytes than UTF-8, which Python keeps as lone surrogates: Ray, safetensors
    and JSON take text only. And for a NUL, which no name of a file may hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            field, value, f"is no UTF-8 text, as every {kind} must be", "letters that UTF-8 has"
        ) from None
    if "\0" in value:
        raise ConfigError(field, value, "holds a NUL character", f"any other {kind}")


def one_path(value: str) -> str:
    """The same text for the same file, whatever the way to it; what is no path at all stays as it is."""
    try:
        return os.path.realpath(value)
    except (OSError, ValueError):  # ValueError: a NUL byte in the name
        return value


def read_small_text(path: Path | str, limit: int) -> str:
    """The text of a regular UTF-8 file of at most `limit` bytes; links are followed. Never waits for a writer.

    Raises OSError only (FileNotFoundError if there is none), always with a `strerror` of one line that says what is
    wrong with the file: it is no regular file, it is too large, it is not UTF-8, or what the system said.
    """
    name = os.fspath(path)
    try:
        require_regular(name)
        # Something else may lie there by now: O_NONBLOCK opens a FIFO without waiting, and fstat tells.
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL byte in the name
        raise OSError(errno.EINVAL, f"is no file name: {error}", name) from None
    with open(descriptor, "rb") as file:
        _require_regular(os.fstat(descriptor), name)
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"is larger than the {limit:,} bytes that such a file may have", name)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, f"is no UTF-8 text: {error.reason} at byte {error.start}", name) from None


def require_regular(path: Path | str) -> os.stat_result:
    """What stat says of a regular file, links followed; OSError if there is none or it is something else."""
    found = os.stat(path)
    _require_regular(found, os.fspath(path))
    return found


def _require_regular(found: os.stat_result, name: str) -> None:
    if stat.S_ISREG(found.st_mode):
        return
    kind = next((kind for test, kind in KINDS if test(found.st_mode)), "something else")
    raise OSError(errno.EINVAL, f"is {kind}, not a regular file", name)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For the `object_pairs_hook` of json.loads: ValueError for a key that stands twice, of which JSON would keep the
    last value in silence."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"key {reprlib.repr(name)} stands there twice")
        found[name] = value
    return found
