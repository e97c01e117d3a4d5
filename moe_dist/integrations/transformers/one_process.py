"""experts_implementation="moe_dist": all experts that a process has, without any exchange."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moe_dist.comm import Comm
from moe_dist.integrations.transformers.forms import check_structure, tensors_of
from moe_dist.integrations.transformers.kept import Kept
from moe_dist.integrations.transformers.settings import Settings
from moe_dist.integrations.transformers.steps import check_inference, routing_of
from moe_dist.model.routing import Routing
from moe_dist.model.spec import ParallelSpec

Function = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def experts_function(settings: Settings) -> Function:
    """What transformers' registries take. The function's own process is all there is to it, so `settings.exchange` is
    of no account: it belongs to ep_implementation."""
    alone = Settings(None, settings.backend, settings.graph_buckets)
    kept: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()
    comms: dict[torch.device, Comm] = {}

    @torch.compiler.disable
    def moe_dist_experts(
        experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """hidden_states [T, H], top_k_index [T, K] integers, top_k_weights [T, K] floats, to [T, H] in the dtype of
        hidden_states. Under transformers' own expert parallelism an index that is no local expert's adds nothing.

        Raises UnsupportedError for experts that moe_dist does not compute, ConfigError where a gradient is wanted.
        """
        check_inference(hidden_states, top_k_weights, experts.parameters(recurse=False))
        if experts not in kept:
            check_structure(experts)
            kept[experts] = Kept(ParallelSpec(), "replicated", alone)
        tensors = tensors_of(experts)
        routing = routing_of(top_k_index, top_k_weights)
        if getattr(experts, "_is_expert_parallel", False):
            routing = _local(routing, len(tensors["down_proj"]))
        device = hidden_states.device
        comm = comms.setdefault(device, Comm.single(device))
        if not len(hidden_states):
            return torch.zeros_like(hidden_states)
        return kept[experts].steps(experts, tensors, routing.ids_TK.shape[1], comm)(hidden_states, routing)

    found: Function = moe_dist_experts
    return found


def _local(routing: Routing, experts: int) -> Routing:
    """With -1 for what transformers marks as another rank's (the number of local experts), and no more places than a
    token can have experts here."""
    ids_TK = routing.ids_TK.masked_fill(routing.ids_TK >= experts, -1)
    if ids_TK.shape[1] <= experts:
        return Routing(ids_TK, routing.weights_TK)
    order_TK = (ids_TK < 0).int().argsort(stable=True, dim=1)[:, :experts]
    return Routing(ids_TK.gather(1, order_TK).contiguous(), routing.weights_TK.gather(1, order_TK).contiguous())
