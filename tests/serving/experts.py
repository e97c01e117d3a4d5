"""Random layers, what the oracle says of them, and their tensors as checkpoints of FP8 experts have them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_dist.backends import BACKENDS
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing, route
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import ExpertWeights
from moe_dist.oracle.reference import oracle_partial
from moe_dist.workloads.random_weights import random_weights

SPEC = MoESpec(hidden=256, intermediate=256, num_experts=4, top_k=2)
TOKENS = 7
TOLERANCE = 1e-2  # relative, of the whole output in L2: it is rounded to bf16 once


def drawn(spec: MoESpec = SPEC, tokens: int = TOKENS) -> tuple[ExpertWeights, Tensor, Routing]:
    """Experts, tokens [T, H] bf16 and a routing with an id of -1 in it."""
    generator = torch.Generator().manual_seed(5)
    x_TH = torch.randn(tokens, spec.hidden, generator=generator).bfloat16()
    routing = route(torch.randn(tokens, spec.num_experts, generator=generator), spec)
    if tokens:
        routing.ids_TK[-1, -1] = -1
    return random_weights(spec, 3), x_TH, routing


def expected(
    weights: ExpertWeights, x_TH: Tensor, routing: Routing, spec: MoESpec = SPEC, parallel: ParallelSpec | None = None,
    rank: int = 0,
) -> Tensor:  # fmt: skip
    """The oracle's partial sums of a rank that holds `weights`."""
    placement = Placement.build(spec, parallel or ParallelSpec())
    rows = torch.arange(len(x_TH))
    groups_TK = placement.serving_groups(routing.ids_TK, rows, None)
    numerics = BACKENDS.get("torch").numerics_of(spec)
    runs = [(0, len(x_TH))]
    return oracle_partial(x_TH, routing, weights, spec, placement, rank, runs, groups_TK, numerics)


def error(found: Tensor, right: Tensor) -> float:
    """Relative, in L2."""
    return float((found.float() - right).norm() / right.norm())


def pieces(weights: ExpertWeights) -> Iterator[tuple[int, str, Tensor, Tensor]]:
    """(expert, w1, w2 or w3, the matrix, its scales). Without a gate there is no w3."""
    s13, s2 = weights.s13, weights.s2
    assert s13 is not None
    assert s2 is not None
    for expert in range(weights.num_experts):
        halves = 2 if weights.gated else 1
        for shard_id, half, scales in zip(
            ("w1", "w3"), weights.w13_eFH[expert].chunk(halves), s13[expert].chunk(halves), strict=False
        ):
            yield expert, shard_id, half, scales
        yield expert, "w2", weights.w2_eHi[expert], s2[expert]
