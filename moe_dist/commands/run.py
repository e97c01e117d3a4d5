"""`moe-dist run`."""

from __future__ import annotations

from moe_dist.commands.asked import single
from moe_dist.commands.call import ThisCall
from moe_dist.commands.flags import (
    NO_SOURCE,
    NOT_KEPT,
    ONE,
    Grid,
    Json,
    Layers,
    Measuring,
    Overrides,
    Recording,
    Runtime,
    Source,
)
from moe_dist.commands.measuring import measure
from moe_dist.errors import ConfigError
from moe_dist.files import one_path


def run(
    *overrides: Overrides,
    source: Source = NO_SOURCE,
    runtime: Runtime = None,
    layers: Layers = None,
    grid: Grid = ONE,
    record_routing: Recording = None,
    measuring: Measuring = NOT_KEPT,
    json: Json = False,
    call: ThisCall,
) -> int:
    asked = single(overrides, source, grid, runtime, layers, record_routing=record_routing)
    recording = asked.experiment.record_routing
    if recording and measuring.out and one_path(measuring.out) == one_path(recording):
        raise ConfigError("out", measuring.out, "is the file that the routing is saved in", "another file")
    return measure(asked, measuring, call, as_json=json, sweep=False)
