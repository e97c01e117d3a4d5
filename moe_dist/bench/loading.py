"""The weights of a case: this rank's shards and, of a checkpoint, its router."""

from __future__ import annotations

import gc

from moe_dist.bench.case import Case
from moe_dist.bench.rounds import Turn
from moe_dist.checkpoint import load_router, load_shard, load_shared_shard
from moe_dist.engine.plan import Plan, shared_placement
from moe_dist.engine.router import Router
from moe_dist.model.weights import ExpertWeights, shard_from, slice_width
from moe_dist.runtime.context import RankContext
from moe_dist.workloads.random_weights import random_expert

Weights = tuple[ExpertWeights, ExpertWeights | None, Router | None]


def weights_of(context: RankContext, case: Case, plan: Plan, turn: Turn) -> list[Weights]:
    """This rank's shard of each layer, made once for all cases of one placement in a batch; others' are dropped
    first."""
    layers = [case.at(number) for number in range(case.layers)]
    keys = [f"{each.model!r} {each.source!r} {each.depth} {each.parallel!r}" for each in layers]
    known: dict[str, Weights] = context.memo.setdefault("weights", {})
    if turn.batch is None or context.memo.get("weights_of") != turn.batch:
        others = set(known) - set(keys)
        for other in others:
            del known[other]
        context.memo["weights_of"] = turn.batch
        if others:  # a tenth of a second, which a case of many in a row would feel
            gc.collect()
    for key, layer in zip(keys, layers, strict=True):
        if key not in known:
            known[key] = _load(context, layer, plan)
    return [known[key] for key in keys]


def _load(context: RankContext, case: Case, plan: Plan) -> Weights:
    comm, source, placement = context.comm, case.source, plan.placement
    total, done, seed = len(placement.experts_of(comm.rank)), 0, source.seed
    of_layer = f"{case.model.name} {case.parallel.label}" + (f" layer {case.depth} of the stack" if case.depth else "")

    def seen() -> None:
        nonlocal done
        done += 1
        context.progress(f"{of_layer}: expert {done} of {total}")

    slice_of_shared = _shared_slice(plan, comm.rank)
    shared = router = None
    if source.checkpoint is None or source.layer is None:

        def draw(expert: int) -> ExpertWeights:
            return random_expert(case.model, expert, seed, comm.device, layer=case.depth)

        shard = shard_from(draw, placement, comm.rank, seen)
        if slice_of_shared is not None:
            shared_spec, number = case.model.shared_spec(), case.model.num_experts
            whole = random_expert(shared_spec, number, seed, comm.device, layer=case.depth)
            shared = slice_width(whole, *slice_of_shared)
    else:
        shard = load_shard(source.checkpoint, source.layer, placement, comm.rank, comm.device, seen)
        stored = load_router(source.checkpoint, source.layer, comm.device)
        router = Router(plan, stored.gate_EH, stored.bias_E, stored.logit_bias_E)
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
