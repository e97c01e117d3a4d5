"""One distributed layer against the oracle: what to run, and how a worker runs it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from dist.pool import group_of
from exchanges import exchanges_here
from torch import Tensor

from moe_dist.backends import BACKENDS
from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.plan import Plan
from moe_dist.engine.planning import make_plan
from moe_dist.engine.router import Router
from moe_dist.exchange import EXCHANGES
from moe_dist.exchange.all_to_all import AllToAll
from moe_dist.machine.machine import Machine
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import ExpertWeights, shard, slice_width, stack
from moe_dist.oracle.numerics import Numerics
from moe_dist.oracle.reference import ScaledBy, oracle_layer
from moe_dist.step import workspace_of
from moe_dist.workloads.random_weights import random_expert
from moe_dist.workloads.skews import synthetic_routing

CPU = Machine.detect("cpu")
EXACT_BOUNDS = {"bf16": 5e-3, "fp32": 1e-5, "fp8_block": 5e-2, "fp8_channel": 5e-2}  # design: numbers
EXACT_BOUNDS |= {"fp8_tensor_static": 6e-2, "fp8_tensor_dynamic": 6e-2}


@dataclass(frozen=True)
class Inputs:
    """`counts[r]` tokens on rank r where tokens are sharded; `holes`: the part of the ids that is -1 instead; `wild`:
    rows without any expert are large."""

    counts: tuple[int, ...]
    seed: int
    skew: str = "uniform"
    holes: float = 0.1
    wild: bool = True

    @property
    def bounds(self) -> list[tuple[int, int]]:
        stops = list(itertools.accumulate(self.counts))
        return list(zip([0, *stops[:-1]], stops, strict=True))


@dataclass(frozen=True)
class Case:
    """`bucket` is the caller's max_tokens_per_rank. `swap` gives the layer weights whose gate and up are exchanged,
    `up_scale` is the factor between them. `turned`: the layer weighs the other side of an expert than its spec says.
    `exact`: all_to_all pads nothing. `nodes`: the ranks are told that so many of them are on each node."""

    name: str
    plan: Plan
    inputs: Inputs
    bucket: int | None = None
    swap: bool = False
    turned: bool = False
    up_scale: float = 0.25
    routed_by_layer: bool = False
    exact: bool = False
    nodes: tuple[int, ...] = ()


class Outcome(NamedTuple):
    """One rank's finding: squared sizes of differences and of what was expected, its own rows only."""

    finding: str
    oracle: tuple[float, float]
    exact: tuple[float, float]


def run_cases(comm: Comm, cases: list[Case]) -> dict[str, Outcome]:
    outcomes = {}
    for case in cases:
        try:
            outcomes[case.name] = _run(comm, case)
        except Exception as error:
            error.add_note(f"in case {case.name}")
            raise
    return outcomes


def run_outputs(comm: Comm, cases: list[Case]) -> dict[str, Tensor]:
    """What this rank gets, without any oracle."""
    return {case.name: _output(comm, case)[0] for case in cases}


