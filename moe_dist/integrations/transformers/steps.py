"""A step of a layer inside of a model of transformers: its inputs as transformers has them, to what it expects back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moe_dist.comm import Comm
from moe_dist.engine.graph import StepGraph
from moe_dist.engine.inputs import routing_from
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.loading import check_alike, plan_for
from moe_dist.engine.plan import Plan
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.integrations.transformers.settings import AUTO, Settings
from moe_dist.machine.machine import Machine
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec, TokenLayout


def plan_of(spec: MoESpec, parallel: ParallelSpec, token_layout: TokenLayout, settings: Settings, comm: Comm) -> Plan:
    """With load_layer's defaults for what the settings leave open. Raises as make_plan, and for graphs of what can't be
    captured. Collective where a name is `auto`."""
    machine = Machine.detect(comm.device.type)
    plan = plan_for(spec, parallel, settings.exchange, settings.backend, token_layout, machine)
    if AUTO in (settings.exchange, settings.backend):
        check_alike(plan, comm)
    if settings.graph_buckets and not plan.capturable.ok:
        raise UnsupportedError(f"graph_buckets = {settings.graph_buckets}", [plan.capturable.reason], "()")
    return plan


def check_inference(x: Tensor, weights: Tensor, parameters: Iterable[Tensor] = ()) -> None:
    """Raise ConfigError where a gradient would have to come back through the experts, to them too."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in (("hidden_states", x), ("top_k_weights", weights), *(("experts", each) for each in parameters)):
        if tensor.requires_grad:
            rule = "moe_dist's experts are forward only, no gradient would come back"
            raise ConfigError(f"{name}.requires_grad", True, rule, "a call under torch.no_grad() or inference_mode()")


def routing_of(ids: Tensor, weights: Tensor) -> Routing:
    """ids [T, K] of any integer dtype, weights [T, K] of any float dtype. Raises ConfigError for others."""
    return routing_from(ids, weights, look=isinstance(ids, Tensor) and not ids.is_cuda)


class Steps:
    """Runs the steps of one layer: small ones in its CUDA graphs, if it has any, others eagerly."""

    def __init__(self, layer: MoELayer, graph_buckets: Sequence[int] = ()) -> None:
        self.layer, self.buckets = layer, tuple(graph_buckets)
        self.graphs: dict[int, StepGraph] = {}

    def __call__(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """[T, H] to [T, H], in memory that no later step writes to. Collective; T as the tokens' layout allows."""
        layer = self.layer
        if x_TH.is_cuda and torch.cuda.is_current_stream_capturing():  # of a graph around the model: static shapes
            if not layer.capturable.ok:
                raise UnsupportedError("a CUDA graph around the model", [layer.capturable.reason])
            y_TH: Tensor = layer(x_TH, routing, max_tokens_per_rank=len(x_TH), captured=True)
            return y_TH
        bucket = self._bucket(len(x_TH))
        graph_bucket = next((each for each in self.buckets if bucket is not None and bucket <= each), None)
        if graph_bucket is None:
            y_TH = layer(x_TH, routing, max_tokens_per_rank=bucket)
            return y_TH
        graph = self.graphs.get(graph_bucket)
        if graph is None:
            graph = self.graphs[graph_bucket] = StepGraph(layer, graph_bucket, x_TH, routing)
        return graph(x_TH, routing).clone()  # the next replay writes to the same memory

    def _bucket(self, tokens: int) -> int | None:
        """The most tokens of any rank where that is known or must be: replicated tokens are as many everywhere; ranks
        that may replay a graph must agree on which."""
        if self.layer.plan.token_layout == "replicated" or self.layer.comm.world == 1:
            return tokens
        return self.layer.comm.agree_max(tokens) if self.buckets else None
