"""What every rank does for one case: weights, inputs, a check against the oracle, then the clock."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from moe_dist.bench.case import Case
from moe_dist.bench.clock import time_steps
from moe_dist.bench.whole_experts import whole_error
from moe_dist.checkpoint import load_router, load_shard, load_shared_shard
from moe_dist.comm import Comm
from moe_dist.graph import StepGraph
from moe_dist.layer import MoELayer, Router
from moe_dist.placement import Placement
from moe_dist.plan import Machine, Plan, shared_placement
from moe_dist.reference import Numerics, ScaledBy, oracle_partial
from moe_dist.routing import Routing, synthetic_routing
from moe_dist.runtime.context import RankContext
from moe_dist.spec import ParallelSpec, split_bounds
from moe_dist.stages import Stages
from moe_dist.streams import Stream
from moe_dist.weights import ExpertWeights, random_expert, shard_from, slice_width

STAGE_ITERS = 10  # steps with stage clocks on, apart from the timed ones because clocks cost time


@dataclass(frozen=True)
class RankResult:
    """One rank's findings. `times_us`: one entry an iteration. `stages_us`: medians. Errors are the whole group's.
    `max_memory`: bytes of a GPU, the weights and the most that making and running the step took beside them."""

    times_us: list[float]
    stages_us: dict[str, float]
    bytes_sent: int
    rows: int
    active_experts: int
    err_oracle: float | None
    err_exact: float | None
    err_whole: float | None
    max_memory: int | None
    payload: str
    combine_dtype: str
    splits: str | None


@dataclass(frozen=True)
class Inputs:
    """Tokens of the whole group, `bounds[r]` being rank r's run of them (all of them where tokens are replicated)."""

    x_TH: Tensor
    routing: Routing
    bounds: list[tuple[int, int]]
    rank: int
    sharded: bool

    def mine(self) -> tuple[Tensor, Routing]:
        if not self.sharded:
            return self.x_TH, self.routing
        start, stop = self.bounds[self.rank]
        return self.x_TH[start:stop].contiguous(), self.routing.rows(start, stop)


def measure(context: RankContext, case: Case) -> RankResult:
    """Runs on every rank of the group; collective."""
    comm = context.comm
    plan = case.plan(Machine.detect(comm.device.type))
    shard, shared, router = _weights(context, case, plan)
    context.progress(f"{case.label}: inputs")
    inputs = make_inputs(case, plan, comm, router)
    before = _memory(comm.device)
    layer = MoELayer(plan, shard, comm, shared=shared, stages=Stages(device=comm.device))

    x_TH, routing = inputs.mine()
    bucket = max(stop - start for start, stop in inputs.bounds)
    step, graph = _step(context, case, layer, x_TH, routing, bucket)
    y_TH = step()
    max_memory = None
    if before is not None:
        max_memory = torch.cuda.max_memory_allocated() - before + shard.nbytes() + (shared.nbytes() if shared else 0)
    groups_TK = _serving_groups(layer, plan, inputs)
    err_oracle = err_exact = err_whole = None
    if case.check:
        context.progress(f"{case.label}: checking against the oracle")
        err_oracle, err_exact, err_whole = _errors(context, case, layer, inputs, shard, shared, groups_TK, y_TH)
    context.progress(f"{case.label}: timing")
    layer.exchange.static = plan.graph  # the bytes of a captured step are those of the same splits, sent eagerly
    for _ in range(case.warmup if case.iters else 0):
        step()
    times = time_steps(comm, step, case.iters, queued=plan.graph)
    here_TK = groups_TK == comm.rank // plan.placement.tp
    return RankResult(
        times_us=times,
        stages_us=_staged(layer, x_TH, routing, bucket, case, graph),
        bytes_sent=_sent(layer, x_TH, routing, bucket),
        rows=int(here_TK.sum()),
        active_experts=int(inputs.routing.ids_TK[here_TK].unique().numel()),
        err_oracle=err_oracle,
        err_exact=err_exact,
        err_whole=err_whole,
        max_memory=max_memory,
        payload=plan.payload,
        combine_dtype=plan.combine_dtype,
        splits=layer.exchange.splits(bucket),
    )


def _memory(device: torch.device) -> int | None:
    """Bytes in use on a GPU; the peak counts from here."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _step(
    context: RankContext, case: Case, layer: MoELayer, x: Tensor, routing: Routing, bucket: int
) -> tuple[Callable[[], Tensor], StepGraph | None]:
    """One step on fixed inputs: eager, or a graph's replay."""
    context.progress(f"{case.label}: warming up")
    if not layer.plan.graph:
        layer.warm_up(x, routing, bucket)
        return lambda: layer(x, routing, max_tokens_per_rank=bucket), None
    context.progress(f"{case.label}: capturing")
    graph = StepGraph(layer, bucket, x, routing)
    return lambda: graph.replay()[: len(x)], graph


