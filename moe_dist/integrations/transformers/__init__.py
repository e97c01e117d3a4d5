"""moe_dist's layers as the experts of transformers' models: `register` for its own switches, `replace_experts` for
every placement. docs/integration.md says which to take. transformers is imported when one of them is called."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dist.integrations.transformers.registering import register
    from moe_dist.integrations.transformers.replacing import replace_experts

__all__ = ["register", "replace_experts"]

_HOMES = {"register": "registering", "replace_experts": "replacing"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
