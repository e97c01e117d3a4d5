"""The whole step (exchange, backend, exchange) as one CUDA graph: one launch instead of dozens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.layer import MoELayer
from moe_dist.routing import Routing
from moe_dist.step import NO_STAGES, Stages, Workspace, workspace_of
from moe_dist.step.stages import Marks, totals_us

WARM_STEPS = 3  # compile what compiles at first use, and let NCCL connect, before the capture

T = TypeVar("T")


class StepGraph:
    """A captured step of `layer` for up to `bucket` tokens on every rank. Making it is collective, so is calling it.

    All ranks must use the same bucket. A call pads with tokens of expert -1 and weight 0, which changes no result. The
    result lies in the graph's own buffer until the next call.
    """

    def __init__(self, layer: MoELayer, bucket: int, x_TH: Tensor, routing: Routing) -> None:
        """`x_TH` and `routing` are a sample to warm up on. Raises UnsupportedError if the plan can't be captured."""
        capturable = layer.plan.capturable
        if not capturable.ok:
            raise UnsupportedError("a CUDA graph of this step", [capturable.reason])
        spec, device = layer.plan.spec, layer.comm.device
        self.bucket, self._layer = bucket, layer
        with torch.inference_mode(False):  # what is made in it could be filled in it only
            self._x = torch.zeros(bucket, spec.hidden, dtype=spec.torch_dtype, device=device)
            self._ids = torch.full((bucket, spec.top_k), -1, dtype=torch.int32, device=device)
            self._weights = torch.zeros(bucket, spec.top_k, dtype=torch.float32, device=device)
        self._fill(x_TH, routing)
        warm_up = partial(layer.warm_up, self._x, self._routing(), bucket, captured=True)
        self._workspace = workspace_of(device)
        self._graph, self._y = capture(self._step, warm_up)
        self._arena = self._workspace.arena  # the graph writes there, though later steps may have a larger one

    def _routing(self) -> Routing:
        return Routing(self._ids, self._weights)

    def _step(self, stages: Stages = NO_STAGES) -> Tensor:
        y_TH: Tensor = self._layer(
            self._x, self._routing(), max_tokens_per_rank=self.bucket, captured=True, stages=stages
        )
        return y_TH

    def with_stages(self) -> StagedGraph:
        """One more graph of this step on the inputs of the last call, with the clock of the layer's stages in it: that
        costs time, so the graph in use has none. Collective."""
        stages = Stages(True, self._layer.comm.device)
        graph, _ = capture(lambda: self._step(stages), warm_up=self._step)
        return StagedGraph(graph, stages.take(), self._workspace, self._workspace.arena)

    def _fill(self, x_TH: Tensor, routing: Routing) -> None:
        x_TH, routing = self._layer.checked(x_TH, routing, None)
        tokens = len(x_TH)
        if tokens > self.bucket:
            raise ConfigError("tokens", tokens, "do not fit the captured bucket", f"0 to {self.bucket}")
        self._x[:tokens].copy_(x_TH)
        self._ids[:tokens].copy_(routing.ids_TK)
        self._weights[:tokens].copy_(routing.weights_TK)
        if tokens < self.bucket:
            self._x[tokens:].zero_()
            self._ids[tokens:].fill_(-1)
            self._weights[tokens:].zero_()

    def __call__(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """See MoELayer.forward."""
        self._layer.comm.check_thread()
        self._workspace.enter()  # the last replay may still read its inputs, on another stream
        with torch.no_grad():
            self._fill(x_TH, routing)
        return self.replay()[: len(x_TH)]

    def replay(self) -> Tensor:
        """The step again on the inputs of the last call, with the padding's rows."""
        self._workspace.enter()
        self._graph.replay()
        return self._y


@dataclass(frozen=True)
class StagedGraph:
    """A step's graph with the boundaries of its stages, which it records and so must not outlive."""

    graph: torch.cuda.CUDAGraph
    marks: Marks
    workspace: Workspace
    arena: Tensor

    def replay(self) -> None:
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
