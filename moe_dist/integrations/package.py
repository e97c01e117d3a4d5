"""What of another package is used, looked up by name: a version is not judged by its number but by what it has."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from moe_dist.errors import InstallationError


@dataclass(frozen=True)
class Package:
    """`name`: as it is installed. `checked`: the versions that its interfaces were read and tried in. `extras`: our own
    ones that bring it."""

    name: str
    checked: tuple[str, ...]
    extras: tuple[str, ...] = ()

    def installed(self) -> str:
        """Its version. Raises InstallationError where it is not installed."""
        try:
            return version(self.name)
        except PackageNotFoundError:
            ways = " or ".join(f"pip install 'moe_dist[{extra}]'" for extra in self.extras)
            how = f" ({ways})" if ways else ""
            raise InstallationError(f"the package {self.name} is not installed{how}; {self._against()}") from None

    def optional(self, module: str, name: str) -> Any:
        """`name` of a module, or None where this version lacks one of both, or there is none."""
        return getattr(self._imported(module), name, None)

    def needed(self, module: str, name: str, *parameters: str) -> Any:
        """`name`, or `Class.name`, of a module. Raises InstallationError where this version lacks it, or where what it
        has can't be called with these parameters, all by their names."""
        found = self._imported(module)
        if found is None:
            raise self.lacking(f"module {module}")
        for part in name.split("."):
            found = getattr(found, part, None)
            if found is None:
                raise self.lacking(f"{module}.{name}")
        if parameters:
            taken = inspect.signature(found).parameters
            missing = [each for each in parameters if each not in taken]
            more = [each.name for each in taken.values() if _required(each) and each.name not in ("self", *parameters)]
            if missing or more:
                has = ", ".join(taken)
                raise self.lacking(f"{module}.{name} of ({', '.join(parameters)}), it has one of ({has})")
        return found

    def lacking(self, what: str) -> InstallationError:
        return InstallationError(f"{self.name} {self.installed()} has no {what}; {self._against()}")

    def _imported(self, module: str) -> Any:
        """None where this version has no such module."""
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            if error.name and (module == error.name or module.startswith(f"{error.name}.")):
                return None
            raise

    def _against(self) -> str:
        return f"this was checked against {self.name} {', '.join(self.checked)}"


def _required(parameter: inspect.Parameter) -> bool:
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return parameter.kind in named and parameter.default is inspect.Parameter.empty


def unexpected(given: Any, plain: dict[str, Any], of_no_account: frozenset[str]) -> list[str]:
    """One line for each field of a dataclass that asks for something which is not computed here: its value is not the
    one of `plain` or, if nobody here knows the field, not its own default, because a later version may have added it
    for a model that computes something else."""
    found = []
    for field in fields(given):
        value = getattr(given, field.name)
        if field.name in plain:
            if value is not plain[field.name] and value != plain[field.name]:
                found.append(f"{field.name} = {value!r} is not computed here, only {plain[field.name]!r}")
        elif field.name not in of_no_account and not _is_default(field, value):
            found.append(f"{field.name} = {value!r} is unknown here")
    return found


def _is_default(field: Any, value: Any) -> bool:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    if default is MISSING:
        return False
    same = value is default or value == default
    return isinstance(same, bool) and same
