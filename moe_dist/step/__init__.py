"""One forward of a layer: what every part of it is told, and what passes from part to part."""

from moe_dist.step.rows import FORMS, Arrivals, ExpertRows, LayerRows, Ranks, Support, TokenRows
from moe_dist.step.sink import Added, Routes, Sink, Whole
from moe_dist.step.stages import NO_STAGES, STAGES, Stages
from moe_dist.step.step import Step
from moe_dist.step.workspace import Take, TensorSpec, Workspace, bytes_of, fresh, workspace_of

__all__ = [
    "FORMS",
    "NO_STAGES",
    "STAGES",
    "Added",
    "Arrivals",
    "ExpertRows",
    "LayerRows",
    "Ranks",
    "Routes",
    "Sink",
    "Stages",
    "Step",
    "Support",
    "Take",
    "TensorSpec",
    "TokenRows",
    "Whole",
    "Workspace",
    "bytes_of",
    "fresh",
    "workspace_of",
]
