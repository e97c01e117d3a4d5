"""A case ready to run on one rank, and what a rank keeps of it from turn to turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from moe_dist.bench.case import Case
from moe_dist.bench.clock import time_steps
from moe_dist.engine.graph import Routings, StepGraph
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.stack import MoEStack
from moe_dist.model.routing import Routing
from moe_dist.model.weights import ExpertWeights
from moe_dist.oracle.numerics import Numerics
from moe_dist.peers import PeerCase
from moe_dist.peers.module import PeerModule
from moe_dist.runtime.context import RankContext
from moe_dist.step import NO_STAGES, Stages

STAGE_ITERS = 10  # steps with stage clocks on, apart from the timed ones because clocks cost time
SMALL = 32 << 20  # bytes of a step's shards: on a CPU one of more is made anew, as backends keep copies of weights
SPARE = 0.25  # of a GPU's memory: with less left, steps are made anew


@dataclass
class Prepared:
    """One step on fixed tokens, of one layer or of a stack: `call` runs it eagerly or replays `graph`. Each layer has
    its shard. `steps`: the routings that steps take in turn, each with one for every layer; `number` is that of now."""

    layers: Sequence[MoELayer]
    shards: list[ExpertWeights]
    x: Tensor
    steps: list[list[Routing]]
    bucket: int
    module: MoELayer | MoEStack | PeerModule
    graph: StepGraph | None
    number: int = 0

    def __post_init__(self) -> None:
        self._gate_first = [shard.gate_first for shard in self.shards]
        self.comm = self.module.comm

    @property
    def numerics(self) -> Numerics:
        """Where what runs rounds."""
        return self.module.peer.numerics if isinstance(self.module, PeerModule) else self.layers[0].backend.numerics

    @property
    def stacked(self) -> bool:
        return len(self.layers) > 1

    @property
    def routings(self) -> list[Routing]:
        """Of each layer, now."""
        return self.steps[self.number]

    def take(self, number: int) -> None:
        """Go by another one of the routings from now on; a graph gets a copy. Not to be timed."""
        if number != self.number:
            self.number = number
            if self.graph is not None:
                self.graph.fill(self.x, routed(self.module, self.routings))

    def call(self) -> Tensor:
        if self.graph is not None:
            return self.graph.replay()[: len(self.x)]
        y_TH: Tensor = self.module(self.x, routed(self.module, self.routings), max_tokens_per_rank=self.bucket)
        return y_TH

    @property
    def stale(self) -> bool:
        """Another backend has turned the weights that this one was prepared with."""
        return [shard.gate_first for shard in self.shards] != self._gate_first

    def sent(self) -> int:
        """The bytes that this rank sends in a step, counted in one more of each routing: their mean."""
        total = 0
        for number in range(len(self.steps)):
            self.take(number)
            before = self.comm.bytes_sent
            self._eagerly()
            total += self.comm.bytes_sent - before + sum(layer.exchange.stored_bytes() for layer in self.layers)
        self.take(0)
        return round(total / len(self.steps))

    def staged(self, iters: int) -> tuple[dict[str, float], float | None]:
        """Median microseconds of each stage, and in none, over a few of `iters` further steps, run as the timed ones
        are; nothing and None without any. A step's time and its stages are taken in that same step: stamps cost time,
        so other steps' time less these stages would say nothing."""
        totals: list[dict[str, float]] = []
        unstaged: list[float] = []
        stages = Stages(True, self.comm.device)
        graph = self.graph.with_stages() if self.graph and iters else None
        step = graph.replay if graph else lambda: self._eagerly(stages)
        for number in range(0 if isinstance(self.module, PeerModule) else min(iters, STAGE_ITERS)):
            self.take(number % len(self.steps))
            (whole,) = time_steps(self.comm, step, 1, queued=graph is not None)
            totals.append(graph.totals_us() if graph else stages.totals_us())
            unstaged.append(whole - sum(totals[-1].values()))
        self.take(0)
        if not totals:
            return {}, None
        return {name: median(total[name] for total in totals) for name in totals[0]}, median(unstaged)

    def on(self, x: Tensor, routings: Sequence[Routing]) -> Tensor:
        """The step on these inputs, of as many tokens as its own; a graph keeps them for its next replays. What a
        graph does not compute anew is NaN."""
        given = routed(self.module, routings)
        if self.graph is None:
            y_TH: Tensor = self.module(x, given, max_tokens_per_rank=self.bucket)
            return y_TH
        self.graph.replay().fill_(float("nan"))
        return self.graph(x, given)

    def added(self, y_TH: Tensor, x_TH: Tensor) -> Tensor:
        """What the layers made of a step's output on `x_TH`: without a stack's residual, beside which their errors
        would be small."""
        return y_TH.float() - x_TH.float() if self.stacked else y_TH

    def alone(self, number: int, x: Tensor) -> Tensor:
        """One layer on this rank's `x`, eagerly, as the step has it."""
        layer, routing, captured = self.layers[number], self.routings[number], self.graph is not None
        y_TH: Tensor = layer(x, routing, max_tokens_per_rank=self.bucket, captured=captured)
        return y_TH

    def config_sources(self) -> tuple[str, ...]:
        """See Backend.config_sources; the shared experts' too."""
        backends = (backend for layer in self.layers for backend in (layer.backend, layer.shared))
        return tuple(dict.fromkeys(source for each in backends if each for source in each.config_sources()))

    def _eagerly(self, stages: Stages = NO_STAGES) -> None:
        """As the graph has it, where there is one: the bytes of a captured step are those of the same splits."""
        given, captured = routed(self.module, self.routings), self.graph is not None
        self.module(self.x, given, max_tokens_per_rank=self.bucket, captured=captured, stages=stages)


