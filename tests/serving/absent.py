"""Stand-ins for packages that a serving stack imports at its top and that none of its interfaces for us needs: what is
not installed can be imported, and does nothing."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any


def _special(name: str) -> bool:
    return name.startswith("__") or name.startswith("_abc")


class _Kind(type):
    """Of classes whose every attribute is there."""

    def __getattr__(cls, name: str) -> Any:
        if _special(name):
            raise AttributeError(name)
        return Absent

    def __getitem__(cls, item: object) -> Any:
        return cls

    def __or__(cls, other: object) -> Any:
        return object

    __ror__ = __or__


class Absent(metaclass=_Kind):
    def __init__(self, *given: Any, **named: Any) -> None:
        pass

    def __call__(self, *given: Any, **named: Any) -> Any:
        return given[0] if len(given) == 1 and callable(given[0]) and not named else Absent()  # a decorator

    def __getattr__(self, name: str) -> Any:
        if _special(name):
            raise AttributeError(name)
        return Absent

    def __getitem__(self, item: object) -> Any:
        return self

    @classmethod
    def __get_pydantic_core_schema__(cls, *given: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.any_schema()


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if _special(name):
            raise AttributeError(name)
        made = _Kind(name, (Absent,), {"__module__": self.__name__}) if name[:1].isupper() else Absent()
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last, so that what is installed is imported."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        known = name.partition(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: Any) -> None:
        module.__path__, module.__version__ = [], "0"


def stand_in(*names: str) -> None:
    """From now on these packages can be imported where they are not installed."""
    sys.meta_path.append(_Finder(names))
