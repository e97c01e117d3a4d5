"""What every rank does for one case: weights, inputs, a check against the oracle, then the clock."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from statistics import median

import torch
from torch import Tensor

from moe_dist.bench.again import again_errors
from moe_dist.bench.case import Case
from moe_dist.bench.check import Errors, worse
from moe_dist.bench.clock import chain_length, time_chain, time_nothing, time_steps
from moe_dist.bench.collectives import prove_collectives
from moe_dist.bench.draws import shortage
from moe_dist.bench.findings import Ran, RankResult
from moe_dist.bench.inputs import Inputs, make_inputs
from moe_dist.bench.loading import Weights, weights_of
from moe_dist.bench.prepared import Kept, Prepared, prepare
from moe_dist.bench.profile import profile_steps
from moe_dist.bench.rounds import Turn
from moe_dist.bench.sketch import sketch, sketch_error
from moe_dist.bench.stack_check import step_errors
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.plan import Plan
from moe_dist.machine.machine import Machine, check_machine
from moe_dist.messages.notices import collecting
from moe_dist.model.sizes import cdiv
from moe_dist.runtime.context import RankContext
from moe_dist.workloads.traces import save_trace

ALONE = Turn()


def ready(context: RankContext, machine: Machine) -> None:
    """Runs on every rank of a new group; collective. Raises ConfigError where the rank's machine is not the plan's, and
    RankFailure where a collective does not give known answers."""
    check_machine(machine, context.device)
    prove_collectives(context)


def measure(context: RankContext, case: Case, plan: Plan, turn: Turn = ALONE) -> RankResult:
    """Runs on every rank of the group, by the one plan that was made for all; collective. What comes back holds this
    turn of the case and those before it. Raises what `ready` raises, where that has not run."""
    with collecting(context.watched_by, warned=True) as said:
        ready(context, plan.machine)
        kept, key = Kept.of(context, turn.batch), repr(case)
        if turn.number == 0:
            step = _first_turn(context, case, plan, turn, kept, key)
        else:
            step = kept.step(context, key, lambda: _step(context, case, plan, turn, _inputs(context, case, plan, turn)))
        _timed(context, case, turn, step, kept, key)
        _again(context, case, step, kept, key)
        result: RankResult = kept.found[key]
        if turn.last:
            profile_steps(context, case, step)
            kept.drop(key)
    return replace(result, notices=tuple(said))


def _first_turn(context: RankContext, case: Case, plan: Plan, turn: Turn, kept: Kept, key: str) -> Prepared:
    """Everything about a case but its times, once."""
    comm, weights = context.comm, weights_of(context, case, plan, turn)
    inputs = _inputs(context, case, plan, turn)
    if case.record_routing is not None and comm.rank == 0:
        layers = zip(*inputs, strict=True)
        save_trace(case.record_routing, [[each.routing for each in layer] for layer in layers], over=True)
    before = _memory(comm.device)
    step = _step(context, case, plan, turn, inputs)
    kept.keep(key, step)
    y_TH, kept.first[key] = _first_outputs(step)
    max_memory = None
    if before is not None:
        held = sum(part.nbytes() for shard, shared, _ in weights for part in (shard, shared) if part)
        max_memory = torch.cuda.max_memory_allocated() - before + held
    groups = [
        [_serving_groups(layer, plan, each) for layer, each in zip(step.layers, layers, strict=True)]
        for layers in inputs
    ]
    errors = Errors()
    if case.check:
        context.progress(f"{case.label}: checking against the oracle")
        errors = _checked(context, case, step, inputs, weights, groups, y_TH)
    by_layer = [
        _work(plan, comm.rank, each, groups_TK)
        for layers, of_layers in zip(inputs, groups, strict=True)
        for each, groups_TK in zip(layers, of_layers, strict=True)
    ]
    stages_us, unstaged_us = step.staged(case.iters)
    kept.found[key] = RankResult(
        rounds_us=[],
        stages_us=stages_us,
        unstaged_us=unstaged_us,
        bytes_sent=step.sent(),
        rows=sum(rows for rows, _ in by_layer),
        active_experts=max(active for _, active in by_layer),
        by_layer=tuple(by_layer),
        **vars(errors),
        max_memory=max_memory,
        ran=Ran.by(step),
        config=step.config_sources(),
        trace_short=shortage(plan.spec, case.workload, case.layers),
    )
    return step


def _first_outputs(step: Prepared) -> tuple[Tensor, list[Tensor]]:
    """The output by the first routing, in a graph's buffer until the next replay, and sketches of those by all."""
    sketches = []
    for number in reversed(range(len(step.steps))):
        step.take(number)
        y_TH = step.call()
        sketches.append(sketch(step.added(y_TH, step.x)))
    return y_TH, sketches[::-1]