def routed(module: MoELayer | MoEStack | PeerModule, routings: Sequence[Routing]) -> Routings:
    """In the form that `module` takes."""
    return routings if isinstance(module, MoEStack) else routings[0]


def prepare(
    context: RankContext,
    case: Case,
    layers: Sequence[MoELayer],
    shards: list[ExpertWeights],
    x: Tensor,
    steps: list[list[Routing]],
    bucket: int,
) -> Prepared:
    """Collective, compiles what is compiled at first use. Of a peer's case `layers` has the one that it stands for."""
    context.progress(f"{case.label}: warming up")
    module: MoELayer | MoEStack | PeerModule = MoEStack(layers) if len(layers) > 1 else layers[0]
    if case.peer is not None:
        module = _of_peer(case.peer, layers[0], shards[0], bucket)
    if layers[0].plan.graph:
        context.progress(f"{case.label}: capturing")
        graph = StepGraph(module, bucket, x, routed(module, steps[0]))
        return Prepared(layers, shards, x, steps, bucket, module, graph)
    for routings in steps:  # each may bring other numbers of rows
        module.warm_up(x, routed(module, routings), bucket)  # type: ignore[arg-type]
    return Prepared(layers, shards, x, steps, bucket, module, None)


def _of_peer(name: str, layer: MoELayer, shard: ExpertWeights, bucket: int) -> PeerModule:
    plan, comm = layer.plan, layer.comm
    given = plan.spec, plan.placement, comm.rank, shard, comm.process_group, comm.device, bucket
    return PeerModule(name, PeerCase(*given), comm)


@dataclass
class Kept:
    """What one batch's cases leave for their next turns. `first`: a sketch of a case's first output by each routing;
    `found`: what was measured so far."""

    batch: int | None
    steps: dict[str, Prepared] = field(default_factory=dict)
    first: dict[str, list[Tensor]] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, context: RankContext, batch: int | None) -> Kept:
        """Another batch's is dropped."""
        kept = context.memo.get("kept")
        if kept is None or batch is None or kept.batch != batch:
            context.memo.pop("kept", None)
            if kept is not None and kept.steps:
                del kept
                gc.collect()
            kept = context.memo["kept"] = Kept(batch)
        return kept

    def step(self, context: RankContext, key: str, make: Callable[[], Prepared]) -> Prepared:
        """The one that is kept, or a new one if that is missing or stale on any rank: making one is collective."""
        step = self.steps.get(key)
        anew = context.comm.agree_max(int(step is None or step.stale))
        if step is None or anew:
            self.steps.pop(key, None)
            del step
            step = make()
            self.keep(key, step)
        return step

    def keep(self, key: str, step: Prepared) -> None:
        """As long as there is room."""
        if _room(step.shards):
            self.steps[key] = step

    def drop(self, key: str) -> None:
        for kept in (self.steps, self.first, self.found):
            kept.pop(key, None)


def _room(shards: list[ExpertWeights]) -> bool:
    if shards[0].device.type != "cuda":
        return sum(shard.nbytes() for shard in shards) <= SMALL
    free, total = torch.cuda.mem_get_info(shards[0].device)
    return free >= SPARE * total