def _weights(context: RankContext, case: Case, plan: Plan) -> tuple[ExpertWeights, ExpertWeights | None, Router | None]:
    """This rank's shard, made once for all cases of one placement; the previous placement's is dropped first."""
    key = f"{case.model!r} {case.source!r} {case.parallel!r}"
    if context.memo.get("weights_key") != key:
        context.memo.clear()
        gc.collect()
        context.memo["weights"] = _load(context, case, plan)
        context.memo["weights_key"] = key
    weights: tuple[ExpertWeights, ExpertWeights | None, Router | None] = context.memo["weights"]
    return weights


def _load(context: RankContext, case: Case, plan: Plan) -> tuple[ExpertWeights, ExpertWeights | None, Router | None]:
    comm, source, placement = context.comm, case.source, plan.placement
    total, done = len(placement.experts_of(comm.rank)), 0

    def seen() -> None:
        nonlocal done
        done += 1
        context.progress(f"{case.model.name} {case.parallel.label}: expert {done} of {total}")

    slice_of_shared = _shared_slice(plan, comm.rank)
    shared = router = None
    if source.checkpoint is None or source.layer is None:
        shard = shard_from(
            lambda expert: random_expert(case.model, expert, source.seed, comm.device), placement, comm.rank, seen
        )
        if slice_of_shared is not None:
            whole = random_expert(case.model.shared_spec(), case.model.num_experts, source.seed, comm.device)
            shared = slice_width(whole, *slice_of_shared)
    else:
        shard = load_shard(source.checkpoint, source.layer, placement, comm.rank, comm.device, seen)
        stored = load_router(source.checkpoint, source.layer, comm.device)
        router = Router(plan, stored.gate_EH, stored.bias_E)
        if slice_of_shared is not None:
            shared = load_shared_shard(source.checkpoint, source.layer, *slice_of_shared, comm.device)
    if source.checkpoint is None:  # a checkpoint's tensors were checked as they were read, by name
        shard.check_finite(placement.experts_of(comm.rank))
        if shared is not None:
            shared.check_finite()
    return shard, shared, router


def _shared_slice(plan: Plan, rank: int) -> tuple[int, int] | None:
    """Which columns of the shared expert `rank` holds."""
    if plan.spec.shared_experts == "none":
        return None
    return shared_placement(plan.spec, plan.parallel).slice_of(rank)


def make_inputs(case: Case, plan: Plan, comm: Comm, router: Router | None) -> Inputs:
    """Dense Gaussian tokens drawn from the seed, the same on every rank; routing by the case's skew."""
    work, spec = case.workload, plan.spec
    x_TH = Stream("tokens", work.seed, device=comm.device).normal(work.tokens, spec.hidden).to(spec.torch_dtype)
    if work.skew == "router" and router is not None:
        routing = router(x_TH)
    else:
        routing = synthetic_routing(spec, work.tokens, work.skew, work.seed).to(comm.device)
    sharded = work.token_layout == "sharded"
    bounds = split_bounds(work.tokens, comm.world) if sharded else [(0, work.tokens)] * comm.world
    return Inputs(x_TH, routing, bounds, comm.rank, sharded)


def _serving_groups(layer: MoELayer, plan: Plan, inputs: Inputs) -> Tensor:
    rows, sources = layer.exchange.identify(inputs.bounds if inputs.sharded else inputs.bounds[:1])
    device = inputs.x_TH.device
    sources = None if sources is None else sources.to(device)
    return plan.placement.serving_groups(inputs.routing.ids_TK, rows.to(device), sources)