def _output(comm: Comm, case: Case) -> tuple[Tensor, MoELayer, Tensor, Routing]:
    """This rank's output, its layer, and all tokens with their routing."""
    plan, spec, seed = case.plan, case.plan.spec, case.inputs.seed
    comm.nodes = case.nodes
    x, routing = inputs_of(spec.hidden, spec.num_experts, spec.top_k, case.inputs, spec.weights_on_input)
    x = x.to(spec.torch_dtype)
    weights = _weights(spec, seed, case.up_scale)
    own = shard(swap_halves(weights) if case.swap else weights, plan.placement, comm.rank)
    router = None
    if case.routed_by_layer:
        gate = torch.randn(spec.num_experts, spec.hidden, generator=torch.Generator().manual_seed(seed))
        router = Router(plan, gate)
        routing = router(x)
    layer = MoELayer(plan, own, comm, router=router, shared=_shared_part(case, comm.rank))
    if case.turned:
        layer.plan = replace(plan, spec=spec.with_changes(weights_on_input=not spec.weights_on_input))
    inner = getattr(layer.exchange, "inner", layer.exchange)
    if case.exact and isinstance(inner, AllToAll):
        inner.padding_up_to = -1
    start, stop = (0, len(x)) if plan.token_layout == "replicated" else case.inputs.bounds[comm.rank]
    given = None if router else routing.rows(start, stop)
    wide = x.new_zeros(len(x), spec.hidden + 4)  # columns of it are not contiguous
    wide[:, 1:-3] = x
    workspace = workspace_of(comm.device)
    workspace.high_water = 0
    y = layer(wide[start:stop, 1:-3], given, max_tokens_per_rank=case.bucket)
    most = plan.scratch_bytes(case.bucket or max(b - a for a, b in [*case.inputs.bounds, (start, stop)]))
    if workspace.high_water > most:
        raise AssertionError(f"{case.name}: took {workspace.high_water} bytes of scratch, the plan says {most} at most")
    if y.shape != (stop - start, spec.hidden) or y.dtype != spec.torch_dtype:
        raise AssertionError(f"{case.name}: the output is {y.dtype} {tuple(y.shape)}")
    return y, layer, x, routing


def _run(comm: Comm, case: Case) -> Outcome:
    y, layer, x, routing = _output(comm, case)
    plan, spec, placement = case.plan, case.plan.spec, case.plan.placement
    replicated = plan.token_layout == "replicated"
    bounds = [(0, len(x))] if replicated else case.inputs.bounds
    rows, sources = layer.exchange.identify(bounds)
    groups = placement.serving_groups(routing.ids_TK, rows, sources)
    together = layer.exchange.quantized_together(bounds)

    numerics = layer.backend.numerics
    problem = (spec, case.inputs, case.up_scale, case.routed_by_layer)
    key = (*problem, plan.parallel)
    scaled_by = layer.exchange.scaled_by
    key += (tuple(groups.flatten().tolist()), tuple(together), tuple(bounds), numerics, scaled_by)
    expected = _shared_by_all(
        comm, key, lambda: _expected(case, x, routing, groups, together, bounds, numerics, scaled_by)
    )
    exact = _shared_by_all(comm, problem, lambda: _exact(case, x, routing))

    start, stop = (0, len(x)) if replicated else case.inputs.bounds[comm.rank]
    finding = "" if bool(torch.isfinite(y).all()) else "not finite"
    empty = (routing.ids_TK[start:stop] < 0).all(1)
    if spec.shared_experts == "none" and bool(y[empty].any()):
        finding = "a token without any expert is not zero"
    return Outcome(finding, _squares(y, expected[start:stop]), _squares(y, exact[start:stop]))


def _squares(measured: Tensor, expected: Tensor) -> tuple[float, float]:
    return float((measured.double() - expected.double()).square().sum()), float(expected.double().square().sum())


def _expected(
    case: Case,
    x: Tensor,
    routing: Routing,
    groups: Tensor,
    together: list[tuple[int, int]],
    bounds: list[tuple[int, int]],
    numerics: Numerics | None,
    scaled_by: ScaledBy,
) -> Tensor:
    """The oracle, quantizing where the plan quantizes."""
    spec, placement = case.plan.spec, case.plan.placement
    weights = _weights(spec, case.inputs.seed, case.up_scale)
    shards = [shard(weights, placement, rank) for rank in range(placement.world)]
    y = oracle_layer(x, routing, shards, spec, placement, together, groups, numerics, scaled_by)
    if spec.shared_experts == "none":
        return y
    shared, every = spec.shared_spec(), _every_token(case, x)
    if spec.shared_experts == "replicated":  # each rank's own tokens are one tensor
        alone = Placement.build(shared, ParallelSpec())
        pieces = [
            oracle_layer(
                x[start:stop], every.rows(start, stop), [_shared_weights(case)], shared, alone,
                [(0, stop - start)], every.ids_TK[start:stop], numerics,
            )
            for start, stop in bounds
        ]  # fmt: skip
        return y + torch.cat(pieces)
    sliced = _shared_slices(case)
    parts = [shard(_shared_weights(case), sliced, rank) for rank in range(sliced.world)]
    return y + oracle_layer(x, every, parts, shared, sliced, together, every.ids_TK, numerics)


