"""Results of `bench` as JSON lines, each appended to those of earlier runs."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path

from moe_dist.bench.output import said
from moe_dist.bench.phases import BenchResult
from moe_dist.errors import ConfigError, OutputError
from moe_dist.files import require_regular

LONGEST = 1 << 20  # bytes that a line may have
LEGAL = "a new name, or a file of such lines"
FIELD = "result_filename"


def check_lines(path: str) -> None:
    """Raise ConfigError unless `path` can be appended to: a new file in a folder that is there, an empty one, or one
    whose last line is a result of `bench`."""
    if not Path(path).exists():
        if not Path(path).absolute().parent.is_dir():
            raise ConfigError(FIELD, path, "its folder is not there", "a new name in a folder that exists")
        return
    try:
        require_regular(path)
        with open(path, "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LONGEST))
            end = file.read()
    except OSError as error:
        raise ConfigError(FIELD, path, f"can't be appended to: {said(error)}", LEGAL) from None
    if end and not _ends_in_a_line(end):
        raise ConfigError(FIELD, path, "does not end in a line of JSON that bench wrote", LEGAL)


def _ends_in_a_line(end: bytes) -> bool:
    before, newline, _ = end.rpartition(b"\n")
    try:
        last = json.loads(before.rpartition(b"\n")[2])
    except (ValueError, RecursionError):
        return False
    return end.endswith(newline or b"?") and isinstance(last, dict) and {"run_name", "measured_layers"} <= last.keys()


def append_lines(path: str, results: Iterable[BenchResult]) -> None:
    """All of them in one write, so that lines of two runs don't mix. What a full disk has cut is taken back: half a
    line would forbid to append another one. Raises OutputError."""
    text = "".join(json.dumps(result.model_dump(mode="json"), allow_nan=False) + "\n" for result in results)
    try:
        with open(path, "ab", buffering=0) as file:
            before, data = file.seek(0, os.SEEK_END), text.encode()
            if file.write(data) < len(data):
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OutputError(path, said(error)) from None
