"""Keys of config.json that a model family does not read: they must say what is computed anyway."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import edit

from moe_dist.checkpoint import check_layer, make_checkpoint, read_config, spec_from_config
from moe_dist.errors import UnsupportedError

SIZES: dict[str, Any] = {"hidden": 128, "intermediate": 128, "num_experts": 8, "top_k": 2, "shards": 1}


@pytest.fixture(params=["qwen3_moe", "deepseek_v3"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    return request.param, make_checkpoint(tmp_path / "model", model_type=request.param, **SIZES)


OF_ALL = [
    ("mlp_bias", True), ("swiglu_limit", 7.0), ("shared_expert_intermediate_size", 256), ("num_shared_experts", 1),
    ("interleave_moe_layer_step", 2), ("router_bias", True), ("apply_router_weight_on_input", True),
    ("zero_expert_num", 2), ("mlp_layer_types", ["dense", "dense"]), ("mlp_bias", 0), ("hidden_activation", "gelu"),
]  # fmt: skip
OTHERS = [  # what other model families and trainers call such things, and names that nobody knows
    ("route_scale", 3.5),
    ("router_scaling_factor", 3.5),
    ("moe_routed_scaling_factor", 3.5),
    ("score_func", "sqrt"),
    ("moe_router_score_function", "sqrt"),
    ("moe_use_sigmoid", 1),
    ("route_norm", False),
    ("moe_norm_topk_prob", False),
    ("moe_k", 6),
    ("moe_topk", 6),
    ("use_expert_bias", 1),
    ("num_expert_groups", 8),
    ("n_expert_groups", 8),
    ("num_limited_groups", 3),
    ("swiglu_limits", [7.0, 7.0]),
    ("mlp_hidden_act", "gelu"),
    ("moe_hidden_act", "gelu"),
    ("activation_function", "gelu"),
    ("n_shared_expert", 1),
    ("num_shared_expert", 1),
    ("zero_expert_type", "copy"),
    ("expert_capacity", 8),
    ("moe_drop_tokens", True),
    ("num_dense_layers", 2),
    ("expert_layer_period", 2),
    ("moe_layer_interval", 2),
    ("moe_layer_start_index", 1),
    ("moe_layers_enum", "1"),
    ("moe_layer_num_skipped", 1),
    ("moe_ffn_hidden_size", 64),
    ("expert_intermediate_size", 64),
    ("expert_dtype", "fp4"),
    ("weight_dtype", "fp4"),
    ("moe_of_tomorrow", False),
    ("Routed_X", 1),
    ("act_fn", "gelu"),
    ("gate\x1b[1m", 1),
]
OF_QWEN = [
    ("scoring_func", "sigmoid"), ("routed_scaling_factor", 2.5), ("n_group", 4), ("topk_group", 2),
    ("n_shared_experts", 1), ("first_k_dense_replace", 1), ("moe_layer_freq", 2), ("topk_method", "noaux_tc"),
    ("n_routed_experts", 16), ("routed_scaling_factor", True),
]  # fmt: skip
OF_DEEPSEEK = [("mlp_only_layers", [1]), ("decoder_sparse_step", 2), ("num_experts", 16)]


@pytest.mark.parametrize(("family", "key", "value"), [
    *((family, *pair) for family in ("qwen3_moe", "deepseek_v3") for pair in OF_ALL + OTHERS),
    *(("qwen3_moe", *pair) for pair in OF_QWEN), *(("deepseek_v3", *pair) for pair in OF_DEEPSEEK),
])  # fmt: skip
def test_what_would_be_another_layer_is_refused(tmp_path, family, key, value):
    directory = edit(make_checkpoint(tmp_path / "model", model_type=family, **SIZES), {key: value})
    with pytest.raises(UnsupportedError, match="does not read it") as caught:
        check_layer(directory, 1)
    assert len(str(caught.value).splitlines()) == 1
    assert key in str(caught.value) or not key.isprintable()


def test_values_that_say_what_is_computed_are_fine(model):
    family, directory = model
    before = read_config(directory).spec
    same: dict[str, Any] = {
        "mlp_bias": False, "swiglu_limit": None, "shared_expert_intermediate_size": 0, "num_local_experts": 8,
        "mlp_layer_types": ["sparse", "sparse"] if family == "qwen3_moe" else ["dense", "sparse"],
    }  # fmt: skip
    if family == "qwen3_moe":
        same |= {"scoring_func": "softmax", "routed_scaling_factor": 1, "n_group": 1, "topk_group": 1,
                 "first_k_dense_replace": 0, "n_shared_experts": 0, "moe_layer_freq": 1}  # fmt: skip
    else:
        same |= {"mlp_only_layers": [0], "decoder_sparse_step": 1}
    assert check_layer(edit(directory, same), 1).spec == before
    raw = json.loads((directory / "config.json").read_text())
    assert spec_from_config(raw, name=before.name) == before


# A transformers 4 dump of a whole config writes these of every model.
OF_NO_LAYER = {
    "router_aux_loss_coef": 0.001, "output_router_logits": False, "top_k": 50, "num_beam_groups": 1, "output_scores": 1,
    "attention_gate": True, "attn_output_gate": True, "index_topk": 2048, "seq_aux": True,
    "aux_loss_alpha": 0.001, "ep_size": 1, "chunk_size_feed_forward": 0, "moe_layers": None, "text_config": {},
    "experts_implementation": "grouped_mm", "kv_cache_dtype": "fp8", "num_key_value_heads": 4,
}  # fmt: skip


def test_keys_that_are_about_something_else_are_fine(model):
    directory = model[1]
    before = read_config(directory).spec
    same = {"route_scale": before.routed_scaling, "score_func": before.scoring, "moe_k": 2, "route_norm": True,
            "use_expert_bias": before.correction_bias, "moe_ffn_hidden_size": 128, "num_shared_expert": 0}  # fmt: skip
    assert check_layer(edit(directory, OF_NO_LAYER | same), 1).spec == before
    spec_from_config(json.loads((directory / "config.json").read_text()))


@pytest.mark.parametrize(
    "named",
    [
        ["LlamaForCausalLM"], ["DeepseekV32ForCausalLM"], "Qwen3MoeForCausalLM", [7], {"a": 1}, ["Qwen3MoeVL"],
        ["Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"],
    ],
)  # fmt: skip
def test_architectures_of_another_model_are_refused(model, named):
    with pytest.raises(UnsupportedError, match=r"architectures .* another model's"):
        read_config(edit(model[1], {"architectures": named}))


def test_architectures_of_the_family_are_fine(model):
    family, directory = model
    name = {"qwen3_moe": "Qwen3Moe", "deepseek_v3": "DeepseekV3"}[family]
    for named in ([f"{name}ForCausalLM"], [f"{name}Model", f"{name}ForSequenceClassification"], [], None):
        read_config(edit(directory, {"architectures": named}))


@pytest.mark.parametrize("inner", [{"model_type": "llama"}, {"num_experts": 4}, 7])
def test_a_model_inside_of_another_is_refused(model, inner):
    with pytest.raises(UnsupportedError, match="inside of others are not read"):
        read_config(edit(model[1], {"text_config": inner}))
