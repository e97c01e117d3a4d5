"""What keeps results from going over anything but older results: other commands' files, what a command reads."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from collections.abc import Iterable
from pathlib import Path

from moe_dist.bench.lines import LINES_BEGIN, read_document
from moe_dist.errors import ConfigError
from moe_dist.files import read_small_text
from moe_dist.messages.counts import count_of

LARGEST_SEEN = 64 << 20  # bytes of an older results file that is looked into


def claimed(target: Path) -> socket.socket:
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


def refuse_inputs(path: Path, reads: Iterable[Path | str], field: str) -> None:
    target = Path(os.path.realpath(path))
    for given in reads:
        found = Path(os.path.realpath(given))
        same = target == found or (target.exists() and found.exists() and target.samefile(found))
        if same or found in target.parents:
            rule = f"would be written over {given}," if same else f"lies in {given},"
            raise ConfigError(field, str(path), f"{rule} which this command reads", "a file beside what is read")


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        wrong = (part for part in (path, *path.parents) if os.path.lexists(part) and not part.is_dir())
        raise OSError(errno.ENOTDIR, f"{next(wrong, path)} is no folder") from None


def older_results(path: Path, field: str) -> str:
    """What they are, for the line that says that they are overwritten. ConfigError for anything else: a name that was
    mistyped must not cost a file."""
    try:
        text = read_small_text(path, LARGEST_SEEN)
        if text.startswith(LINES_BEGIN):  # the end of a machine may have cut the last one, which nothing is lost with
            text = text[: text.rfind("\n") + 1]
        document = read_document(text)
        count = len(document["rows"])
        return f"{count_of(count, 'row')} of {str(document['date'])[:40]}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        rule = "is there already and holds no results of moe-dist; it is not overwritten"
        raise ConfigError(field, str(path), rule, "a new name, or a file of earlier results") from None
