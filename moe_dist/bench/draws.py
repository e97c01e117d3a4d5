"""The routings of a workload: one for each layer of a stack, and for each step where steps take several in turn."""

from __future__ import annotations

from moe_dist.errors import ConfigError
from moe_dist.messages.counts import count_of
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
        rule = f"holds {count_of(trace.layers, 'layer')}, and the stack has {layers}"
        raise ConfigError("workload.skew", work.skew, rule, f"layers 1 to {trace.layers}, or a trace of one layer")
    apart, taken = trace.layers > 1, _rows_taken(trace, work, layers)
    steps = _steps_taken(trace, taken)

    def of(number: int, step: int) -> Routing:
        start = step * taken + (0 if apart else number * work.tokens)
        whose = f" of layer {number} of the stack" if layers > 1 else ""
        return trace.routing(number if apart else 0, start, work.tokens, whose)

    return [[of(number, step) for number in range(layers)] for step in range(steps)]


def _rows_taken(trace: Trace, work: WorkloadSpec, layers: int) -> int:
    """Of each recorded layer, in a step."""
    return work.tokens * (1 if trace.layers > 1 else layers)


def _steps_taken(trace: Trace, taken: int) -> int:
    return min(ROUTINGS, len(trace.steps or (0,)), max(1, trace.rows // taken))


def shortage(spec: MoESpec, work: WorkloadSpec, layers: int = 1, several: bool = True) -> str | None:
    """In what a recorded routing has less than was asked for, and what is taken in its place; None where it has enough,
    and for a routing that is drawn. `several`: steps take what was recorded in turn, else there is one step. Raises
    like `read_trace`."""
    if work.trace is None:
        return None
    trace = read_trace(spec, work.skew, work.trace)
    taken, recorded_steps, said = _rows_taken(trace, work, layers), len(trace.steps or (0,)), []
    if trace.rows < taken:
        said.append(f"{count_of(trace.rows, 'recorded row')} for the {taken:,} of a step: from the first one again")
    if layers > 1 and trace.layers == 1:
        said.append(f"one recorded layer for {layers}: each takes the rows that come next")
    if several and (steps := _steps_taken(trace, taken)) < min(ROUTINGS, recorded_steps):
        said.append(f"rows for {count_of(steps, 'such step')}, where {recorded_steps} were recorded")
    return "; ".join(said) or None