def _checked(
    context: RankContext,
    case: Case,
    step: Prepared,
    inputs: list[list[Inputs]],
    weights: list[Weights],
    groups: list[list[Tensor]],
    y_TH: Tensor,
) -> Errors:
    """Of the first routing, whose output is `y_TH`, and of the one in the middle where there are several."""
    errors = step_errors(context, case, step, inputs[0], weights, groups[0], y_TH)
    if middle := len(inputs) // 2:
        step.take(middle)
        of_middle = case.with_changes(step=middle), step, inputs[middle], weights, groups[middle], step.call()
        errors = worse(errors, step_errors(context, *of_middle))
    return errors


def _timed(context: RankContext, case: Case, turn: Turn, step: Prepared, kept: Kept, key: str) -> None:
    """A round's iterations, or the queues of steps; and whether the last of either gave what the step gave first."""
    iters, queues = turn.iters(case.iters), turn.queues if case.iters else 0
    if not iters and not queues:
        return
    comm, found, captured = context.comm, kept.found[key], step.graph is not None
    clock_us = _clock_us(context, captured)
    what = f", round {turn.number + 1} of {turn.of}" if iters else ", steps in queues"
    context.progress(f"{case.label}: timing{what if turn.of > 1 else ''}")
    for _ in range(case.warmup if turn.number == 0 else min(case.warmup, 1)):
        step.call()
    last: list[Tensor] = []
    rounds_us, chained_us, err_repeat = found.rounds_us, found.chained_us, found.err_repeat or 0.0
    done = sum(map(len, rounds_us))  # steps take the routings in turn from round to round

    def call() -> None:
        last[:] = [step.call()]

    def before(number: int) -> None:
        step.take((done + number) % len(step.steps))

    def changed() -> float:
        return sketch_error(comm, sketch(step.added(last[0], step.x)), kept.first[key][step.number])

    if iters:
        rounds_us = [*rounds_us, time_steps(comm, call, iters, captured, before)]
        err_repeat = max(changed(), err_repeat)
    steps = None
    if queues:
        steps = chain_length(comm, median(chain(*rounds_us)))
        for _ in range(queues if comm.device.type == "cuda" else cdiv(queues, 2)):  # comparisons on a CPU stay quick
            chained_us = (*chained_us, time_chain(comm, call, steps, captured))
            err_repeat = max(changed(), err_repeat)
    kept.found[key] = replace(
        found,
        rounds_us=rounds_us,
        chained_us=chained_us,
        chained_steps=steps,
        clock_us=clock_us,
        err_repeat=err_repeat,
        config=tuple(dict.fromkeys((*found.config, *step.config_sources()))),
    )


def _clock_us(context: RankContext, captured: bool) -> float:
    """What the clock itself costs, found once for a group and mode."""
    known: dict[bool, float] = context.memo.setdefault("clock_us", {})
    if captured not in known:
        known[captured] = time_nothing(context.comm, captured)
    return known[captured]


def _again(context: RankContext, case: Case, step: Prepared, kept: Kept, key: str) -> None:
    """Whether the step that was timed computes: on changed inputs, and then on its own once more."""
    context.progress(f"{case.label}: on changed inputs")
    err_again, err_repeat = again_errors(step, kept.first[key][step.number])
    found: RankResult = kept.found[key]
    kept.found[key] = replace(
        found,
        err_again=max(err_again, found.err_again or 0.0),
        err_repeat=max(err_repeat, found.err_repeat or 0.0),
    )


def _inputs(context: RankContext, case: Case, plan: Plan, turn: Turn) -> list[list[Inputs]]:
    weights = weights_of(context, case, plan, turn)
    context.progress(f"{case.label}: inputs")
    return make_inputs(case, plan, context.comm, [router for _, _, router in weights])


def _step(context: RankContext, case: Case, plan: Plan, turn: Turn, inputs: list[list[Inputs]]) -> Prepared:
    weights = weights_of(context, case, plan, turn)
    made = [MoELayer(plan, shard, context.comm, shared=shared) for shard, shared, _ in weights]
    bucket = max(stop - start for start, stop in inputs[0][0].bounds)
    x_TH, steps = inputs[0][0].mine()[0], [[each.mine()[1] for each in layers] for layers in inputs]
    return prepare(context, case, made, [shard for shard, _, _ in weights], x_TH, steps, bucket)


def _work(plan: Plan, rank: int, inputs: Inputs, groups_TK: Tensor) -> tuple[int, int]:
    """A layer's pairs on this rank, and its experts that have any."""
    here_TK = groups_TK == rank // plan.placement.tp
    return int(here_TK.sum()), int(inputs.routing.ids_TK[here_TK].unique().numel())


def _memory(device: torch.device) -> int | None:
    """Bytes in use on a GPU; the peak counts from here."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _serving_groups(layer: MoELayer, plan: Plan, inputs: Inputs) -> Tensor:
    rows, sources = layer.exchange.identify(inputs.runs)
    device = inputs.x_TH.device
    sources = None if sources is None else sources.to(device)
    return plan.placement.serving_groups(inputs.routing.ids_TK, rows.to(device), sources)
