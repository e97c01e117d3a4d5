"""A process of vLLM with our plugin in it, its FP8 layer, and weights by its own loader."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from experts import SPEC, pieces

os.environ["MOE_DIST_VLLM_BACKEND"] = "torch"  # as a server is started

from vllm import plugins
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, MoERunner
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.model.routing import Routing

PREFIX = "model.layers.0.mlp.experts"

plugins.load_general_plugins()  # vLLM's own: by the entry point of this package


@contextmanager
def server() -> Iterator[VllmConfig]:
    config = VllmConfig(device_config=DeviceConfig(device="cpu"))
    with set_current_vllm_config(config):
        yield config


def blocks(**changes: Any) -> Fp8Config:
    given = {"is_checkpoint_fp8_serialized": True, "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return Fp8Config(**(given | changes))


def given_routing(hidden_states: Any, gating_output: torch.Tensor, topk: int, renormalize: bool) -> Any:
    """vLLM's place for a routing function of the model's: the logits are ids and weights behind each other."""
    ids_TK, weights_TK = gating_output.chunk(2, 1)
    return weights_TK.contiguous(), ids_TK.to(torch.int32).contiguous()


def layer_of(**changes: Any) -> MoERunner:
    """vLLM's own, as its model files make it."""
    given = {
        "num_experts": SPEC.num_experts, "top_k": SPEC.top_k, "hidden_size": SPEC.hidden,
        "intermediate_size": SPEC.intermediate, "params_dtype": torch.bfloat16, "quant_config": blocks(),
        "prefix": PREFIX, "tp_size": 1, "dp_size": 1, "pcp_size": 1, "custom_routing_function": given_routing,
    }  # fmt: skip
    return FusedMoEFactory(**(given | changes))


def load(layer: RoutedExperts, weights: Any) -> None:
    """By vLLM's own loader, from tensors as a checkpoint has them."""
    for expert, shard_id, matrix, scales in pieces(weights):
        stem = "w2" if shard_id == "w2" else "w13"
        for suffix, tensor in (("weight", matrix), ("weight_scale_inv", scales)):
            param = getattr(layer, f"{stem}_{suffix}")
            assert param.weight_loader.supports_moe_loading
            param.weight_loader(param, tensor, f"{stem}_{suffix}", shard_id=shard_id, expert_id=expert)


def loaded(layer: MoERunner, weights: Any) -> MoERunner:
    load(layer.routed_experts, weights)
    model = SimpleNamespace(dtype=torch.bfloat16, word_embeddings_untied_by_checkpoint=False, quantization="fp8")
    process_weights_after_loading(layer, model, torch.device("cpu"))
    return layer


def run(layer: MoERunner, config: VllmConfig, x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Through vLLM's custom op, which its compiled models and its CUDA graphs have."""
    logits = torch.cat([routing.ids_TK.float(), routing.weights_TK], 1)
    with torch.inference_mode(), set_forward_context(None, config):
        return layer(x_TH, logits)


class UpFirst(TorchBackend):
    """The reference, for [up; gate] alone, as flashinfer_cutlass is."""

    gate_first = False

    def prepare(self, weights: Any) -> None:
        weights.turn(gate_first=False)
        super().prepare(weights)


def place(tp: int = 1, ep: int = 1, rank: int = 0, **changes: Any) -> FusedMoEParallelConfig:
    """What vLLM makes of --tensor-parallel-size, and of --enable-expert-parallel."""
    given = {
        "tp_size": tp, "pcp_size": 1, "dp_size": 1, "ep_size": ep, "tp_rank": rank if tp > 1 else 0, "pcp_rank": 0,
        "dp_rank": 0, "ep_rank": rank if ep > 1 else 0, "sp_size": 1, "use_ep": ep > 1,
        "all2all_backend": "allgather_reducescatter", "enable_eplb": False,
    }  # fmt: skip
    return FusedMoEParallelConfig(**(given | changes))


def experts_of(parallel: FusedMoEParallelConfig, quant_config: Any = None, **changes: Any) -> RoutedExperts:
    """vLLM's layer of one of several ranks, without the groups of processes that its factory asks for."""
    manager = ExpertMapManager(
        max_num_batched_tokens=64, top_k=SPEC.top_k, global_num_experts=SPEC.num_experts, num_redundant_experts=0,
        num_expert_group=None, moe_parallel_config=parallel, placement_strategy="linear", enable_eplb=False,
    )  # fmt: skip
    known = layer_of(prefix=f"{PREFIX}.plain").moe_config
    given = {field.name: getattr(known, field.name) for field in dataclasses.fields(FusedMoEConfig) if field.init}
    given |= {"moe_parallel_config": parallel, "num_local_experts": manager.local_num_experts}
    of_layer = {name: changes.pop(name) for name in ("apply_router_weight_on_input",) if name in changes}
    moe_config = FusedMoEConfig(**(given | changes))
    return RoutedExperts(
        PREFIX, torch.bfloat16, moe_config, blocks() if quant_config is None else quant_config, manager, **of_layer
    )
