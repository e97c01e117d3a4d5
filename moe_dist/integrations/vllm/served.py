"""What of vLLM's layers is served, and the reasons against the others."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

from moe_dist.errors import UnsupportedError
from moe_dist.integrations.package import unexpected
from moe_dist.integrations.vllm import VARIABLE
from moe_dist.model.spec import BLOCK, MoESpec

ACTIVATIONS = {MoEActivation.SILU: "swiglu", MoEActivation.GELU_TANH: "geglu", MoEActivation.RELU2_NO_MUL: "relu2"}
EXCHANGES = ("naive", "allgather_reducescatter")  # those that vLLM runs outside of its own kernels
# Fields of FusedMoEConfig that must have this value, and those that say nothing about what is computed here.
PLAIN = {
    "in_dtype": torch.bfloat16,
    "moe_backend": "auto",
    "intermediate_pad": None,
    "has_bias": False,
    "is_lora_enabled": False,
    "swiglu_limit": None,
    "swiglu_alpha": None,
    "swiglu_beta": None,
    "activation_situ_beta": None,
    "activation_situ_linear_beta": None,
    "tp_shard_with_padding": False,
}
OF_NO_ACCOUNT = frozenset(
    {
        *("num_experts", "experts_per_token", "hidden_dim", "intermediate_size", "num_local_experts"),
        *("num_logical_experts", "activation", "device", "routing_method", "moe_parallel_config"),
        *("router_logits_dtype", "hidden_dim_unpadded", "intermediate_size_per_partition_unpadded", "max_num_tokens"),
        *("has_hash_routing", "require_decomposed_backend", "shared_expert_prefix", "skip_final_all_reduce"),
        *("_defer_moe_finalize", "defer_moe_finalize_max_num_tokens", "max_capture_size"),
        *("intermediate_size_per_partition", "elastic_ep_max_dp_size", "rocm_aiter_fmoe_enabled"),
        *("aiter_fmoe_shared_expert_enabled", "use_mxfp4_w4a4_dsv4"),  # of AMD's GPUs
    }
)


def spec_of(layer: Any, prefix: str, quant_config: Any) -> MoESpec:
    """Of this rank's part. Raises UnsupportedError with every reason against it."""
    moe = layer.moe_config
    reasons = [*_against_format(prefix, quant_config), *_against_layer(layer)]
    activation = ACTIVATIONS.get(moe.activation)
    if activation is None:
        reasons.append(f"activation {moe.activation.value} is not computed here")
    if reasons or activation is None:
        raise UnsupportedError(f"{VARIABLE} for layer {prefix}", reasons)
    return MoESpec(
        name="vllm",
        hidden=moe.hidden_dim,
        intermediate=moe.intermediate_size_per_partition,
        num_experts=moe.num_experts,
        top_k=moe.experts_per_token,
        activation=activation,
        quant="fp8_block",
    )


def _against_format(prefix: str, config: Any) -> list[str]:
    if type(config) is not Fp8Config:
        kind = "no quantization" if config is None else type(config).__name__
        return [f"its format is {kind}, only vLLM's Fp8Config is served"]
    block = list(config.weight_block_size or ())
    skipped = is_layer_skipped(
        prefix=prefix,
        ignored_layers=config.ignored_layers,
        fused_mapping=config.packed_modules_mapping,
        match_mode=config.ignored_layers_match_mode,
    )
    reasons = {
        "the checkpoint leaves it unquantized": skipped,
        "weights are not FP8 in the checkpoint": not config.is_checkpoint_fp8_serialized,
        f"weight_block_size is {block or None}, only [{BLOCK}, {BLOCK}] is served": block != [BLOCK, BLOCK],
        f"activation_scheme is {config.activation_scheme}, only dynamic is served": (
            config.activation_scheme != "dynamic"
        ),
        f"store_dtype is {config.store_dtype}": config.store_dtype is not None,
        "it is quantized online": config.online_quantization_config is not None,
    }
    return [reason for reason, holds in reasons.items() if holds]


def _against_layer(layer: Any) -> list[str]:
    moe, parallel = layer.moe_config, layer.moe_config.moe_parallel_config
    width, exchange = moe.intermediate_size_per_partition, parallel.all2all_backend
    reasons = {
        "router weights are applied to inputs": layer.apply_router_weight_on_input,
        "experts are moved by EPLB": parallel.enable_eplb,
        "shared experts are fused in": layer.expert_map_manager.num_fused_shared_experts > 0,
        f"--all2all-backend {exchange} is part of vLLM's own kernels, only {' and '.join(EXCHANGES)} are not": (
            parallel.use_all2all_kernels and exchange not in EXCHANGES
        ),
        f"slices of {width} cut blocks of {BLOCK}": moe.tp_size > 1 and width % BLOCK != 0,
    }
    return [*unexpected(moe, PLAIN, OF_NO_ACCOUNT), *(reason for reason, holds in reasons.items() if holds)]
