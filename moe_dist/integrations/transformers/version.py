"""What of transformers is used, looked up by name: a version is not judged by its number but by what it has."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from moe_dist.errors import InstallationError

CHECKED = "5.24.0"  # of transformers; docs/integration.md says what with
MOE, FP8, EXPERT_PARALLEL = (
    "transformers.integrations.moe",
    "transformers.integrations.finegrained_fp8",
    "transformers.distributed.expert_parallel",
)


def installed() -> str:
    """The version of transformers. Raises InstallationError where there is none."""
    try:
        return version("transformers")
    except PackageNotFoundError:
        raise InstallationError(
            f"the package transformers is not installed; this was checked against {CHECKED}"
        ) from None


def optional(module: str, name: str) -> Any:
    """`name` of a module of transformers, or None where this version lacks one of both."""
    try:
        return getattr(import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            return None
        raise


def needed(module: str, name: str) -> Any:
    """The same; raises InstallationError where this version lacks it."""
    found = optional(module, name)
    if found is None:
        raise lacking(f"{module}.{name}")
    return found


def lacking(what: str) -> InstallationError:
    return InstallationError(f"transformers {installed()} has no {what}; this was checked against {CHECKED}")


def registry(module: str, name: str) -> Callable[[str, Any], None]:
    """How a name is added to a registry of transformers."""
    add: Callable[[str, Any], None] | None = getattr(needed(module, name), "register", None)
    if add is None:
        raise lacking(f"{module}.{name}.register")
    return add
