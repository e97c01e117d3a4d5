"""`moe-dist check`."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from moe_dist.commands.asked import asked_for
from moe_dist.commands.call import ThisCall
from moe_dist.commands.config import override
from moe_dist.commands.flags import (
    BACKEND_HELP,
    NAMES,
    NO_SOURCE,
    NOT_KEPT,
    NUMBER,
    NUMBERS,
    SKEWS_HELP,
    Json,
    Measuring,
    Runtime,
    Source,
    keys_help,
)
from moe_dist.commands.measuring import measure
from moe_dist.errors import ConfigError

World = Annotated[int, NUMBER, Parameter(help="Ranks.")]
Keys = Annotated[str, Parameter(name="key=value", help=keys_help("check"))]
Tokens = Annotated[list[int], NUMBERS, Parameter(help="Global tokens of a step.")]
Backends = Annotated[list[str] | None, NAMES, Parameter(show_default=False, help=BACKEND_HELP)]
Skews = Annotated[list[str], NAMES, Parameter(help=SKEWS_HELP)]
FEW_TOKENS, TWO_SKEWS = [1, 16], ["uniform", "single"]


def check(
    *overrides: Keys,
    source: Source = NO_SOURCE,
    runtime: Runtime = None,
    world: World = 2,
    tokens: Tokens = FEW_TOKENS,
    backend: Backends = None,
    skew: Skews = TWO_SKEWS,
    measuring: Measuring = NOT_KEPT,
    json: Json = False,
    call: ThisCall,
) -> int:
    """Every placement and exchange of one model at its real shapes, numbers only."""
    config: dict[str, Any] = {
        "name": "check",
        "placements": ["tp", "ep"],
        "worlds": [world],
        "exchanges": ["local"] if world == 1 else ["all_reduce", "ag_rs", "all_to_all"],
        "tokens": tokens,
        "skews": skew,
        "iters": 0,
        "warmup": 0,
    }
    if backend:
        config["backends"] = backend
    asked = asked_for(override(config, overrides), source, sweep=True, runtime=runtime)
    if not asked.experiment.check:
        raise ConfigError("check", False, "contradicts the command, which does nothing but check", "run or compare")
    return measure(asked, measuring, call, as_json=json, sweep=True)
