"""What every rank does for one case: weights, inputs, a check against the oracle, then the clock."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_dist.bench.case import Case
from moe_dist.bench.clock import time_steps
from moe_dist.bench.rounds import Turn
from moe_dist.bench.step import Kept, Step, make_step, sampled
from moe_dist.bench.whole_experts import whole_error
from moe_dist.checkpoint import load_router, load_shard, load_shared_shard
from moe_dist.comm import Comm
from moe_dist.layer import MoELayer, Router
from moe_dist.notices import collecting
from moe_dist.placement import Placement
from moe_dist.plan import Machine, Plan, shared_placement
from moe_dist.reference import Numerics, ScaledBy, oracle_partial
from moe_dist.routing import Routing, synthetic_routing
from moe_dist.runtime.context import RankContext
from moe_dist.spec import ParallelSpec, split_bounds
from moe_dist.streams import Stream
from moe_dist.weights import ExpertWeights, random_expert, shard_from, slice_width

Weights = tuple[ExpertWeights, ExpertWeights | None, Router | None]
ALONE = Turn()
ERROR_STEP, LARGEST_ERROR = 1e-9, 1e6  # what is agreed on is a whole number


@dataclass(frozen=True)
class RankResult:
    """One rank's findings. `rounds_us`: an entry for each iteration of each round so far. `stages_us`: medians. Errors
    are the whole group's; `err_repeat` is what lies between the last output, after timing, and the first. `max_memory`:
    bytes of a GPU, the weights and the most that making and running the step took beside them. `config`: see
    Backend.config_sources. `notices`: what this rank had to say in this turn."""

    rounds_us: list[list[float]]
    stages_us: dict[str, float]
    bytes_sent: int
    rows: int
    active_experts: int
    err_oracle: float | None
    err_exact: float | None
    err_whole: float | None
    err_token: float | None
    max_memory: int | None
    payload: str
    combine_dtype: str
    splits: str | None
    err_repeat: float | None = None
    config: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


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


def measure(context: RankContext, case: Case, turn: Turn = ALONE) -> RankResult:
    """Runs on every rank of the group; collective. What comes back holds this turn of the case and those before it."""
    with collecting(context.progress if context.runtime == "ray" else None) as said:  # torchrun's ranks are seen
        kept, key = Kept.of(context, turn.batch), repr(case)
        if turn.number == 0:
            step = _first_turn(context, case, turn, kept, key)
        else:
            step = kept.step(context, key, lambda: _step(context, case, turn, _inputs(context, case, turn)))
        _timed(context, case, turn, step, kept, key)
        result: RankResult = kept.found[key]
        if turn.last:
            kept.drop(key)
    return replace(result, notices=tuple(said))


def _first_turn(context: RankContext, case: Case, turn: Turn, kept: Kept, key: str) -> Step:
    """Everything about a case but its times, once."""
    comm = context.comm
    plan, (shard, shared, _) = _planned(context, case, turn)
    inputs = _inputs(context, case, turn)
    before = _memory(comm.device)
    step = _step(context, case, turn, inputs)
    kept.keep(key, step)
    y_TH = step.call()
    kept.first[key] = sampled(y_TH)
    max_memory = None
    if before is not None:
        max_memory = torch.cuda.max_memory_allocated() - before + shard.nbytes() + (shared.nbytes() if shared else 0)
    groups_TK = _serving_groups(step.layer, plan, inputs)
    err_oracle = err_exact = err_whole = err_token = None
    if case.check:
        context.progress(f"{case.label}: checking against the oracle")
        errors = _errors(context, case, step.layer, inputs, shard, shared, groups_TK, y_TH)
        err_oracle, err_exact, err_whole, err_token = errors
    here_TK = groups_TK == comm.rank // plan.placement.tp
    kept.found[key] = RankResult(
        rounds_us=[],
        stages_us=step.staged(case.iters),
        bytes_sent=step.sent(),
        rows=int(here_TK.sum()),
        active_experts=int(inputs.routing.ids_TK[here_TK].unique().numel()),
        err_oracle=err_oracle,
        err_exact=err_exact,
        err_whole=err_whole,
        err_token=err_token,
        max_memory=max_memory,
        payload=plan.payload,
        combine_dtype=plan.combine_dtype,
        splits=step.layer.exchange.splits(step.bucket, captured=step.graph is not None),
        config=step.config_sources(),
    )
    return step


def _timed(context: RankContext, case: Case, turn: Turn, step: Step, kept: Kept, key: str) -> None:
    """A round's iterations, and whether the last of them gave what the step gave first."""
    iters = turn.iters(case.iters)
    if not iters:
        return
    comm = context.comm
    context.progress(f"{case.label}: timing" + (f", round {turn.number + 1} of {turn.of}" if turn.of > 1 else ""))
    for _ in range(case.warmup if turn.number == 0 else min(case.warmup, 1)):
        step.call()
    last: list[Tensor] = []

    def call() -> None:
        last[:] = [step.call()]

    times = time_steps(comm, call, iters, queued=step.graph is not None)
    err_repeat = _group_error(comm, sampled(last[0]), kept.first[key])
    found: RankResult = kept.found[key]
    kept.found[key] = replace(
        found,
        rounds_us=[*found.rounds_us, times],
        err_repeat=max(err_repeat, found.err_repeat or 0.0),
        config=tuple(dict.fromkeys((*found.config, *step.config_sources()))),
    )


