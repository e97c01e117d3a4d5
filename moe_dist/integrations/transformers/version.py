"""What of transformers is used, looked up by name: a version is not judged by its number but by what it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_dist.integrations.package import Package

TRANSFORMERS = Package("transformers", ("5.24.0",), ("stacks", "eval"))  # docs/integration.md says what with
MOE, FP8, EXPERT_PARALLEL = (
    "transformers.integrations.moe",
    "transformers.integrations.finegrained_fp8",
    "transformers.distributed.expert_parallel",
)
installed, lacking, needed, optional = (
    TRANSFORMERS.installed,
    TRANSFORMERS.lacking,
    TRANSFORMERS.needed,
    TRANSFORMERS.optional,
)


def registry(module: str, name: str) -> Callable[[str, Any], None]:
    """How a name is added to a registry of transformers. Raises InstallationError where this version lacks it."""
    add: Callable[[str, Any], None] = needed(module, f"{name}.register")
    return add