def _exact(case: Case, x: Tensor, routing: Routing) -> Tensor:
    """The layer on one rank, whole and unquantized: it knows nothing of placements and slices."""
    spec = case.plan.spec
    weights = _weights(spec, case.inputs.seed, case.up_scale)
    alone = Placement.build(spec, ParallelSpec())
    groups = torch.where(routing.ids_TK < 0, -1, 0)
    y = oracle_layer(x, routing, [weights], spec, alone, [(0, len(x))], groups, None)
    if spec.shared_experts != "none":
        shared, every = spec.shared_spec(), _every_token(case, x)
        alone = Placement.build(shared, ParallelSpec())
        y += oracle_layer(x, every, [_shared_weights(case)], shared, alone, [(0, len(x))], every.ids_TK, None)
    return y


def _every_token(case: Case, x: Tensor) -> Routing:
    """To the shared expert, with a sigmoid of the token as weight where it is gated."""
    gate = _shared_weights(case).token_gate_eH
    weights = torch.ones(len(x), 1) if gate is None else 1 / (1 + (-(x.double() @ gate.double().T)).exp()).float()
    return Routing(torch.zeros(len(x), 1, dtype=torch.int32), weights)


def _shared_weights(case: Case) -> ExpertWeights:
    return random_expert(case.plan.spec.shared_spec(), 0, case.inputs.seed + 1)


def _shared_slices(case: Case) -> Placement:
    allow = case.plan.parallel.allow_empty_shards
    parallel = ParallelSpec(tp=case.plan.placement.world, allow_empty_shards=allow)
    return Placement.build(case.plan.spec.shared_spec(), parallel)


def _shared_part(case: Case, rank: int) -> ExpertWeights | None:
    how = case.plan.spec.shared_experts
    if how == "none":
        return None
    whole = _shared_weights(case)
    return whole if how == "replicated" else shard(whole, _shared_slices(case), rank)


@lru_cache(maxsize=16)
def _weights(spec: MoESpec, seed: int, up_scale: float) -> ExpertWeights:
    return stack([random_expert(spec, expert, seed, up_scale=up_scale) for expert in range(spec.num_experts)])


def swap_halves(weights: ExpertWeights) -> ExpertWeights:
    """[up; gate] where [gate; up] belongs, scales too: a consistent expert with its halves exchanged."""
    width = weights.width
    gate, up = slice_width(weights, 0, width).w13_eFH.split(width, 1)
    changes: dict[str, Any] = {"w13_eFH": torch.cat([up, gate], 1)}
    if weights.s13 is not None:
        first, second = weights.s13.chunk(2, 1)
        changes["s13"] = torch.cat([second, first], 1)
    if weights.b13_eF is not None:
        changes["b13_eF"] = torch.cat(weights.b13_eF.chunk(2, 1)[::-1], 1)
    return weights.with_tensors(**changes)


@lru_cache(maxsize=16)
def inputs_of(
    hidden: int, num_experts: int, top_k: int, inputs: Inputs, on_input: bool = False
) -> tuple[Tensor, Routing]:
    """All tokens, and who goes where: the same on every rank. `on_input`: weights differ though a token has one."""
    generator = torch.Generator().manual_seed(inputs.seed)
    tokens = sum(inputs.counts)
    x = torch.randn(tokens, hidden, generator=generator)
    sizes = MoESpec(hidden=hidden, intermediate=16, num_experts=num_experts, top_k=top_k, weights_on_input=on_input)
    routing = synthetic_routing(sizes, tokens, inputs.skew, inputs.seed)
    hole = torch.rand(routing.ids_TK.shape, generator=generator) < inputs.holes
    if inputs.wild:
        x[hole.all(1)] *= 50  # what a row without any expert holds must not decide how others are rounded
    return x, Routing(routing.ids_TK.masked_fill(hole, -1), routing.weights_TK.masked_fill(hole, float("nan")))


