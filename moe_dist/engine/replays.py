"""Who wants to know of replays of captured steps: no hook of a layer is called in them, since they run no Python."""

from __future__ import annotations

from typing import Any, Protocol


class Listener(Protocol):
    def replayed(self, layer: Any, tokens: int, bucket: int) -> None:
        """`layer`, or a stack of them, was replayed by the host, with so many tokens of this rank."""

    def replay_failed(self, layer: Any, error: Exception) -> None: ...


listeners: list[Listener] = []


def failed(layer: Any, error: Exception) -> None:
    """A replay was not launched, because of `error`."""
    for listener in listeners:
        listener.replay_failed(layer, error)
