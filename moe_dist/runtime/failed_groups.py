"""Who wants to know that a group of ranks has failed, and that another one was started in its place."""

from __future__ import annotations

from typing import Protocol


class Listener(Protocol):
    def failed(self, error: BaseException) -> None: ...

    def restarted(self) -> None: ...


listeners: list[Listener] = []
_given_up = False


def failed(error: BaseException) -> None:
    """A group was given up because of `error`."""
    global _given_up
    _given_up = True
    for listener in listeners:
        listener.failed(error)


def started() -> None:
    """A group is up. It counts as a restart where the one before it in this process had failed."""
    global _given_up
    if _given_up:
        for listener in listeners:
            listener.restarted()
    _given_up = False
