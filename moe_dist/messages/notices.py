"""What the user of a process has to be told that is no error, such as a table that is not there. Everything of the kind
is said by `notice`; where it goes is the process's affair."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from moe_dist.messages import logs
from moe_dist.messages.printable import one_line


class MoeDistWarning(UserWarning):
    """The category of moe_dist's warnings, for filters."""


_lock = threading.Lock()  # what is built is watched by a thread of its own, which speaks too
_kept: list[str] | None = None
_live: Callable[[str], None] | None = None
_told: Callable[[str], None] | None = None


def notice(text: str) -> None:
    """Tell the user. A process that nobody collects from warns (category MoeDistWarning) of each text once, with its
    rank where it is one of several; a rank keeps it for its runner, whose process may be the only one that the user
    sees."""
    with _lock:
        told = _told
        if _kept is not None:
            if text not in _kept:
                _kept.append(text)
                logs.write_if_json(text, "warning")
            return
    if told is not None:
        told(text)
    elif logs.as_json():
        logs.write(_whose() + text, "warning")
    else:
        warnings.warn(_whose() + text, MoeDistWarning, stacklevel=2)


def _whose() -> str:
    """The rank of this process in torch's default process group, if it has one that others are in."""
    dist = sys.modules.get("torch.distributed")  # who has a group has imported it
    if dist is None or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ""
    return f"rank {dist.get_rank()}: "


def live(text: str) -> bool:
    """Show how far something long is, where a runner watches: False where none does. Nothing is kept."""
    with _lock:
        shown = _live
    if shown is not None:
        shown(text)
    return shown is not None


@contextmanager
def collecting(shown: Callable[[str], None] | None = None, *, warned: bool = False) -> Iterator[list[str]]:
    """Inside, this process's notices go into the list, each text once, and `live` texts to `shown`, which is for a
    process whose standard error nobody sees. `warned`: Python's warnings too, those of other libraries among them. What
    was collected before an error goes to whoever collects around this."""
    global _kept, _live
    with _lock:
        outer, _kept, _live = (_kept, _live), [], shown
        found = _kept
    before = warnings.showwarning
    if warned:
        warnings.showwarning = _keep_warning
    try:
        yield found
    except BaseException:
        if outer[0] is not None:
            outer[0].extend(text for text in found if text not in outer[0])
        raise
    finally:
        warnings.showwarning = before
        with _lock:
            _kept, _live = outer


def _keep_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """In place of warnings.showwarning, which Python asks once for each place that warns."""
    ours = issubclass(category, MoeDistWarning)
    notice(one_line(message) if ours else f"{category.__name__}: {one_line(message)}")


@contextmanager
def telling(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, what nobody collects goes to `say`, each text once, in place of Python's warnings: for a command."""
    global _told
    said: set[str] = set()

    def once(text: str) -> None:
        with _lock:
            new = text not in said
            said.add(text)
        if new:
            say(text)

    with _lock:
        outer, _told = _told, once
    try:
        yield
    finally:
        with _lock:
            _told = outer


def by_text(said: Sequence[Iterable[str]]) -> dict[str, list[int]]:
    """Of what each rank said, in rank order: each text once, with the ranks that said it."""
    found: dict[str, list[int]] = {}
    for rank, texts in enumerate(said):
        for text in texts:
            found.setdefault(text, []).append(rank)
    return found


def with_ranks(said: dict[str, list[int]]) -> list[str]:
    """What `by_text` found, as lines for a user."""
    return [f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in said.items()]
