"""The check of a step's output against the oracle, the exact layer and whole experts."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from moe_dist.bench.case import Case
from moe_dist.bench.gathered import summed, told
from moe_dist.bench.inputs import Inputs
from moe_dist.bench.whole_experts import whole_error
from moe_dist.bench.whole_router import router_error
from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.plan import Plan
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.spec import ParallelSpec
from moe_dist.model.weights import ExpertWeights
from moe_dist.oracle.numerics import Numerics
from moe_dist.oracle.reference import ScaledBy, oracle_partial
from moe_dist.runtime.context import RankContext

TINY = 1 / 16  # of the mean: what a smaller token is off by is measured against the mean


@dataclass(frozen=True)
class Errors:
    """The group's, the same on every rank; None: not checked. Relative L2 against the oracle and against the exact
    layer, what the exact layer differs from whole experts by or the router from the checkpoint's, and the worst token's
    against the oracle."""

    err_oracle: float | None = None
    err_exact: float | None = None
    err_whole: float | None = None
    err_token: float | None = None


def worse(*found: Errors) -> Errors:
    """The larger of each."""
    return Errors(*map(max, *map(astuple, found)))


def errors_of(
    context: RankContext,
    case: Case,
    layer: MoELayer,
    numerics: Numerics,
    inputs: Inputs,
    shard: ExpertWeights,
    shared: ExpertWeights | None,
    groups_TK: Tensor,
    y_TH: Tensor,
    tokens_TH: Tensor | None = None,
) -> Errors:
    """Of one layer; collective. Each rank computes its own partial in float32 and they are added up: the check holds at
    sizes where no device could hold the whole layer. `numerics`: of what gave `y_TH`. `tokens_TH`: what the router
    saw, if not the layer's inputs."""
    plan = layer.plan
    sources = layer.exchange.quantized_together(inputs.runs)
    start, stop = inputs.bounds[inputs.rank]

    def expected(numerics: Numerics | None) -> Tensor:
        # One expectation serves all exchanges, backends and modes that must give the same: it takes longer than they.
        dynamic = plan.spec.quant == "fp8_tensor_dynamic" and numerics is not None
        sensitive = (sources, layer.exchange.scaled_by) if dynamic else None
        copies = plan.exchange if plan.placement.replicated else None
        same = f"{case.model!r} {case.source!r} {case.parallel!r} {case.workload!r} {case.step}"
        key = f"{same} {numerics} {sensitive} {copies}"
        kept: dict[str, Tensor] = context.memo.setdefault("expected", {})
        if case.depth:  # behind the first layer of a stack they have inputs of their own
            kept = {}
        if key not in kept:
            if any(not known.startswith(same) for known in kept):
                kept.clear()  # another workload's: they are large
            scaled_by = layer.exchange.scaled_by
            kept[key] = _expected(layer.comm, plan, inputs, shard, shared, groups_TK, sources, numerics, scaled_by)
        return kept[key]

    exact_TH, oracle_TH = expected(None), expected(numerics)
    weights = plan.placement, shard, shared
    err_whole = whole_error(context, case, *weights, inputs.x_TH, inputs.routing, groups_TK, exact_TH)
    routed_TH = inputs.x_TH if tokens_TH is None else tokens_TH
    return Errors(
        err_oracle=group_error(layer.comm, y_TH, oracle_TH[start:stop]),
        err_exact=group_error(layer.comm, y_TH, exact_TH[start:stop]),
        err_whole=max(err_whole, router_error(layer.comm, case, routed_TH, inputs.routing)),
        err_token=worst_token(layer.comm, y_TH, oracle_TH[start:stop]),
    )


def _expected(
    comm: Comm,
    plan: Plan,
    inputs: Inputs,
    shard: ExpertWeights,
    shared: ExpertWeights | None,
    groups_TK: Tensor,
    sources: list[tuple[int, int]],
    numerics: Numerics | None,
    scaled_by: ScaledBy,
) -> Tensor:
    spec, x_TH, rank = plan.spec, inputs.x_TH, comm.rank
    partial = oracle_partial(
        x_TH, inputs.routing, shard, spec, plan.placement, rank, sources, groups_TK, numerics, scaled_by
    )
    if shared is not None and spec.shared_experts == "tp":
        partial += _of_shared(plan, x_TH, shared, sources, numerics)
    elif shared is not None and rank == 0:
        # Each rank feeds its copy its own tokens, as they came: a dynamic scale of either GEMM is of these alone.
        for start, stop in inputs.runs:
            whole = [(0, stop - start)]
            partial[start:stop] += _of_shared(plan, x_TH[start:stop], shared, whole, numerics)
    return summed(comm, partial)


def _of_shared(
    plan: Plan, x_TH: Tensor, shared: ExpertWeights, sources: list[tuple[int, int]], numerics: Numerics | None
) -> Tensor:
    """What one rank computes with its part of the shared expert, in one step."""
    of_shared = plan.spec.shared_spec()
    alone = Placement.build(of_shared, ParallelSpec())
    everyone = torch.zeros(len(x_TH), 1, dtype=torch.int32, device=x_TH.device)
    one = Routing(everyone, torch.ones_like(everyone, dtype=torch.float32))
    return oracle_partial(x_TH, one, shared, of_shared, alone, 0, sources, everyone.long(), numerics, "all")


def group_error(comm: Comm, measured: Tensor, expected: Tensor) -> float:
    """||measured - expected|| / ||expected|| over all ranks' tokens, the same on every rank; collective. NaN and rows
    that are not there count as infinite."""
    if measured.shape != expected.shape:
        measured = torch.full_like(expected, float("inf"))
    difference = (measured.double() - expected.double()).square().sum()
    squares = told(comm, difference, expected.double().square().sum()).sum(0).tolist()
    if not all(value == value and value != float("inf") for value in squares):
        return float("inf")
    if squares[1] == 0:
        return 0.0 if squares[0] == 0 else float("inf")
    return float((squares[0] / squares[1]) ** 0.5)


def worst_token(comm: Comm, measured: Tensor, expected: Tensor) -> float:
    """The largest relative L2 error of any rank's token, the same on every rank; collective. A lost token's is 1, which
    the norm over thousands of tokens would hide. NaN and rows that are not there count as infinite."""
    if measured.shape != expected.shape:
        measured = torch.full_like(expected, float("inf"))
    difference, size = (measured.double() - expected.double()).norm(dim=1), expected.double().norm(dim=1)
    return worst(comm, difference, size)


def worst(comm: Comm, difference_T: Tensor, size_T: Tensor) -> float:
    """The largest of these differences of tokens, each against its size or, where that is tiny, against the mean over
    all ranks' tokens; the same on every rank; collective. NaN counts as infinite, 0 / 0 as 0."""
    total, tokens = told(comm, size_T.sum(), len(size_T)).sum(0).tolist()
    mean = total / tokens if tokens else 0.0
    errors = torch.where(difference_T == 0, 0.0, difference_T / torch.where(size_T < TINY * mean, mean, size_T))
    mine = errors.nan_to_num(nan=float("inf"), posinf=float("inf")).max() if len(errors) else 0.0
    return float(told(comm, mine).max())
