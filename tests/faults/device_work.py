"""What ranks do on their devices between faults: the ten steps of `work`, by two exchanges, eagerly and as replays of a
CUDA graph. On a CPU, to try all of it without a GPU, a step that runs as if captured stands for a graph."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from faults.inject import Injector
from faults.kinds import Fault
from faults.work import BUCKET, SEED, SPEC, STEPS, inputs
from torch import Tensor

from moe_dist.engine.graph import StepGraph
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.machine.machine import Machine
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import shard
from moe_dist.runtime.context import RankContext
from moe_dist.workloads.random_weights import random_weights

MODES = ("eager", "graph")
Step = Callable[[Tensor, Routing], Tensor]


@dataclass(frozen=True)
class Setup:
    spec: MoESpec
    exchanges: tuple[str, ...]
    backend: str

    @property
    def works(self) -> list[tuple[str, str]]:
        """(exchange, mode) of all steps."""
        return [(exchange, mode) for exchange in self.exchanges for mode in MODES]


ON_GPUS = Setup(MoESpec(hidden=1024, intermediate=512, num_experts=16, top_k=4), ("ag_rs", "nvlink"), "triton")
ON_A_CPU = Setup(SPEC, ("ag_rs", "all_to_all"), "torch")


def load(context: RankContext, fault: Fault, setup: Setup) -> None:
    """All layers and graphs, into the memo; what compiles at first use has compiled then."""
    injector, comm, device = Injector(fault, context.rank, context), context.comm, context.device
    weights = random_weights(setup.spec, SEED, device)
    injector.at("loading")
    steps: dict[tuple[str, str], Step] = {}
    for exchange in setup.exchanges:
        plan = make_plan(
            setup.spec,
            ParallelSpec(ep=context.world),
            exchange=exchange,
            backend=setup.backend,
            machine=Machine.detect(device.type),
        )
        layer = MoELayer(plan, shard(weights, plan.placement, context.rank), comm)
        x_TH, routing = _inputs(context, setup, 0)
        layer.warm_up(x_TH, routing, BUCKET)
        steps[exchange, "eager"] = partial(layer, max_tokens_per_rank=BUCKET)
        steps[exchange, "graph"] = (
            StepGraph(layer, BUCKET, x_TH, routing)
            if device.type == "cuda"
            else partial(layer, max_tokens_per_rank=BUCKET, captured=True)
        )
    context.memo["steps"] = steps, setup
    comm.barrier()


def work(context: RankContext, fault: Fault, exchange: str, mode: str) -> str:
    """The digest of this rank's outputs. A fault comes before a step is launched, or after that and before its host
    waits for it."""
    steps, setup = context.memo["steps"]
    step, injector = steps[exchange, mode], Injector(fault, context.rank, context)
    context.progress(f"ten steps of {exchange}, {mode}", fault.limit_s)
    digest = hashlib.sha256()
    for number in range(STEPS):
        given = _inputs(context, setup, number)
        injector.at("between", number)
        arrived = context.comm.to_host(step(*given).view(torch.int16))
        injector.at("launched", number)
        digest.update(repr(arrived()).encode())
    return digest.hexdigest()


def _inputs(context: RankContext, setup: Setup, number: int) -> tuple[Tensor, Routing]:
    x_TH, routing = inputs(number, context.rank, context.world, setup.spec)
    return x_TH.to(context.device), routing.to(context.device)
