"""The name `moe_dist` in transformers' registries: experts_implementation for one GPU, ep_implementation for more."""

from __future__ import annotations

from typing import NamedTuple

from moe_dist.integrations.transformers.settings import Settings
from moe_dist.integrations.transformers.version import EXPERT_PARALLEL, FP8, MOE, optional, registry

NAME = "moe_dist"


class Registered(NamedTuple):
    """Which switches of this transformers take the name now: `experts` and `fp8_experts` are
    experts_implementation="moe_dist", of bf16 or float32 and of FP8 weights; `expert_parallel` is
    DistributedConfig(ep_implementation="moe_dist")."""

    experts: bool
    fp8_experts: bool
    expert_parallel: bool


def register(
    *,
    exchange: str | None = None,
    backend: str | None = None,
    graph_buckets: tuple[int, ...] = (),
    timeout_s: float | None = None,
) -> Registered:
    """Let transformers' models run their experts by moe_dist where they are told to. Call it before a model is loaded,
    with the same on all ranks. The arguments are those that transformers' switches have no place for
    (settings.Settings); `exchange` and `timeout_s` are for ep_implementation. A second call counts for
    experts_implementation from the next step on, and for ep_implementation in models loaded from then on.

    Raises ConfigError for a wrong argument, InstallationError without transformers or with one that has no registry of
    experts. What an older version lacks beside that is False in what comes back.
    """
    settings = Settings(exchange, backend, graph_buckets, timeout_s)
    add_experts = registry(MOE, "ALL_EXPERTS_FUNCTIONS")
    from moe_dist.integrations.transformers.one_process import experts_function

    function = experts_function(settings)
    add_experts(NAME, function)
    fp8_experts = optional(FP8, "ALL_FP8_EXPERTS_FUNCTIONS") is not None
    if fp8_experts:
        registry(FP8, "ALL_FP8_EXPERTS_FUNCTIONS")(NAME, function)
    expert_parallel = optional(EXPERT_PARALLEL, "EPImplementationInterface") is not None
    if expert_parallel:
        from moe_dist.integrations.transformers.expert_parallel import implementation

        registry(EXPERT_PARALLEL, "EPImplementationInterface")(NAME, implementation(settings))
    return Registered(True, fp8_experts, expert_parallel)
