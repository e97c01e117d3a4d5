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
OF_QWEN = [
    ("scoring_func", "sigmoid"), ("routed_scaling_factor", 2.5), ("n_group", 4), ("topk_group", 2),
    ("n_shared_experts", 1), ("first_k_dense_replace", 1), ("moe_layer_freq", 2), ("topk_method", "noaux_tc"),
    ("n_routed_experts", 16), ("routed_scaling_factor", True),
]  # fmt: skip
OF_DEEPSEEK = [("mlp_only_layers", [1]), ("decoder_sparse_step", 2), ("num_experts", 16)]


@pytest.mark.parametrize(("family", "key", "value"), [
    *((family, *pair) for family in ("qwen3_moe", "deepseek_v3") for pair in OF_ALL),
    *(("qwen3_moe", *pair) for pair in OF_QWEN), *(("deepseek_v3", *pair) for pair in OF_DEEPSEEK),
])  # fmt: skip
def test_what_would_be_another_layer_is_refused(tmp_path, family, key, value):
    directory = edit(make_checkpoint(tmp_path / "model", model_type=family, **SIZES), {key: value})
    with pytest.raises(UnsupportedError, match=f"{key} .*does not read it") as caught:
        check_layer(directory, 1)
    assert len(str(caught.value).splitlines()) == 1


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
