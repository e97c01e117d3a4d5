"""The model families that are read: for each what its keys mean, and the names of its tensors, which are those of
transformers' conversion_mapping.py (5.24). Those that are known and not computed are refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_dist.checkpoint.family_rules import (
    always_normalized,
    deepseek_v2,
    deepseek_v3,
    dense_first,
    ernie,
    ernie_layers,
    every_layer,
    gpt_oss,
    llama4,
    llama4_layers,
    minimax_m2,
    mixtral,
    nemotron_h,
    nemotron_layers,
    olmoe,
    qwen2_moe,
    qwen3_5,
    qwen_layers,
    softmax,
)
from moe_dist.checkpoint.keys import Keys
from moe_dist.checkpoint.names import Names
from moe_dist.checkpoint.neutral import ANY


@dataclass(frozen=True)
class Family:
    """`fields(keys)` gives the fields of a MoESpec but for hidden, activation and the format. `layers(keys)` says of
    each layer whether it holds experts. `classes`: how their names in `architectures` begin, before ForCausalLM and the
    like. `activations`: what the key `activation` may say, and what that is here. `neutral`: further keys that change
    nothing, with the values that don't."""

    classes: tuple[str, ...]
    fields: Callable[[Keys], dict[str, Any]]
    layers: Callable[[Keys], list[bool]]
    names: Names = field(default_factory=Names)
    activation: str = "hidden_act"
    activations: Mapping[str, str] = field(default_factory=lambda: {"silu": "swiglu"})
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


OF_MIXTRAL = Names(block="block_sparse_moe", gate="w1", up="w3", down="w2", fused=None)
OF_LLAMA4 = Names(block="feed_forward", router="router.weight", shared="shared_expert", fused="transposed")
OF_QWEN2 = Names(shared="shared_expert", shared_gate="shared_expert_gate.weight")
LANGUAGE = "model.language_model"
FAMILIES = {
    "deepseek_v2": Family(("DeepseekV2",), deepseek_v2, dense_first()),
    "deepseek_v3": Family(("DeepseekV3",), deepseek_v3, dense_first()),
    "deepseek_v32": Family(("DeepseekV32",), deepseek_v3, dense_first()),
    "kimi_k2": Family(("DeepseekV3", "KimiK2"), deepseek_v3, dense_first()),
    "glm4_moe": Family(("Glm4Moe",), deepseek_v3, dense_first()),
    "glm4_moe_lite": Family(("Glm4MoeLite",), deepseek_v3, dense_first(1)),
    "qwen2_moe": Family(("Qwen2Moe",), qwen2_moe, qwen_layers, OF_QWEN2),
    "qwen3_moe": Family(("Qwen3Moe",), softmax, qwen_layers),
    "qwen3_next": Family(("Qwen3Next",), qwen2_moe, qwen_layers, OF_QWEN2),
    "mixtral": Family(("Mixtral",), mixtral, every_layer, OF_MIXTRAL),
    "olmoe": Family(("Olmoe",), olmoe, every_layer),
    "gpt_oss": Family(
        ("GptOss",), gpt_oss, every_layer, Names(router="router.weight", fused="interleaved"),
        activations={"silu": "swigluoai"},
    ),
    "llama4_text": Family(("Llama4",), llama4, llama4_layers, OF_LLAMA4, neutral={"intermediate_size_mlp": ANY}),
    "minimax_m2": Family(
        ("MiniMaxM2",), minimax_m2, every_layer,
        Names(block="block_sparse_moe", gate="w1", up="w3", down="w2", bias="e_score_correction_bias", fused=None),
        neutral={"shared_moe_mode": ANY, "mlp_intermediate_size": ANY,
                 "layernorm_mlp_alpha": (1.0,), "layernorm_mlp_beta": (1.0,)},
    ),
    "ernie4_5_moe": Family(
        ("Ernie4_5_Moe", "Ernie4_5Moe"), ernie, ernie_layers, Names(bias="moe_statics.e_score_correction_bias"),
        neutral={"moe_norm_min": (1e-12,), "moe_use_aux_free": (True,), "moe_gate": ("topk",), "moe_capacity": ANY,
                 "moe_gate_act": ("softmax",), "moe_multimodal_dispatch_use_allgather": ANY},
    ),
    "nemotron_h": Family(
        ("NemotronH",), nemotron_h, nemotron_layers,
        Names(root="backbone", block="mixer", gate=None, fused=None), "mlp_hidden_act", {"relu2": "relu2"},
        neutral={"n_groups": ANY, "mamba_n_groups": ANY, "mamba_hidden_act": ANY, "moe_shared_expert_overlap": ANY,
                 "mamba_ssm_cache_dtype": ANY},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Wrapper:
    """A model that has another one inside, as `text_config`. `inside`: the model types that this may be; `root` is
    where its tensors lie. `beside`: as in Names."""

    classes: tuple[str, ...]
    inside: Mapping[str, Family]
    root: str = LANGUAGE
    beside: tuple[str, ...] = ()


WRAPPERS = {
    "glm4v_moe": Wrapper(("Glm4vMoe",), {"glm4v_moe_text": Family(("Glm4vMoe",), deepseek_v3, dense_first())}),
    "kimi_k25": Wrapper(
        ("KimiK25",), {name: FAMILIES[name] for name in ("kimi_k2", "deepseek_v3")}, "language_model.model"
    ),
    "llama4": Wrapper(
        ("Llama4",), {"llama4_text": FAMILIES["llama4_text"]}, "language_model.model",
        beside=("vision_model",),  # vision_model.model.layers.N.mlp
    ),
    "qwen3_vl_moe": Wrapper(
        ("Qwen3VLMoe",),
        {"qwen3_vl_moe_text": Family(("Qwen3VLMoe",), always_normalized, qwen_layers, Names(fused="either"))},
    ),
    "qwen3_5_moe": Wrapper(
        ("Qwen3_5Moe",),
        {"qwen3_5_moe_text": Family(
            ("Qwen3_5Moe",), qwen3_5, every_layer, OF_QWEN2, neutral={"mamba_ssm_dtype": ANY, "mlp_only_layers": ([],)},
        )},
    ),
}  # fmt: skip
MODEL_TYPES = (*FAMILIES, *WRAPPERS)

# Known, and not computed by any backend.
REFUSED = {"deepseek_v4": "its experts' activation is clamped (swiglu_limit), and no backend computes that"}