def _inputs(context: RankContext, case: Case, turn: Turn) -> Inputs:
    plan, (_, _, router) = _planned(context, case, turn)
    context.progress(f"{case.label}: inputs")
    return make_inputs(case, plan, context.comm, router)


def _step(context: RankContext, case: Case, turn: Turn, inputs: Inputs) -> Step:
    plan, (shard, shared, _) = _planned(context, case, turn)
    layer = MoELayer(plan, shard, context.comm, shared=shared)
    bucket = max(stop - start for start, stop in inputs.bounds)
    return make_step(context, case, layer, shard, *inputs.mine(), bucket)


def _planned(context: RankContext, case: Case, turn: Turn) -> tuple[Plan, Weights]:
    plan = case.plan(Machine.detect(context.device.type))
    return plan, _weights(context, case, plan, turn)


def _memory(device: torch.device) -> int | None:
    """Bytes in use on a GPU; the peak counts from here."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _weights(context: RankContext, case: Case, plan: Plan, turn: Turn) -> Weights:
    """This rank's shard, made once for all cases of one placement in a batch; others' are dropped first."""
    key = f"{case.model!r} {case.source!r} {case.parallel!r}"
    known: dict[str, Weights] = context.memo.setdefault("weights", {})
    if turn.batch is None or context.memo.get("weights_of") != turn.batch:
        others = set(known) - {key}
        for other in others:
            del known[other]
        context.memo["weights_of"] = turn.batch
        if others:  # a tenth of a second, which a case of many in a row would feel
            gc.collect()
    if key not in known:
        context.memo.setdefault("compared", {}).pop(key, None)  # with whole experts: that was another loading
        known[key] = _load(context, case, plan)
    return known[key]


def _load(context: RankContext, case: Case, plan: Plan) -> Weights:
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
        routing = synthetic_routing(spec, work.tokens, work.skew, work.seed, trace=work.trace).to(comm.device)
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
) -> tuple[float, float, float, float]:
    """The group's relative L2 error against the oracle and against the exact layer, what the exact layer differs from
    whole experts by, and the error of the worst token against the oracle. Each rank computes its own partial in float32
    and they are added up: the check holds at sizes where no device could hold the whole layer."""
    plan = layer.plan
    sources = layer.exchange.quantized_together(inputs.bounds if inputs.sharded else inputs.bounds[:1])
    start, stop = inputs.bounds[inputs.rank]

    def expected(numerics: Numerics | None) -> Tensor:
        # One expectation serves all exchanges, backends and modes that must give the same: it takes longer than they.
        dynamic = plan.spec.quant == "fp8_tensor_dynamic" and numerics is not None
        sensitive = (sources, layer.exchange.scaled_by) if dynamic else None
        copies = plan.exchange if plan.placement.replicated else None
        same = f"{case.model!r} {case.source!r} {case.parallel!r} {case.workload!r}"
        key = f"{same} {numerics} {sensitive} {copies}"
        kept: dict[str, Tensor] = context.memo.setdefault("expected", {})
        if key not in kept:
            if any(not known.startswith(same) for known in kept):
                kept.clear()  # another workload's: they are large
            scaled_by = layer.exchange.scaled_by
            kept[key] = _expected(layer.comm, plan, inputs, shard, shared, groups_TK, sources, numerics, scaled_by)
        return kept[key]

    def error(numerics: Numerics | None) -> float:
        return _group_error(layer.comm, y_TH, expected(numerics)[start:stop])

    err_whole = whole_error(context, case, inputs.x_TH, inputs.routing, groups_TK, expected(None))
    numerics = layer.backend.numerics
    err_token = _worst_token(layer.comm, y_TH, expected(numerics)[start:stop])
    return error(numerics), error(None), err_whole, err_token


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
    """||measured - expected|| / ||expected|| over all ranks' tokens, the same on every rank. NaN and rows that are not
    there count as infinite."""
    if measured.shape != expected.shape:
        measured = torch.full_like(expected, float("inf"))
    difference = (measured.double() - expected.double()).square().sum()
    squares = comm.all_reduce(torch.stack([difference, expected.double().square().sum()])).tolist()
    if not all(value == value and value != float("inf") for value in squares):
        return float("inf")
    if squares[1] == 0:
        return 0.0 if squares[0] == 0 else float("inf")
    return float((squares[0] / squares[1]) ** 0.5)


def _worst_token(comm: Comm, measured: Tensor, expected: Tensor) -> float:
    """The largest relative L2 error of any rank's token, the same on every rank: a lost token's is 1, which the norm
    over thousands of tokens would hide. NaN and rows that are not there count as infinite, 0 / 0 as 0."""
    if measured.shape != expected.shape:
        measured = torch.full_like(expected, float("inf"))
    difference, size = (measured.double() - expected.double()).norm(dim=1), expected.double().norm(dim=1)
    errors = torch.where(difference == 0, torch.zeros_like(size), difference / size).nan_to_num(nan=float("inf"))
    worst = min(float(errors.max()), LARGEST_ERROR) if len(errors) else 0.0
    return comm.agree_max(round(worst / ERROR_STEP)) * ERROR_STEP


def merge(results: list[RankResult]) -> dict[str, Any]:
    """The group's figures: an iteration is as long as its slowest rank, stages are those of the slowest rank."""
    rounds = zip(*(result.rounds_us for result in results), strict=True)
    slowest = max(results, key=lambda result: sum(result.stages_us.values()))
    first = results[0]
    return {
        "rounds_us": [[max(times) for times in zip(*ranks, strict=True)] for ranks in rounds],
        "stages_us": slowest.stages_us,
        "bytes_sent": max(result.bytes_sent for result in results),
        "rows_per_rank": [result.rows for result in results],
        "active_experts": max(result.active_experts for result in results),
        "active_per_rank": [result.active_experts for result in results],
        "err_oracle": first.err_oracle,
        "err_exact": first.err_exact,
        "err_whole": first.err_whole,
        "err_token": first.err_token,
        "max_memory": max((result.max_memory or 0) for result in results) or None,
        "payload_dtype": first.payload,
        "combine_dtype": first.combine_dtype,
        "splits": first.splits,
        "err_repeat": first.err_repeat,
        "config": ", ".join(dict.fromkeys(source for result in results for source in result.config)) or None,
        "notices": said_by(results),
    }


def said_by(results: list[RankResult]) -> dict[str, list[int]]:
    """Each notice once, with the ranks that gave it."""
    found: dict[str, list[int]] = {}
    for rank, result in enumerate(results):
        for text in result.notices:
            found.setdefault(text, []).append(rank)
    return found
