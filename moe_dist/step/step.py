"""What the parts of one forward are told."""

from __future__ import annotations

from dataclasses import dataclass

from moe_dist.step.stages import NO_STAGES, Stages
from moe_dist.step.workspace import Workspace


@dataclass(frozen=True)
class Step:
    """One forward of a layer, made by the layer or the graph and handed down.

    `workspace`: scratch until the step ends. `bucket`: the most tokens of any rank, to which all ranks pad; None where
    nothing needs it. `captured`: the step is recorded into a CUDA graph, or run just as it would be, with static shapes
    and a host that waits for nothing. `stages`: the clock.
    """

    workspace: Workspace
    bucket: int | None = None
    captured: bool = False
    stages: Stages = NO_STAGES
