"""Names to implementations, imported only when one is chosen: listing the names never loads a heavy library."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from moe_dist.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a name to a class given as "module:Class", or as the class itself.

    Third parties add theirs through the entry-point group `moe_dist.<kind>s`. A name that is taken raises.
    """

    def __init__(self, kind: str, built_in: dict[str, str]) -> None:
        self.kind = kind
        self._targets: dict[str, str | type[T]] = {}
        for name, target in built_in.items():
            self.register(name, target)
        self._entered: set[str] = set()
        self._entry_points_read = False

    def register(self, name: str, target: str | type[T]) -> None:
        if name in self._targets:
            raise ConfigError(
                self.kind, name, f"a {self.kind} of this name is registered already: {self._targets[name]}"
            )
        self._targets[name] = target

    def unregister(self, name: str) -> None:
        """Take a name out again (for tests and for interactive work)."""
        self._targets.pop(name)

    def names(self) -> tuple[str, ...]:
        self._read_entry_points()
        return tuple(self._targets)

    def get(self, name: str) -> type[T]:
        self._read_entry_points()
        if name not in self._targets:
            raise ConfigError(self.kind, name, f"no {self.kind} has this name", self.names())
        target = self._targets[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            found: Any = getattr(import_module(module), attribute)
            self._targets[name] = found
            return found  # type: ignore[no-any-return]
        return target

    def _read_entry_points(self) -> None:
        if self._entry_points_read:
            return
        for point in entry_points(group=f"moe_dist.{self.kind}s"):
            if point.name not in self._entered:
                self.register(point.name, point.value)
                self._entered.add(point.name)
        self._entry_points_read = True