def _errors(
    context: RankContext,
    case: Case,
    layer: MoELayer,
    inputs: Inputs,
    shard: ExpertWeights,
    shared: ExpertWeights | None,
    groups_TK: Tensor,
    y_TH: Tensor,
) -> tuple[float, float, float]:
    """The group's relative L2 error against the oracle and against the exact layer, and what the exact layer differs
    from whole experts by. Each rank computes its own partial in float32 and they are added up: the check holds at sizes
    where no device could hold the whole layer."""
    plan = layer.plan
    sources = layer.exchange.quantized_together(inputs.bounds if inputs.sharded else inputs.bounds[:1])
    start, stop = inputs.bounds[inputs.rank]

    def expected(numerics: Numerics | None) -> Tensor:
        # One expectation serves all exchanges, backends and modes that must give the same: it takes longer than they.
        dynamic = plan.spec.quant == "fp8_tensor_dynamic" and numerics is not None
        sensitive = (sources, layer.exchange.scaled_by) if dynamic else None
        copies = plan.exchange if plan.placement.replicated else None
        key = f"{case.workload!r} {numerics} {sensitive} {copies}"
        kept: dict[str, Tensor] = context.memo.setdefault("expected", {})
        if key not in kept:
            if any(not known.startswith(repr(case.workload)) for known in kept):
                kept.clear()  # another workload's: they are large
            scaled_by = layer.exchange.scaled_by
            kept[key] = _expected(layer.comm, plan, inputs, shard, shared, groups_TK, sources, numerics, scaled_by)
        return kept[key]

    def error(numerics: Numerics | None) -> float:
        return _group_error(layer.comm, y_TH, expected(numerics)[start:stop])

    err_whole = whole_error(context, case, inputs.x_TH, inputs.routing, groups_TK, expected(None))
    return error(layer.backend.numerics), error(None), err_whole


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
    spec, x, rank = plan.spec, inputs.x_TH, comm.rank
    partial = oracle_partial(
        x, inputs.routing, shard, spec, plan.placement, rank, sources, groups_TK, numerics, scaled_by
    )
    if shared is not None and (spec.shared_experts == "tp" or rank == 0):
        alone = Placement.build(spec.shared_spec(), ParallelSpec())
        everyone = torch.zeros(len(x), 1, dtype=torch.int32, device=x.device)
        one = Routing(everyone, torch.ones_like(everyone, dtype=torch.float32))
        if spec.shared_experts == "replicated":  # each rank feeds it the tokens as they came, before any exchange
            sources = inputs.bounds if inputs.sharded else inputs.bounds[:1]
        of_shared = spec.shared_spec()
        partial += oracle_partial(x, one, shared, of_shared, alone, 0, sources, everyone.long(), numerics, "all")
    return comm.all_reduce(partial)


def _group_error(comm: Comm, measured: Tensor, expected: Tensor) -> float:
    """||measured - expected|| / ||expected|| over all ranks' tokens, the same on every rank; NaN counts as infinite."""
    difference = (measured.double() - expected.double()).square().sum()
    squares = comm.all_reduce(torch.stack([difference, expected.double().square().sum()])).tolist()
    if not all(value == value and value != float("inf") for value in squares):
        return float("inf")
    if squares[1] == 0:
        return 0.0 if squares[0] == 0 else float("inf")
    return float((squares[0] / squares[1]) ** 0.5)


def _sent(layer: MoELayer, x: Tensor, routing: Routing, bucket: int) -> int:
    """The bytes that this rank sends in a step, counted in one more."""
    before = layer.comm.bytes_sent
    layer(x, routing, max_tokens_per_rank=bucket)
    return layer.comm.bytes_sent - before


def _staged(
    layer: MoELayer, x: Tensor, routing: Routing, bucket: int, case: Case, graph: StepGraph | None
) -> dict[str, float]:
    """Median microseconds of each stage over a few further steps, run as the timed ones were."""
    totals: list[dict[str, float]] = []
    staged = graph.with_stages() if graph and case.iters else None
    for _ in range(min(case.iters, STAGE_ITERS)):
        if staged:
            time_steps(layer.comm, staged.replay, 1, queued=True)
            totals.append(staged.totals_us())
            continue
        layer.comm.barrier()
        with layer.stages.switched_on():
            layer(x, routing, max_tokens_per_rank=bucket)
        totals.append(layer.stages.totals_us())
    return {name: median(total[name] for total in totals) for name in totals[0]} if totals else {}


def merge(results: list[RankResult]) -> dict[str, Any]:
    """The group's figures: an iteration is as long as its slowest rank, stages are those of the slowest rank."""
    iterations = [max(times) for times in zip(*(result.times_us for result in results), strict=True)]
    slowest = max(results, key=lambda result: sum(result.stages_us.values()))
    first = results[0]
    return {
        "times_us": iterations,
        "stages_us": slowest.stages_us,
        "bytes_sent": max(result.bytes_sent for result in results),
        "rows_per_rank": [result.rows for result in results],
        "active_experts": max(result.active_experts for result in results),
        "active_per_rank": [result.active_experts for result in results],
        "err_oracle": first.err_oracle,
        "err_exact": first.err_exact,
        "err_whole": first.err_whole,
        "max_memory": max((result.max_memory or 0) for result in results) or None,
        "payload_dtype": first.payload,
        "combine_dtype": first.combine_dtype,
        "splits": first.splits,
    }
