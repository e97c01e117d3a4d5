"""The whole step (exchange, backend, exchange) as one CUDA graph: one launch instead of dozens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from moe_dist.comm import Comm
from moe_dist.comm.symmetric import Symmetric
from moe_dist.engine import replays
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.model.routing import Routing
from moe_dist.step import NO_STAGES, Stages, Support, Workspace, workspace_of
from moe_dist.step.stages import Marks, totals_us

WARM_STEPS = 3  # compile what compiles at first use, and let NCCL connect, before the capture

T = TypeVar("T")
Routings = Routing | Sequence[Routing] | None


class Capturable(Protocol):
    """What a graph can be made of: a MoELayer, whose routing is one Routing, or a MoEStack, which takes one for each
    layer, or None where its routers are part of the graph."""

    comm: Comm

    @property
    def capturable(self) -> Support: ...

    def checked(self, x_TH: Tensor, routing: Any, bucket: int | None, /) -> tuple[Tensor, Any]: ...

    def warm_up(self, x_TH: Tensor, routing: Any, max_tokens_per_rank: int, /, captured: bool = False) -> None: ...

    def __call__(self, *inputs: Any, **step: Any) -> Any: ...


class StepGraph:
    """A captured step of `layer`, a layer or a stack of them, for up to `bucket` tokens on every rank. Making it is
    collective, so is calling it.

    All ranks must use the same bucket. A call pads with tokens of expert -1 and weight 0, which changes no result. The
    result lies in the graph's own buffer until the next call.
    """

    def __init__(self, layer: Capturable, bucket: int, x_TH: Tensor, routing: Routings = None) -> None:
        """`x_TH` and `routing` are a sample to warm up on; later calls take a routing of the same form. Raises
        UnsupportedError if the step can't be captured."""
        capturable = layer.capturable
        if not capturable.ok:
            raise UnsupportedError("a CUDA graph of this step", [capturable.reason])
        device = layer.comm.device
        self.bucket, self._layer = bucket, layer
        x_TH, routing = layer.checked(x_TH, routing, None)
        with torch.inference_mode(False):  # what is made in it could be filled in it only
            self._x = torch.zeros(bucket, x_TH.shape[1], dtype=x_TH.dtype, device=device)
            self._given = [_nowhere(bucket, each.ids_TK.shape[1], device) for each in _each(routing)]
        self._routing = self._given[0] if isinstance(routing, Routing) else tuple(self._given) or None
        self._fill(x_TH, routing)
        warm_up = partial(layer.warm_up, self._x, self._routing, bucket, captured=True)
        self._workspace = workspace_of(device)
        self._graph, self._y = capture(self._step, warm_up)
        # The graph writes there, though later steps may have larger ones.
        self._kept = self._workspace.arena, *_shared(layer.comm)

    def _step(self, stages: Stages = NO_STAGES) -> Tensor:
        y_TH: Tensor = self._layer(
            self._x, self._routing, max_tokens_per_rank=self.bucket, captured=True, stages=stages
        )
        return y_TH

    def with_stages(self) -> StagedGraph:
        """One more graph of this step on the inputs of the last call, with the clock of the layer's stages in it: that
        costs time, so the graph in use has none. Collective."""
        stages = Stages(True, self._layer.comm.device)
        graph, _ = capture(lambda: self._step(stages), warm_up=self._step)
        kept = self._workspace.arena, *_shared(self._layer.comm)
        return StagedGraph(graph, stages.take(), self._workspace, kept, self._layer.comm)

    def _fill(self, x_TH: Tensor, routing: Routings) -> None:
        x_TH, routing = self._layer.checked(x_TH, routing, None)
        tokens, each = len(x_TH), _each(routing)
        if tokens > self.bucket:
            raise ConfigError("tokens", tokens, "do not fit the captured bucket", f"0 to {self.bucket}")
        if len(each) != len(self._given):
            rule = "the graph was captured with " + ("one for each layer" if self._given else "each layer's own router")
            raise ConfigError("routings", f"{len(each)} given", rule, f"{len(self._given)} of them")
        self._x[:tokens].copy_(x_TH)
        for static, given in zip(self._given, each, strict=True):
            static.ids_TK[:tokens].copy_(given.ids_TK)
            static.weights_TK[:tokens].copy_(given.weights_TK)
        if tokens < self.bucket:
            self._x[tokens:].zero_()
            for static in self._given:
                static.ids_TK[tokens:].fill_(-1)
                static.weights_TK[tokens:].zero_()
        self._tokens = tokens

    def __call__(self, x_TH: Tensor, routing: Routings = None) -> Tensor:
        """See MoELayer.forward and MoEStack.forward."""
        self.fill(x_TH, routing)
        return self.replay()[: len(x_TH)]

    def fill(self, x_TH: Tensor, routing: Routings = None) -> None:
        """Inputs for the next replays, as for a call."""
        try:
            self._layer.comm.check_thread()
            self._workspace.enter()  # the last replay may still read its inputs, on another stream
            with torch.no_grad():
                self._fill(x_TH, routing)
        except Exception as error:
            replays.failed(self._layer, error)
            raise

    def replay(self) -> Tensor:
        """The step again on the inputs of the last call or `fill`, with the padding's rows. Raises RankFailure where an
        earlier replay has waited for a rank in vain, or a step in the same memory has raised in the middle."""
        try:
            _check_shared(self._layer.comm, self._kept)
            self._workspace.enter()
            self._graph.replay()
        except Exception as error:
            replays.failed(self._layer, error)
            raise
        for listener in replays.listeners:
            listener.replayed(self._layer, self._tokens, self.bucket)
        return self._y


def _shared(comm: Comm) -> tuple[Any, ...]:
    """What ranks share now, in which a graph goes on though later steps may have larger memory."""
    return comm.shared, *comm.kept.values()


def _check_shared(comm: Comm, kept: tuple[Any, ...]) -> None:
    """Raise RankFailure where a replay would not be the same step on all ranks."""
    comm.check_window()
    for memory in kept:
        if isinstance(memory, Symmetric):
            memory.check_ended(comm.rank, comm.sequence)


def _each(routing: Routings) -> list[Routing]:
    return [routing] if isinstance(routing, Routing) else list(routing or ())


def _nowhere(tokens: int, top_k: int, device: torch.device) -> Routing:
    ids_TK = torch.full((tokens, top_k), -1, dtype=torch.int32, device=device)
    return Routing(ids_TK, torch.zeros(tokens, top_k, dtype=torch.float32, device=device))


@dataclass(frozen=True)
class StagedGraph:
    """A step's graph with the boundaries of its stages, which it records and so must not outlive."""

    graph: torch.cuda.CUDAGraph
    marks: Marks
    workspace: Workspace
    kept: tuple[Any, ...]  # the memory that it writes to
    comm: Comm

    def replay(self) -> None:
        """Raises RankFailure as StepGraph.replay."""
        _check_shared(self.comm, self.kept)
        self.workspace.enter()
        self.graph.replay()

    def totals_us(self) -> dict[str, float]:
        """Microseconds by stage of the last replay; waits for it."""
        return totals_us(self.marks)


def capture(call: Callable[[], T], warm_up: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, T]:
    """`call` as a CUDA graph, and what it returned: the buffers that each replay fills anew."""
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_STEPS):
            warm_up()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.synchronize()
    # NCCL's watchdog thread queries events of its own meanwhile, which a global capture would forbid.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = call()
    return graph, result
