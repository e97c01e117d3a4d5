"""Whether the parts that a layer is made of belong together."""

from __future__ import annotations

from moe_dist.comm import Comm
from moe_dist.engine.inputs import check_shard
from moe_dist.engine.plan import Plan, shared_placement
from moe_dist.engine.router import Router
from moe_dist.errors import ConfigError
from moe_dist.messages.counts import count_of
from moe_dist.model.weights import ExpertWeights

ROUTING_FIELDS = (
    "hidden", "num_experts", "top_k", "scoring", "renormalize", "correction_bias", "router_bias", "num_groups",
    "top_groups", "routed_scaling",
)  # fmt: skip


def check_fit(
    plan: Plan, shard: ExpertWeights, shared: ExpertWeights | None, router: Router | None, comm: Comm
) -> None:
    """Raise ConfigError for what is no such part, and for parts that don't belong together."""
    for field, value, kind in (("plan", plan, Plan), ("comm", comm, Comm)):
        if not isinstance(value, kind):
            raise ConfigError(field, type(value).__name__, f"is no {kind.__name__}", kind.__name__)
    if not (router is None or isinstance(router, Router)):
        rule = "is no Router, whose spec and device can be compared with the plan's"
        raise ConfigError("router", type(router).__name__, rule, "Router, or a Routing in each call")
    spec, placement, rank, device = plan.spec, plan.placement, comm.rank, comm.device
    if comm.world != placement.world:
        rule = f"the process group has {count_of(comm.world, 'rank')}"
        raise ConfigError("parallel", plan.parallel.label, rule, comm.world)
    if plan.machine.device != device.type:
        raise ConfigError(
            "comm.device", str(device), "the plan was made for ranks on another kind", plan.machine.device
        )
    if (spec.shared_experts != "none") != (shared is not None):
        rule = "the shared expert's weights must be given exactly if the spec has one"
        raise ConfigError("model.shared_experts", spec.shared_experts, rule)
    experts, width = len(placement.experts_of(rank)), placement.width_of(rank)
    check_shard("shard", shard, spec, experts, width, device, f"rank {rank}")
    start, _ = placement.slice_of(rank)
    if start and shard.b2_eH is not None and bool(shard.b2_eH.any()):
        rule = f"rank {rank} has its experts from column {start} on; with biases in more than the first slice of an"
        rule += " expert they would count several times"
        raise ConfigError("shard.b2", "not all zeros", rule, "zeros, as load_shard gives them")
    if shared is not None:
        width = shared_placement(spec, plan.parallel).width_of(rank)
        check_shard("shared", shared, spec.shared_spec(), 1, width, device, f"rank {rank}")
        if shared.a13 is not None and shard.a13 is not None and shared.a13 != shard.a13:
            rule = "the shared expert takes the same quantized rows, so it needs the experts' static input scale"
            raise ConfigError("shared.a13", float(shared.a13), rule, float(shard.a13))
    if router is None:
        return
    if router.gate_EH.device != device:
        raise ConfigError("router.device", str(router.gate_EH.device), "not the communicator's", str(device))
    for field in ROUTING_FIELDS:
        own, wanted = getattr(router.spec, field), getattr(spec, field)
        if own != wanted:
            raise ConfigError(f"router.{field}", own, "the router was made for another model", wanted)
