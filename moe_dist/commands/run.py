"""`moe-dist run`."""

from __future__ import annotations

from moe_dist.commands.asked import single
from moe_dist.commands.call import ThisCall
from moe_dist.commands.flags import (
    NO_PROFILE,
    NO_SOURCE,
    NOT_KEPT,
    ONE,
    Grid,
    Json,
    Layers,
    Measuring,
    Overrides,
    Profiling,
    Recording,
    Runtime,
    Source,
)
from moe_dist.commands.measuring import measure
from moe_dist.commands.profiling import print_traces, profiled
from moe_dist.errors import ConfigError
from moe_dist.files import one_path


def run(
    *overrides: Overrides,
    source: Source = NO_SOURCE,
    runtime: Runtime = None,
    layers: Layers = None,
    grid: Grid = ONE,
    record_routing: Recording = None,
    profiling: Profiling = NO_PROFILE,
    measuring: Measuring = NOT_KEPT,
    json: Json = False,
    call: ThisCall,
) -> int:
    asked = single(overrides, source, grid, runtime, layers, record_routing=record_routing)
    recording = asked.experiment.record_routing
    if recording and measuring.out and one_path(measuring.out) == one_path(recording):
        raise ConfigError("out", measuring.out, "is the file that the routing is saved in", "another file")
    cases = list(asked.experiment.cases(asked.machine.device, asked.chosen_by))
    cases = profiled({"step": cases}, profiling, measuring.out)
    code = measure(asked, measuring, call, as_json=json, sweep=False, cases=cases)
    if not json and not measuring.csv:
        print_traces(cases)
    return code
