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
    return measure(asked, measuring, call, as_json=json, sweep=False)
