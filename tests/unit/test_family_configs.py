"""config.json of real models, with the keys that concern the experts as published, and what of them is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_dist.checkpoint import make_checkpoint, read_config, spec_from_config
from moe_dist.checkpoint.layout import layer_spec
from moe_dist.checkpoint.synthetic_configs import MODEL_TYPES
from moe_dist.errors import CheckpointError, MoeDistError, UnsupportedError
from moe_dist.model.spec import MoESpec

BF16 = {"hidden_act": "silu", "torch_dtype": "bfloat16"}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
DEEPSEEK_V2 = BF16 | {
    "architectures": ["DeepseekV2ForCausalLM"], "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 1,
    "hidden_size": 5120, "intermediate_size": 12288, "model_type": "deepseek_v2", "moe_intermediate_size": 1536,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 160, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_experts_per_tok": 6, "num_hidden_layers": 60, "routed_scaling_factor": 16.0, "scoring_func": "softmax",
    "seq_aux": True, "topk_group": 3, "topk_method": "group_limited_greedy",
}  # fmt: skip
DEEPSEEK_V2_LITE = DEEPSEEK_V2 | {
    "hidden_size": 2048, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64, "num_hidden_layers": 27,
    "routed_scaling_factor": 1.0, "topk_group": 1, "topk_method": "greedy",
}  # fmt: skip
DEEPSEEK_V32 = BF16 | {
    "architectures": ["DeepseekV32ForCausalLM"], "first_k_dense_replace": 3, "hidden_size": 7168, "index_head_dim": 128,
    "index_n_heads": 64, "index_topk": 2048, "model_type": "deepseek_v32", "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_nextn_predict_layers": 1,
    "quantization_config": FP8 | {"scale_fmt": "ue8m0"}, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "topk_group": 4, "topk_method": "noaux_tc",
}  # fmt: skip
QWEN2_57B = BF16 | {
    "architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_size": 3584, "mlp_only_layers": [],
    "intermediate_size": 18944, "model_type": "qwen2_moe", "moe_intermediate_size": 2560, "norm_topk_prob": False,
    "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 28, "output_router_logits": False,
    "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 20480,
}  # fmt: skip
QWEN3_NEXT = BF16 | {
    "architectures": ["Qwen3NextForCausalLM"], "decoder_sparse_step": 1, "full_attention_interval": 4,
    "hidden_size": 2048, "intermediate_size": 5120, "linear_conv_kernel_dim": 4, "mlp_only_layers": [],
    "model_type": "qwen3_next", "moe_intermediate_size": 512, "norm_topk_prob": True, "num_experts": 512,
    "num_experts_per_tok": 10, "num_hidden_layers": 48, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
}  # fmt: skip
GLM_4_7 = BF16 | {
    "architectures": ["Glm4MoeForCausalLM"], "first_k_dense_replace": 3, "hidden_size": 5120,
    "intermediate_size": 12288, "model_type": "glm4_moe", "moe_intermediate_size": 1536, "n_group": 1,
    "n_routed_experts": 160, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8,
    "num_hidden_layers": 92, "num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5, "routed_scaling_factor": 2.5,
    "topk_group": 1, "use_qk_norm": True,
}  # fmt: skip
MIXTRAL = BF16 | {
    "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "model_type": "mixtral",
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_local_experts": 8, "output_router_logits": False,
    "router_aux_loss_coef": 0.02,
}  # fmt: skip
OLMOE = BF16 | {
    "architectures": ["OlmoeForCausalLM"], "clip_qkv": None, "hidden_size": 2048, "intermediate_size": 1024,
    "model_type": "olmoe", "norm_topk_prob": False, "num_experts": 64, "num_experts_per_tok": 8,
    "num_hidden_layers": 16, "router_aux_loss_coef": 0.01,
}  # fmt: skip
ERNIE = BF16 | {
    "architectures": ["Ernie4_5_MoeForCausalLM"], "hidden_size": 2560, "intermediate_size": 12288,
    "model_type": "ernie4_5_moe", "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_intermediate_size": 1536,
    "moe_k": 6, "moe_layer_end_index": 27, "moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_num_experts": 64,
    "moe_num_shared_experts": 2, "moe_use_aux_free": True, "num_hidden_layers": 28, "use_bias": False,
}  # fmt: skip
MINIMAX_M2 = BF16 | {
    "architectures": ["MiniMaxM2ForCausalLM"], "hidden_size": 3072, "intermediate_size": 1536,
    "mlp_intermediate_size": 8192, "model_type": "minimax_m2", "num_experts_per_tok": 8, "num_hidden_layers": 62,
    "num_local_experts": 256, "num_mtp_modules": 3, "quantization_config": FP8 | {
        "fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    },
    "router_jitter_noise": 0.0, "scoring_func": "sigmoid", "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid",
    "use_routing_bias": True,
}  # fmt: skip
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "experts_per_token": 4, "hidden_act": "silu",
    "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880, "model_type": "gpt_oss",
    "num_experts_per_tok": 4, "num_hidden_layers": 36, "num_local_experts": 128, "output_router_logits": False,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                   "lm_head"],
        "quant_method": "mxfp4",
    },
    "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
}  # fmt: skip
TINY: dict[str, Any] = {"hidden": 128, "intermediate": 128, "num_experts": 8, "top_k": 2}
# Keys that say a size, which may be another one.
SIZES = ("hidden_size", "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
NEMOTRON = {
    "architectures": ["NemotronHForCausalLM"], "hidden_size": 2688, "hybrid_override_pattern": PATTERN,
    "intermediate_size": 1856, "mamba_hidden_act": "silu", "mlp_bias": False, "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h", "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712,
    "n_group": 1, "n_groups": 8, "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_experts_per_tok": 6, "num_hidden_layers": 52, "routed_scaling_factor": 2.5, "topk_group": 1,
    "torch_dtype": "bfloat16", "use_bias": False,
}  # fmt: skip
QWEN3_VL = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"], "image_token_id": 151655, "model_type": "qwen3_vl_moe",
    "text_config": {
        "decoder_sparse_step": 1, "dtype": "bfloat16", "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 6144, "mlp_only_layers": [], "model_type": "qwen3_vl_moe_text",
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
    },
    "vision_config": {"hidden_act": "gelu_pytorch_tanh", "model_type": "qwen3_vl_moe"},
}  # fmt: skip

SCOUT = {
    "architectures": ["Llama4ForConditionalGeneration"], "boi_token_index": 200080, "eoi_token_index": 200081,
    "image_token_index": 200092, "model_type": "llama4",
    "text_config": {
        "attention_bias": False, "attention_chunk_size": 8192, "attn_scale": 0.1, "attn_temperature_tuning": 4,
        "floor_scale": 8192, "for_llm_compressor": False, "hidden_act": "silu", "hidden_size": 5120,
        "interleave_moe_layer_step": 1, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
        "model_type": "llama4_text", "moe_layers": list(range(48)), "no_rope_layers": [1, 1, 1, 0] * 12,
        "num_attention_heads": 40, "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_local_experts": 16,
        "output_router_logits": False, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
        "torch_dtype": "bfloat16", "use_qk_norm": True,
    },
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vision_config": {"model_type": "llama4_vision_model"},
}  # fmt: skip
SCOUT_TEXT: dict[str, Any] = SCOUT["text_config"]  # type: ignore[assignment]


def scout(**changes: Any) -> dict[str, Any]:
    return SCOUT | {"text_config": {k: v for k, v in (SCOUT_TEXT | changes).items() if v is not ...}}


NOAUX = {"scoring": "sigmoid", "correction_bias": True}
NONE: dict[str, Any] = {"quant": "none"}
OF_SCOUT: dict[str, Any] = {
    "hidden": 5120, "intermediate": 8192, "num_experts": 16, "top_k": 1, "scoring": "sigmoid", "renormalize": False,
    "weights_on_input": True, "shared_intermediate": 8192, **NONE,
}  # fmt: skip
REAL = {
    "DeepSeek-V2": (DEEPSEEK_V2, MoESpec(
        hidden=5120, intermediate=1536, num_experts=160, top_k=6, renormalize=False, num_groups=8, top_groups=3,
        routed_scaling=16.0, shared_intermediate=3072, **NONE), range(1, 60)),
    "DeepSeek-V2-Lite": (DEEPSEEK_V2_LITE, MoESpec(
        hidden=2048, intermediate=1408, num_experts=64, top_k=6, renormalize=False, shared_intermediate=2816, **NONE,
    ), range(1, 27)),
    "DeepSeek-V3.2": (DEEPSEEK_V32, MoESpec(
        hidden=7168, intermediate=2048, num_experts=256, top_k=8, num_groups=8, top_groups=4, routed_scaling=2.5,
        shared_intermediate=2048, **NOAUX), range(3, 61)),
    "Qwen2-57B-A14B": (QWEN2_57B, MoESpec(
        hidden=3584, intermediate=2560, num_experts=64, top_k=8, renormalize=False, shared_intermediate=20480,
        shared_gate=True, **NONE), range(28)),
    "Qwen3-Next-80B-A3B": (QWEN3_NEXT, MoESpec(
        hidden=2048, intermediate=512, num_experts=512, top_k=10, shared_intermediate=512, shared_gate=True, **NONE,
    ), range(48)),
    "GLM-4.7": (GLM_4_7, MoESpec(
        hidden=5120, intermediate=1536, num_experts=160, top_k=8, routed_scaling=2.5, shared_intermediate=1536,
        **NOAUX, **NONE), range(3, 92)),
    "Mixtral-8x7B": (MIXTRAL, MoESpec(hidden=4096, intermediate=14336, num_experts=8, top_k=2, **NONE), range(32)),
    "OLMoE-1B-7B": (OLMOE, MoESpec(
        hidden=2048, intermediate=1024, num_experts=64, top_k=8, renormalize=False, **NONE), range(16)),
    "ERNIE-4.5-21B-A3B": (ERNIE, MoESpec(
        hidden=2560, intermediate=1536, num_experts=64, top_k=6, correction_bias=True, shared_intermediate=3072, **NONE,
    ), range(1, 28)),
    "MiniMax-M2": (MINIMAX_M2, MoESpec(hidden=3072, intermediate=1536, num_experts=256, top_k=8, **NOAUX), range(62)),
    "Nemotron-3-Nano": (NEMOTRON, MoESpec(
        hidden=2688, intermediate=1856, num_experts=128, top_k=6, routed_scaling=2.5, shared_intermediate=3712,
        activation="relu2", **NOAUX, **NONE), [layer for layer, block in enumerate(PATTERN) if block == "E"]),
    "gpt-oss-120b": (GPT_OSS, MoESpec(
        hidden=2880, intermediate=2880, num_experts=128, top_k=4, activation="swigluoai", expert_bias=True,
        router_bias=True, **NONE), range(36)),
    "Llama-4-Scout": (SCOUT, MoESpec(**OF_SCOUT), range(48)),
    "Llama-4-Maverick": (
        scout(num_local_experts=128, moe_layers=..., interleave_moe_layer_step=2),
        MoESpec(**OF_SCOUT | {"num_experts": 128}), range(1, 48, 2),
    ),
    "Llama-4-Scout, the text model alone": (
        SCOUT_TEXT | {"architectures": ["Llama4ForCausalLM"]}, MoESpec(**OF_SCOUT), range(48),
    ),
    "Qwen3-VL-30B-A3B": (QWEN3_VL, MoESpec(hidden=2048, intermediate=768, num_experts=128, top_k=8, **NONE), range(48)),
}  # fmt: skip


def written(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not ...})
    )
    return directory


@pytest.mark.parametrize("model", REAL)
def test_configs_of_real_models(model: str, tmp_path: Path) -> None:
    config, spec, layers = REAL[model]
    found = read_config(written(tmp_path / "model", config))
    assert found.spec.model_dump() == spec.with_changes(name="model").model_dump()
    assert found.moe_layers == tuple(layers)
    assert spec_from_config(config).model_dump() == spec.model_dump()


def layers_of(directory: Path, config: dict[str, Any]) -> tuple[int, ...]:
    return read_config(written(directory, config)).moe_layers


def test_which_layers_hold_experts(tmp_path: Path) -> None:
    qwen = QWEN2_57B | {"num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert layers_of(tmp_path, qwen) == (1, 5, 7)
    ernie = ERNIE | {"num_hidden_layers": 10, "moe_layer_start_index": 2, "moe_layer_end_index": 7}
    assert layers_of(tmp_path, ernie) == (2, 3, 4, 5, 6, 7)
    assert layers_of(tmp_path, ernie | {"moe_layer_interval": 3, "moe_layer_end_index": -1}) == (2, 5, 8)
    listed = {"hybrid_override_pattern": ..., "layers_block_type": ["mamba", "moe", "full_attention", "moe", "mlp"]}
    assert layers_of(tmp_path, NEMOTRON | listed | {"num_hidden_layers": ...}) == (1, 3)
    assert layers_of(tmp_path, DEEPSEEK_V2 | {"first_k_dense_replace": 2, "moe_layer_freq": 29}) == (29, 58)
    lite = GLM_4_7 | {"model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"]}
    lite |= {"num_hidden_layers": 4, "first_k_dense_replace": ..., "mlp_layer_types": ["dense"] + ["sparse"] * 3}
    assert layers_of(tmp_path, lite) == (1, 2, 3)
    listed = {"num_hidden_layers": 6, "moe_layers": [4, 2, 9]}
    assert layers_of(tmp_path, scout(**listed)) == (2, 4)  # whatever interleave_moe_layer_step says
    assert layers_of(tmp_path, scout(**listed, interleave_moe_layer_step=5)) == (2, 4)
    assert layers_of(tmp_path, scout(**listed | {"moe_layers": None}, interleave_moe_layer_step=3)) == (2, 5)
    assert layers_of(tmp_path, scout(**listed | {"moe_layers": ...}, interleave_moe_layer_step=...)) == (
        0,
        1,
        2,
        3,
        4,
        5,
    )


TEXT = QWEN3_VL["text_config"]
REFUSALS = [
    (scout(num_experts_per_tok=2), r"num_experts_per_tok 2 .*one expert a token.*supported: 1\)"),
    (scout(hidden_act="gelu"), "hidden_act 'gelu'.*supported: silu"),
    (scout(norm_topk_prob=True), "norm_topk_prob True"),
    (scout(num_experts=8), "num_experts 8"),
    (scout(apply_router_weight_on_input=False), "apply_router_weight_on_input False"),
    (SCOUT | {"quantization_config": {"quant_method": "fbgemm_fp8"}}, "fbgemm_fp8"),
    (SCOUT | {"text_config": TEXT}, "model_type 'qwen3_vl_moe_text'.*not known inside of llama4"),
    (GPT_OSS | {"swiglu_limit": 10.0}, r"swiglu_limit 10\.0.*one value only.*supported: 7\.0"),
    (GPT_OSS | {"swiglu_alpha": 1}, r"swiglu_alpha 1 .*one value only.*supported: 1\.702"),
    (GPT_OSS | {"hidden_act": "gelu"}, "hidden_act 'gelu'.*supported: silu"),
    (GPT_OSS | {"mlp_bias": False}, "mlp_bias False"),
    (GPT_OSS | {"norm_topk_prob": False}, "norm_topk_prob False"),
    (GPT_OSS | {"dtype": "float32"}, "quantized experts work on bf16"),
    (GPT_OSS | {"quantization_config": {"quant_method": "mxfp4", "group_size": 16}}, "group_size"),
    (MIXTRAL | {"quantization_config": {"quant_method": "mxfp4"}}, "quant_method is 'mxfp4'.*as gpt-oss stores it"),
    (DEEPSEEK_V2 | {"norm_topk_prob": True}, "norm_topk_prob True.*libraries differ"),
    (DEEPSEEK_V2 | {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'.*greedy, group_limited_greedy"),
    (MIXTRAL | {"norm_topk_prob": False}, "norm_topk_prob False.*family does not read it"),
    (MIXTRAL | {"hidden_act": "gelu"}, "hidden_act 'gelu'.*supported: silu"),
    (MINIMAX_M2 | {"use_routing_bias": False}, "use_routing_bias False.*has a correction bias"),
    (MINIMAX_M2 | {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
    (MINIMAX_M2 | {"shared_intermediate_size": 1536}, "shared_intermediate_size 1536"),
    (MINIMAX_M2 | {"layernorm_mlp_beta": 3.5}, "layernorm_mlp_beta 3.5"),
    (MINIMAX_M2 | {"routed_scaling_factor": 2.0}, "routed_scaling_factor 2.0"),
    (ERNIE | {"use_bias": True}, "use_bias True.*experts with biases"),
    (ERNIE | {"moe_use_aux_free": False}, "moe_use_aux_free False"),
    (ERNIE | {"moe_gate_act": "sigmoid"}, "moe_gate_act 'sigmoid'"),
    (ERNIE | {"moe_norm_min": 0.1}, "moe_norm_min 0.1"),
    (NEMOTRON | {"moe_latent_size": 1024}, "moe_latent_size 1024.*projection of the tokens"),
    (NEMOTRON | {"n_shared_experts": 2}, "n_shared_experts 2"),
    (NEMOTRON | {"mlp_hidden_act": "silu"}, "mlp_hidden_act 'silu'.*supported: relu2"),
    (NEMOTRON | {"mlp_bias": True}, "mlp_bias True"),
    (GLM_4_7 | {"mlp_layer_types": ["sparse"] * 92}, "mlp_layer_types"),
    (QWEN3_VL | {"text_config": TEXT | {"norm_topk_prob": False}}, "norm_topk_prob False.*always divides"),
    (QWEN3_VL | {"text_config": TEXT | {"model_type": "qwen3_moe"}}, "'qwen3_moe' in text_config.*not known inside"),
    (QWEN3_VL | {"text_config": TEXT | {"quant_notes": 1}}, "quant_notes"),
    (QWEN3_VL | {"swiglu_limit": 7.0}, "swiglu_limit"),
    (QWEN3_VL | {"architectures": ["Qwen3VLForConditionalGeneration"]}, "another model's"),
    (QWEN3_VL | {"text_config": TEXT | {"architectures": ["LlamaForCausalLM"]}}, "another model's"),
]


@pytest.mark.parametrize(("config", "said"), REFUSALS, ids=[said for _, said in REFUSALS])
def test_what_nothing_computes_is_refused(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=said):
        read_config(written(tmp_path, config))


CONTRADICTIONS = [
    (NEMOTRON | {"num_hidden_layers": 51}, "num_hidden_layers 51 and the lists of blocks, of 52 layers"),
    (NEMOTRON | {"layers_block_type": ["moe"] * 52}, "contradict each other"),
    (NEMOTRON | {"hybrid_override_pattern": "MX"}, "'MX' holds one that is not known"),
    (NEMOTRON | {"hybrid_override_pattern": ...}, "hybrid_override_pattern is missing"),
    (QWEN3_VL | {"torch_dtype": "float32"}, "dtype bf16 contradicts fp32"),
    (QWEN3_VL | {"text_config": ...}, "text_config is missing"),
    (ERNIE | {"moe_num_experts": [64, 64]}, "moe_num_experts = .* is no int"),
    (scout(num_experts_per_tok=...), "num_experts_per_tok is missing"),
    (scout(num_local_experts=...), "num_local_experts is missing"),
    (scout(moe_layers=[]), "none of its 48 layers has experts"),
    (scout(moe_layers=[1.0]), r"moe_layers = \[1\.0\] must hold layer numbers"),
    (scout(interleave_moe_layer_step=0), "interleave_moe_layer_step = 0 must be 1 or more"),
    (MIXTRAL | {"num_experts": 16}, "num_local_experts = 8 contradicts num_experts = 16"),
]


@pytest.mark.parametrize(("config", "said"), CONTRADICTIONS, ids=[said for _, said in CONTRADICTIONS])
def test_configs_that_make_no_sense(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_config(written(tmp_path, config))


def test_exceptions_know_the_family_s_names(tmp_path: Path) -> None:
    """Modules of experts that a list names are w1, w3 and w2 in MiniMax-M2."""
    directory = make_checkpoint(
        tmp_path / "made", hidden=128, intermediate=128, num_experts=8, top_k=2, model_type="minimax_m2"
    )
    config = json.loads((directory / "config.json").read_text())
    inside = [f"model.layers.1.block_sparse_moe.experts.{number}.w1" for number in range(8)]
    section = config["quantization_config"] | {"modules_to_not_convert": inside}
    with pytest.raises(UnsupportedError, match=r"converts .*w3 but not .*w1: the experts of a layer must have one"):
        layer_spec(written(directory, config | {"quantization_config": section}), 1)
    section["modules_to_not_convert"] = ["gate", "lm_head"]
    assert layer_spec(written(directory, config | {"quantization_config": section}), 1).quant == "fp8_block"


def tiny_sizes(family: str) -> dict[str, Any]:
    return TINY | {"top_k": 1 if family.startswith("llama4") else 2}


JUNK = [None, True, -1, 7, 10**400, float("nan"), "x", [[]], ["moe"], {"model_type": 1}]


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_any_value_of_any_key_is_read_or_refused(family: str, tmp_path: Path) -> None:
    quant: Any = "none" if family == "gpt_oss" else "fp8_block"
    made = make_checkpoint(tmp_path, **tiny_sizes(family), model_type=family, quant=quant)
    config = json.loads((made / "config.json").read_text())
    inner = config.get("text_config", config)
    said, read = [], 0
    for place in (config, inner) if inner is not config else (config,):
        for key, right in list(place.items()):
            for value in JUNK:
                place[key] = value
                try:
                    found = read_config(written(tmp_path, config)).spec
                except MoeDistError as error:
                    said.append(str(error))
                else:
                    read += 1
                    assert (found.hidden, found.num_experts) == (128, 8) or key in SIZES, (key, value)
            place[key] = right
    assert read
    assert all(len(text.splitlines()) == 1 for text in said)
