"""Names, runner cores and hooks in SGLang's registries."""

from __future__ import annotations

from typing import Any

from moe_dist.backends import BACKENDS
from moe_dist.integrations.sglang import PREFIX
from moe_dist.integrations.sglang.interfaces import APPLY, CREATE, INIT, LOADED, interfaces

_registered: list[str] = []  # names, in this process


def register_all() -> None:
    """See moe_dist.integrations.sglang.register."""
    if _registered:
        return
    found = interfaces()
    from moe_dist.integrations.sglang import hooks

    for name in (name for name, each in BACKENDS.usable() if "token" in each.takes):
        found.register_core(PREFIX + name, _factory(name))
        _registered.append(PREFIX + name)
    found.hook(CREATE, hooks.create_moe_runner, found.around)
    found.hook(APPLY, hooks.apply, found.around)
    found.hook(LOADED, hooks.weights_were_loaded, found.after)
    found.hook(INIT, hooks.layer_was_made, found.after)
    found.add_choices(_registered)


def _factory(backend: str) -> Any:
    """What SGLang makes the runner core of a layer with."""
    from moe_dist.integrations.sglang.core import MoeDistRunnerCore

    return lambda config: MoeDistRunnerCore(config, backend)
