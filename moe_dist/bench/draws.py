"""The routings of a workload: one for each layer of a stack, and for each step where steps take several in turn."""

from __future__ import annotations

from moe_dist.errors import ConfigError
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, WorkloadSpec
from moe_dist.workloads.skew_names import ROUTINGS
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.traces import Trace, read_trace


def draws(spec: MoESpec, work: WorkloadSpec, layers: int) -> list[list[Routing]]:
    """Of the whole group, on the CPU: for each step that has a routing of its own, those of its layers. Steps take them
    in turn, over and over; most workloads have one. A layer's is another draw of one skew, of a recorded routing see
    `recorded`. The first is the one of a single layer. Raises like `synthetic_routing` and `recorded`."""
    if work.trace is not None:
        return recorded(read_trace(spec, work.skew, work.trace), work, layers)
    steps = ROUTINGS if work.skew.startswith("rotating:") else 1

    def draw(number: int, step: int) -> Routing:
        return synthetic_routing(spec, work.tokens, work.skew, work.seed, number, step=step)

    return [[draw(number, step) for number in range(layers)] for step in range(steps)]


def recorded(trace: Trace, work: WorkloadSpec, layers: int) -> list[list[Routing]]:
    """Of a trace of several layers each layer has its own, the first ones, and each step the rows that come next. A
    trace of one layer gives each layer of a stack the rows that come next. There are as many steps as the trace has
    recorded, with rows for all of their tokens, at most ROUTINGS and at least one. Raises ConfigError where the trace
    has fewer layers than the stack, and where it sends the rows of a layer nowhere."""
    if 1 < trace.layers < layers:
        rule = f"holds {trace.layers} layers, and the stack has {layers}"
        raise ConfigError("workload.skew", work.skew, rule, f"layers 1 to {trace.layers}, or a trace of one layer")
    apart = trace.layers > 1
    taken = work.tokens * (1 if apart else layers)  # rows of a step
    steps = min(ROUTINGS, len(trace.steps or (0,)), max(1, trace.rows // taken))

    def of(number: int, step: int) -> Routing:
        start = step * taken + (0 if apart else number * work.tokens)
        whose = f" of layer {number} of the stack" if layers > 1 else ""
        return trace.routing(number if apart else 0, start, work.tokens, whose)

    return [[of(number, step) for number in range(layers)] for step in range(steps)]
