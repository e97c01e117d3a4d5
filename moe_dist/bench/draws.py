"""The routings of a workload: one for each layer of a stack."""

from __future__ import annotations

from moe_dist.errors import ConfigError
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, WorkloadSpec
from moe_dist.workloads.skews import LEAST_WEIGHT, synthetic_routing


def draws(spec: MoESpec, work: WorkloadSpec, layers: int) -> list[Routing]:
    """Of the whole group, on the CPU: another draw of one skew for each layer, of a recorded routing the rows that come
    next. The first is the one of a single layer. Raises like `synthetic_routing`, and ConfigError for a recorded one
    that sends the rows of a layer nowhere."""
    if work.trace is None:
        return [synthetic_routing(spec, work.tokens, work.skew, work.seed, number) for number in range(layers)]
    recorded = synthetic_routing(spec, work.tokens * layers, work.skew, work.seed, trace=work.trace)
    found = [recorded.rows(number * work.tokens, (number + 1) * work.tokens) for number in range(layers)]
    for number, routing in enumerate(found):
        if not bool((routing.weights_TK.abs() >= LEAST_WEIGHT).any()):
            rule = f"sends the {work.tokens} rows of layer {number} of the stack nowhere"
            legal = "at least one expert with a weight, else nothing is measured"
            raise ConfigError("workload.skew", work.skew, rule, legal)
    return found
