"""Under torchrun every rank runs the whole program: which one speaks for all, and with which exit code it all ends."""

from __future__ import annotations

import os
from collections.abc import Iterable

CODE_FILE = (
    "MOE_DIST_EXIT_CODE_FILE"  # set by launch/torchrun.sh: torchrun itself ends with 1 whatever a rank ended with
)

_mute: set[int] = set()  # ranks that were found dead or stopped


def mute(ranks: Iterable[int]) -> None:
    _mute.update(ranks)


def speaks() -> bool:
    """Whether this process prints: rank 0, or the lowest rank that still can."""
    return all(rank in _mute for rank in range(int(os.environ.get("RANK", "0"))))


def leave_code(code: int) -> int:
    """`code`, left for launch/torchrun.sh by the rank that speaks."""
    path = os.environ.get(CODE_FILE)
    if path and speaks():
        with open(path, "w") as file:
            file.write(str(code))
    return code
