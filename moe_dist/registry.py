"""Names to implementations, imported only when one is chosen: listing the names never loads a heavy library."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from moe_dist.errors import ConfigError
from moe_dist.messages import logs
from moe_dist.messages.printable import one_line

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a name to a class given as "module:Class", or as the class itself.

    Third parties add theirs through the entry-point group `moe_dist.<kind>s`. What is wrong with theirs is said once on
    standard error and left out; it is no reason for a command that doesn't ask for it to fail. `base`: what every class
    must be; one that is not, or not whole, raises TypeError when it is registered or, by name, imported.
    """

    def __init__(self, kind: str, built_in: dict[str, str], base: type[T] | None = None) -> None:
        self.kind, self.base = kind, base
        self._targets: dict[str, str | type[T]] = {}
        for name, target in built_in.items():
            self.register(name, target)
        self._foreign: dict[str, str] = {}  # names from entry points, and where each comes from
        self._said: set[str] = set()
        self._entry_points_read = False

    def register(self, name: str, target: str | type[T]) -> None:
        if name in self._targets:
            raise ConfigError(
                self.kind, name, f"a {self.kind} of this name is registered already: {self._targets[name]}"
            )
        self._targets[name] = target if isinstance(target, str) else self._checked(target, repr(target))

    def unregister(self, name: str) -> None:
        """Take a name out again (for tests and for interactive work)."""
        self._targets.pop(name)

    def names(self) -> tuple[str, ...]:
        self._read_entry_points()
        return tuple(self._targets)

    def is_foreign(self, name: str) -> bool:
        """Whether it comes from a third party's entry point."""
        return name in self._foreign

    def get(self, name: str) -> type[T]:
        """Raises ConfigError for an unknown name, and for a third party's that can't be used."""
        self._read_entry_points()
        if not isinstance(name, str) or name not in self._targets:
            legal = self.names() or f"a {self.kind} that a package brings; none here does"
            raise ConfigError(self.kind, name, f"no {self.kind} has this name", legal)
        target = self._targets[name]
        if not isinstance(target, str):
            return target
        try:
            found = self._imported(target)
        except Exception as error:
            if name not in self._foreign:
                raise
            rule = f"{self._foreign[name]} can't be used: {type(error).__name__}: {error}"
            raise ConfigError(self.kind, name, one_line(rule)) from error
        self._targets[name] = found
        return found

    def usable(self) -> Iterator[tuple[str, type[T]]]:
        """Every name with its class, without the third parties' that can't be used."""
        for name in self.names():
            try:
                yield name, self.get(name)
            except ConfigError as error:
                self._say_once(f"left out: {error}")

    def _imported(self, target: str) -> type[T]:
        module, _, attribute = target.partition(":")
        return self._checked(getattr(import_module(module), attribute), target)

    def _checked(self, found: Any, target: str) -> type[T]:
        """Raises TypeError for a class that is none of the kind, that lacks something, or that declares what nobody
        knows (`declared_wrong` of the kind's base)."""
        if self.base is not None:
            if not (isinstance(found, type) and issubclass(found, self.base)):
                raise TypeError(f"{target} is no subclass of {self.base.__name__}")
            lacking = [name for name in inspect.get_annotations(self.base) if not hasattr(found, name)]
            lacking += sorted(getattr(found, "__abstractmethods__", ()))
            if lacking:
                raise TypeError(f"{target} lacks {', '.join(lacking)}")
            if wrong := getattr(found, "declared_wrong", lambda: None)():
                raise TypeError(f"{target} declares {wrong}")
        return found  # type: ignore[no-any-return]

    def _read_entry_points(self) -> None:
        if self._entry_points_read:
            return
        self._entry_points_read = True
        group = f"moe_dist.{self.kind}s"
        try:
            points = list(entry_points(group=group))
        except Exception as error:  # a package whose metadata can't be read
            self._say_once(f"entry points of {group} can't be read: {type(error).__name__}: {error}")
            return
        for point in points:
            if point.name not in self._targets:
                self._targets[point.name] = point.value
                self._foreign[point.name] = f"the entry point {point.value}"
            elif self._targets[point.name] != point.value:  # equal: a package that is found twice
                rule = f"left out: its name is taken by {self._targets[point.name]}"
                self._say_once(f"{self.kind} {point.name} of the entry point {point.value} is {rule}")

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logs.write(one_line(text), "warning")


def unknown(name: str, declared: Iterable[str], legal: Iterable[str]) -> str | None:
    """The first of a class's declared values that is none of the legal ones, and which those are."""
    for value in declared:
        if value not in legal:
            return f"{name} {value!r}; there are {', '.join(legal)}"
    return None
