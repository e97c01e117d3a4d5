"""The keys of a config.json, each checked for presence, type and size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from moe_dist.checkpoint.folder import shown
from moe_dist.errors import CheckpointError, UnsupportedError

# Beyond these a number is a slip or an attack: every layer, expert and block is walked over.
MOST = {"num_hidden_layers": 10_000, "experts": 16_384, "size": 1 << 20}

T = TypeVar("T")


class Keys:
    """A null counts as absent. `read`: those asked for so far. Raises CheckpointError."""

    def __init__(self, raw: Mapping[str, Any], path: Path | str) -> None:
        self.raw, self.path = raw, path
        self.read: set[str] = set()

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        self.read.add(key)
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(self.path, f"key {key} is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(self.path, f"key {key} = {shown(value)} is no {kind.__name__}")
        return value

    def integer(self, key: str, default: int | None = None, least: int = 0, most: int = MOST["experts"]) -> int:
        value = self.get(key, int, default)
        if value < least:
            raise CheckpointError(self.path, f"key {key} = {shown(value)} must be {least} or more")
        if value > most:
            raise CheckpointError(self.path, f"key {key} = {shown(value)} must be {most:,} or less")
        return value

    def size(self, key: str) -> int:
        """Of a matrix."""
        return self.integer(key, least=1, most=MOST["size"])

    def number(self, key: str, least: float, most: float) -> float:
        self.read.add(key)
        value = self.raw.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            value = self.get(key, float)
        if not least <= value <= most:
            raise CheckpointError(self.path, f"key {key} = {shown(value)} must be from {least:g} to {most:g}")
        return float(value)

    def either(self, key: str, other: str) -> str:
        """Which of two names of one thing is there; CheckpointError if both are and contradict each other."""
        self.read |= {key, other}
        values = [self.raw.get(name) for name in (key, other)]
        if None not in values and (values[0] != values[1] or type(values[0]) is not type(values[1])):
            both = f"key {key} = {shown(values[0])} contradicts {other} = {shown(values[1])}"
            raise CheckpointError(self.path, both)
        return other if values[0] is None and values[1] is not None else key

    def only(self, key: str, supported: tuple[str, ...], default: str | None = None) -> str:
        """One of the `supported` texts; UnsupportedError for another one."""
        value = self.get(key, str, default)
        if value not in supported:
            raise UnsupportedError(f"{key} {shown(value)} in {self.path}", ["nothing here computes it"], supported)
        return value

    def must(self, key: str, value: bool | float, reason: str, needed: bool = False) -> None:
        """UnsupportedError unless the key is absent or has this value. `needed`: absent it is refused elsewhere."""
        whole = isinstance(value, float) and type(self.raw.get(key)) is int  # 7 is 7.0
        found = self.get(key, int if whole else type(value), value)
        if found != value:
            legal = [str(value)] + [f"no key {key}"] * (not needed)
            raise UnsupportedError(f"{key} {shown(found)} in {self.path}", [reason], legal)