_known: dict[int, dict[Any, Tensor]] = {}


def _shared_by_all(comm: Comm, key: Any, make: Callable[[], Tensor]) -> Tensor:
    """`make()` computed on one rank, another one each time, and known to all from then on."""
    known = _known.setdefault(comm.world, {})  # all ranks of one world have the same history
    if key not in known:
        if comm.world == 1:
            known[key] = make()
        else:
            owner = len(known) % comm.world
            box = [make() if comm.rank == owner else None]
            dist.broadcast_object_list(box, src=owner, group=group_of(comm.world))
            known[key] = box[0]
    return known[key]


def planned(
    spec: MoESpec, parallel: ParallelSpec, exchange: str, backend: str, layout: str, payload: str, combine: str | None
) -> Plan:
    return make_plan(
        spec, parallel, exchange=exchange, backend=backend, token_layout=layout, payload=payload,
        combine_dtype=combine, machine=CPU,
    )  # fmt: skip


# What runs on a CPU is tested here; what the others refuse in test_refused.py, what they compute in tests/gpu.
HERE = tuple(name for name in BACKENDS.names() if BACKENDS.get(name).available("cpu").ok)


def exchanges_for(parallel: ParallelSpec) -> list[str]:
    """All that a CPU can run; `local` is for one rank alone."""
    return [name for name in exchanges_here() if name != "local" or parallel.world == 1]


def expected_payload(spec: MoESpec, parallel: ParallelSpec, exchange: str, backend: str, layout: str, ask: str) -> str:
    """What rows must travel as, from what exchange and backend declare; "illegal" where nothing fits."""
    if parallel.world == 1 or layout == EXCHANGES.get(exchange).token_layout == "replicated":
        return "none"
    if spec.quantized and ask == "auto" and "fp8" in BACKENDS.get(backend).payloads(spec):
        return "fp8"
    return "illegal" if spec.quant == "fp8_tensor_dynamic" else spec.dtype


def oracle_bound(plan: Plan) -> float:
    """What the backend declares; without any rounding to bf16 there is only the order of float32 sums."""
    declared = BACKENDS.get(plan.backend).numerics_of(plan.spec).tolerance
    return 1e-5 if plan.spec.dtype == plan.combine_dtype == "fp32" else declared


def exact_bound(plan: Plan, tokens: int) -> float:
    """The bound is for many tokens; the mean over a few of them scatters around what FP8 costs."""
    label = plan.spec.quant_label
    bound = EXACT_BOUNDS["bf16" if label == "fp32" and plan.combine_dtype == "bf16" else label]
    return bound * (1 + max(tokens, 1) ** -0.5) if plan.spec.quantized else bound


def failures(cases: list[Case], by_rank: list[dict[str, Outcome]]) -> list[str]:
    """A line for each case that is out of its bounds: each rank against the oracle, all together against the exact."""
    lines = []
    for case in cases:
        outcomes = [outcomes[case.name] for outcomes in by_rank]
        for rank, outcome in enumerate(outcomes):
            if outcome.finding:
                lines.append(f"{case.name}: rank {rank}: {outcome.finding}")
            error = _relative(*outcome.oracle)
            if not error <= oracle_bound(case.plan):
                lines.append(f"{case.name}: rank {rank} is off the oracle by {error:.2e} > {oracle_bound(case.plan)}")
        error, bound = exact_error(case, by_rank), exact_bound(case.plan, sum(case.inputs.counts))
        if not error <= bound:
            lines.append(f"{case.name}: off the exact layer by {error:.2e} > {bound:.2e}")
    return lines


def exact_error(case: Case, by_rank: list[dict[str, Outcome]]) -> float:
    pairs = [outcomes[case.name].exact for outcomes in by_rank]
    return _relative(sum(a for a, _ in pairs), sum(b for _, b in pairs))


def _relative(difference: float, size: float) -> float:
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return (difference / size) ** 0.5
