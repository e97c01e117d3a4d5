"""Distributed FP8 Mixture-of-Experts layers: what a program needs to run one. All of it is loaded when it is first
asked for, so `import moe_dist` alone loads nothing, torch neither."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dist.comm import Comm, Meeting
    from moe_dist.engine.graph import StepGraph
    from moe_dist.engine.layer import MoELayer
    from moe_dist.engine.loading import load_layer
    from moe_dist.engine.planning import make_plan
    from moe_dist.engine.recording import Recorder
    from moe_dist.engine.stack import MoEStack
    from moe_dist.model.routing import Routing
    from moe_dist.model.spec import MoESpec, ParallelSpec
    from moe_dist.model.weights import ExpertWeights
    from moe_dist.runtime.metrics import Metrics
    from moe_dist.runtime.own_actors import join_actors

_HOMES = {
    "Comm": "moe_dist.comm",
    "ExpertWeights": "moe_dist.model.weights",
    "Meeting": "moe_dist.comm",
    "Metrics": "moe_dist.runtime.metrics",
    "MoELayer": "moe_dist.engine.layer",
    "MoESpec": "moe_dist.model.spec",
    "MoEStack": "moe_dist.engine.stack",
    "ParallelSpec": "moe_dist.model.spec",
    "Recorder": "moe_dist.engine.recording",
    "Routing": "moe_dist.model.routing",
    "StepGraph": "moe_dist.engine.graph",
    "join_actors": "moe_dist.runtime.own_actors",
    "load_layer": "moe_dist.engine.loading",
    "make_plan": "moe_dist.engine.planning",
}

__all__ = [
    "Comm",
    "ExpertWeights",
    "Meeting",
    "Metrics",
    "MoELayer",
    "MoESpec",
    "MoEStack",
    "ParallelSpec",
    "Recorder",
    "Routing",
    "StepGraph",
    "join_actors",
    "load_layer",
    "make_plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_dist' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
