"""Lines on standard error: for people, or with MOE_DIST_LOG_FORMAT=json as one JSON object each, for whatever collects
logs. docs/metrics.md has the keys."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import NamedTuple

VARIABLE, FORMATS = "MOE_DIST_LOG_FORMAT", ("text", "json")


class Place(NamedTuple):
    """Where a line comes from: a rank, the number of its last collective, and the one that it is in, or what else it
    does."""

    rank: int | None = None
    sequence: int | None = None
    operation: str | None = None


_place: Callable[[], Place] = Place


def as_json() -> bool:
    return os.environ.get(VARIABLE) == "json"


def of_rank(place: Callable[[], Place]) -> None:
    """From now on this process's lines are those of a rank, which `place` tells at each of them."""
    global _place
    _place = place


def line(text: str, level: str = "info", before: str = "moe-dist: ", **more: str) -> str:
    """`text` as it is written: with `before` in front of it, or as JSON, with `more` keys."""
    if not as_json():
        return before + text
    place = _place()
    found = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "level": level,
        "rank": place.rank,
        "node": socket.gethostname(),
        "pid": os.getpid(),
        "sequence": place.sequence,
        "operation": place.operation,
        "message": text,
    }
    return json.dumps(found | more)


def write(text: str, level: str = "info", before: str = "moe-dist: ", **more: str) -> None:
    """On standard error, in one piece. Never fails: there is nobody left to tell."""
    with suppress(OSError, ValueError, AttributeError):  # closed, or none from the start
        sys.stderr.write(line(text, level, before, **more) + "\n")
        sys.stderr.flush()


def write_if_json(text: str, level: str = "info") -> None:
    """What people are shown otherwise, or not at all."""
    if as_json():
        write(text, level)
