"""config.json of small checkpoints, family by family: the keys that the family's own has, as far as they concern the
MLPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_dist.checkpoint.families import WRAPPERS
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import BLOCK

FP8_BLOCK = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK],
}  # fmt: skip

Config = dict[str, Any]


def _compressed(weights: str, inputs: str) -> Config:
    """By compressed-tensors, with activations' scales found as they come."""
    numbers = {"num_bits": 8, "symmetric": True, "type": "float"}
    group = {
        "input_activations": numbers | {"dynamic": True, "strategy": inputs}, "targets": ["Linear"],
        "weights": numbers | {"dynamic": False, "strategy": weights},
    }  # fmt: skip
    return {
        "config_groups": {"group_0": group}, "format": "float-quantized", "ignore": ["lm_head"],
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
    }  # fmt: skip


SECTIONS: dict[str, Config | None] = {
    "none": None,
    "fp8_block": FP8_BLOCK,
    "fp8_channel": _compressed("channel", "token"),
    "fp8_tensor_dynamic": _compressed("tensor", "tensor"),
    "fp8_tensor_static": {"ignore": ["lm_head"], "quant_algo": "FP8", "quant_method": "modelopt"},
}


@dataclass(frozen=True)
class Sizes:
    """Of the made checkpoint. Layer 0 is dense where the family has dense layers first."""

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    layers: int

    @property
    def dense_width(self) -> int:
        return 2 * self.intermediate


def family_config(model_type: str, sizes: Sizes, quant: str) -> Config:
    """`model_type` is one of MODEL_TYPES, `quant` of SECTIONS."""
    config: Config = {
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.dense_width,
        "moe_intermediate_size": sizes.intermediate,
        "norm_topk_prob": True,
        "num_experts_per_tok": sizes.top_k,
        "num_hidden_layers": sizes.layers,
        "torch_dtype": "bfloat16",
    }
    if section := SECTIONS[quant]:
        config["quantization_config"] = section
    name, make = _MADE[model_type]
    config |= {"architectures": [f"{name}ForCausalLM"]} | make(sizes)
    if model_type not in WRAPPERS:
        return {key: value for key, value in config.items() if value is not None}
    outside = ("quantization_config", "architectures")
    inner = {key: value for key, value in config.items() if key not in outside and value is not None}
    inner["model_type"] = next(iter(WRAPPERS[model_type].inside))
    around = {"model_type": model_type, "architectures": [f"{name}ForConditionalGeneration"], "text_config": inner}
    return around | {key: config[key] for key in ("quantization_config",) if key in config}


def _groups(sizes: Sizes) -> tuple[int, int]:
    """Four groups where they come out even, of which a token may use half, or as many as its top_k needs."""
    if sizes.num_experts % 4 or sizes.num_experts < 8:
        return 1, 1
    return 4, max(2, cdiv(sizes.top_k * 4, sizes.num_experts))


def _qwen3_moe(sizes: Sizes) -> Config:
    return {"num_experts": sizes.num_experts, "decoder_sparse_step": 1, "mlp_only_layers": []}


def _gated_shared(sizes: Sizes) -> Config:
    return _qwen3_moe(sizes) | {"norm_topk_prob": False, "shared_expert_intermediate_size": sizes.intermediate}


def _qwen3_next(sizes: Sizes) -> Config:
    return _gated_shared(sizes) | {"norm_topk_prob": True}


def _qwen3_5_moe(sizes: Sizes) -> Config:
    return {
        "num_experts": sizes.num_experts, "shared_expert_intermediate_size": sizes.intermediate,
        "norm_topk_prob": None, "intermediate_size": None,
    }  # fmt: skip


def _qwen3_vl_moe(sizes: Sizes) -> Config:
    return _qwen3_moe(sizes) | {"norm_topk_prob": None}


def _deepseek(sizes: Sizes) -> Config:
    num_groups, top_groups = _groups(sizes)
    return {
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": num_groups, "topk_group": top_groups,
        "n_routed_experts": sizes.num_experts, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
    }  # fmt: skip


def _deepseek_v3(sizes: Sizes) -> Config:
    return _deepseek(sizes) | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _deepseek_v2(sizes: Sizes) -> Config:
    method = "greedy" if _groups(sizes) == (1, 1) else "group_limited_greedy"
    return _deepseek(sizes) | {"norm_topk_prob": False, "scoring_func": "softmax", "topk_method": method}


