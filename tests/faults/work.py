"""What the ranks of a fault test do: a small FP8 MoE layer, ten steps of changing sizes and skew, a digest of what came
out, and a fault on the way."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from faults.inject import Injector, Left
from faults.kinds import Fault
from torch import Tensor

from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import shard
from moe_dist.runtime.context import RankContext
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

SPEC = MoESpec(hidden=128, intermediate=256, num_experts=8, top_k=2)  # FP8 in blocks of 128 × 128
STEPS, SEED = 10, 7
SKEWS = ("uniform", "zipf:1.2", "hot:1")
BUCKET = 16  # the most tokens of a rank in a step
EXCHANGES = ("ag_rs", "all_to_all")


def load(context: RankContext, fault: Fault) -> None:
    """The layer, into the memo; a fault of the moment `loading` comes when the weights are half there."""
    injector = Injector(fault, context.rank, context)
    plan = make_plan(
        SPEC, ParallelSpec(ep=context.world), exchange=EXCHANGES[fault.number % len(EXCHANGES)], backend="torch"
    )
    weights = random_weights(SPEC, seed=SEED)
    injector.at("loading")
    own = shard(weights, plan.placement, context.rank)
    context.memo["layer"] = MoELayer(plan, own, context.comm)
    context.comm.barrier()


def work(context: RankContext, fault: Fault) -> str:
    """The digest of this rank's outputs. The limit of a step is what names a rank that lives and does not come."""
    layer, injector = context.memo["layer"], Injector(fault, context.rank, context)
    context.progress("ten steps", fault.limit_s)
    digest = hashlib.sha256()
    try:
        for number in range(STEPS):
            injector.at("between", number)
            x_TH, routing = injector.given(*inputs(number, context.rank, context.world), number)
            with injector.within(number, layer):
                y_TH = layer(x_TH, routing, max_tokens_per_rank=BUCKET + 1, captured=number % 2 == 1)
            digest.update(y_TH.view(torch.uint8).numpy().tobytes())
        injector.at("ending")
    except Left:
        return "left early"
    return digest.hexdigest()


def inputs(number: int, rank: int, world: int, spec: MoESpec = SPEC) -> tuple[Tensor, Routing]:
    """This rank's tokens of a step, and where they go: 0 to BUCKET tokens, another skew each step."""
    x, routing = global_inputs(number, world, spec)
    counts = counts_of(number, world)
    start, stop = sum(counts[:rank]), sum(counts[: rank + 1])
    return x[start:stop], routing.rows(start, stop)


def counts_of(number: int, world: int) -> list[int]:
    """Of each rank's tokens."""
    return Stream("tokens of a fault test", SEED, number).integers(BUCKET + 1, world).tolist()


def global_inputs(number: int, world: int, spec: MoESpec = SPEC) -> tuple[Tensor, Routing]:
    tokens = sum(counts_of(number, world))
    x = Stream("rows of a fault test", SEED, number).normal(tokens, spec.hidden).bfloat16()
    routing = synthetic_routing(spec, max(1, tokens), SKEWS[number % len(SKEWS)], SEED + number)
    return x, routing.rows(0, tokens)


def healthy(**changes: Any) -> Fault:
    return Fault(**{"number": 0, "kind": "none", "moment": "between", "at": 0, "rank": 0, "world": 2} | changes)
