"""What the user of a process has to be told that is no error, such as a table that is not there. Everything of the kind
is said by `notice`; where it goes is the process's affair."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class MoeDistWarning(UserWarning):
    """The category of moe_dist's warnings, for filters."""


_lock = threading.Lock()  # what is built is watched by a thread of its own, which speaks too
_kept: list[str] | None = None
_live: Callable[[str], None] | None = None


def notice(text: str) -> None:
    """Tell the user. A process that nobody collects from warns (category MoeDistWarning) of each text once; a rank
    keeps it for its runner, whose process may be the only one that the user sees."""
    with _lock:
        if _kept is not None:
            if text not in _kept:
                _kept.append(text)
            return
    warnings.warn(text, MoeDistWarning, stacklevel=2)


def live(text: str) -> bool:
    """Show how far something long is, where a runner watches: False where none does. Nothing is kept."""
    with _lock:
        shown = _live
    if shown is not None:
        shown(text)
    return shown is not None


@contextmanager
def collecting(shown: Callable[[str], None] | None = None) -> Iterator[list[str]]:
    """Inside, this process's notices go into the list, each text once, and `live` texts to `shown`, which is for a
    process whose standard error nobody sees."""
    global _kept, _live
    with _lock:
        outer, _kept, _live = (_kept, _live), [], shown
        found = _kept
    try:
        yield found
    finally:
        with _lock:
            _kept, _live = outer