def _glm4_moe(sizes: Sizes) -> Config:
    return _deepseek(sizes) | {"moe_layer_freq": None, "n_group": 1, "topk_group": 1}


def _mixtral(sizes: Sizes) -> Config:
    own = {"intermediate_size": sizes.intermediate, "num_local_experts": sizes.num_experts}
    return own | {"moe_intermediate_size": None, "norm_topk_prob": None}


def _minimax_m2(sizes: Sizes) -> Config:
    return _mixtral(sizes) | {"scoring_func": "sigmoid", "use_routing_bias": True, "shared_intermediate_size": 0}


def _olmoe(sizes: Sizes) -> Config:
    own = {"intermediate_size": sizes.intermediate, "num_experts": sizes.num_experts, "norm_topk_prob": False}
    return own | {"moe_intermediate_size": None}


def _gpt_oss(sizes: Sizes) -> Config:
    own = {"intermediate_size": sizes.intermediate, "num_local_experts": sizes.num_experts, "swiglu_limit": 7.0}
    return own | {"experts_per_token": sizes.top_k, "moe_intermediate_size": None, "norm_topk_prob": None}


def _llama4(sizes: Sizes) -> Config:
    own: Config = {"intermediate_size": sizes.intermediate, "intermediate_size_mlp": sizes.dense_width}
    own |= {"num_local_experts": sizes.num_experts, "moe_layers": list(range(1, sizes.layers))}
    return own | {"moe_intermediate_size": None, "norm_topk_prob": None}


def _ernie4_5_moe(sizes: Sizes) -> Config:
    return {
        "moe_num_experts": sizes.num_experts, "moe_k": sizes.top_k, "moe_num_shared_experts": 1, "use_bias": False,
        "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1,
        "num_experts_per_tok": None, "norm_topk_prob": None,
    }  # fmt: skip


def _nemotron_h(sizes: Sizes) -> Config:
    return _deepseek(sizes) | {
        "hybrid_override_pattern": "M" + "E" * (sizes.layers - 1), "mlp_hidden_act": "relu2", "hidden_act": None,
        "moe_shared_expert_intermediate_size": 2 * sizes.intermediate, "n_groups": 8, "mlp_bias": False,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": None, "moe_layer_freq": None,
    }  # fmt: skip


_MADE: dict[str, tuple[str, Callable[[Sizes], Config]]] = {
    "qwen3_moe": ("Qwen3Moe", _qwen3_moe),
    "deepseek_v3": ("DeepseekV3", _deepseek_v3),
    "deepseek_v2": ("DeepseekV2", _deepseek_v2),
    "deepseek_v32": ("DeepseekV32", _deepseek_v3),
    "kimi_k2": ("DeepseekV3", _deepseek_v3),
    "kimi_k25": ("KimiK25", _deepseek_v3),
    "glm4_moe": ("Glm4Moe", _glm4_moe),
    "glm4_moe_lite": ("Glm4MoeLite", _glm4_moe),
    "glm4v_moe": ("Glm4vMoe", _glm4_moe),
    "qwen2_moe": ("Qwen2Moe", _gated_shared),
    "qwen3_next": ("Qwen3Next", _qwen3_next),
    "qwen3_vl_moe": ("Qwen3VLMoe", _qwen3_vl_moe),
    "qwen3_5_moe": ("Qwen3_5Moe", _qwen3_5_moe),
    "mixtral": ("Mixtral", _mixtral),
    "llama4": ("Llama4", _llama4),
    "llama4_text": ("Llama4", _llama4),
    "minimax_m2": ("MiniMaxM2", _minimax_m2),
    "olmoe": ("Olmoe", _olmoe),
    "gpt_oss": ("GptOss", _gpt_oss),
    "ernie4_5_moe": ("Ernie4_5_Moe", _ernie4_5_moe),
    "nemotron_h": ("NemotronH", _nemotron_h),
}
MODEL_TYPES = tuple(_MADE)
DENSE_FIRST = tuple(
    name for name in _MADE if name.startswith(("deepseek", "kimi", "glm4", "ernie", "nemotron", "llama4"))
)
