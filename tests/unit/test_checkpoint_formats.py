"""What a layer's format is decided by: quantization sections, lists of exceptions, ModelOpt's file, tensor headers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FILE, Tensors, edit, layer_in_bf16, section, whole
from safetensors.torch import load_file

from moe_dist.checkpoint import check_layer, layer_spec, make_checkpoint, read_config
from moe_dist.checkpoint.quantization import Exceptions
from moe_dist.commands.cli import main
from moe_dist.errors import CheckpointError, MoeDistError, UnsupportedError

SIZES: dict[str, Any] = {"hidden": 256, "intermediate": 256, "num_experts": 4, "top_k": 2, "shards": 1}
EXPERTS = "model.layers.1.mlp.experts"
MODELOPT = {"producer": {"name": "modelopt", "version": "0.29.0"}}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    kinds = {
        "fp8": {},
        "bf16": {"quant": "none"},
        "deepseek": {"model_type": "deepseek_v3", "num_experts": 8},
    }
    return {name: make_checkpoint(root / name, **(SIZES | options)) for name, options in kinds.items()}


@pytest.fixture
def model(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy that a test may change."""
    return lambda kind: Path(shutil.copytree(originals[kind], tmp_path / kind))


def refusal(directory: Path, kind: type[MoeDistError] | tuple[type[MoeDistError], ...] = MoeDistError) -> str:
    """The one line that a layer is refused with, by its spec or by the check of its headers."""
    with pytest.raises(kind) as caught:
        check_layer(directory, 1)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1500
    return str(caught.value)


# Which layers are quantized


@pytest.mark.parametrize(
    "entry",
    [
        "model.layers.1",
        "model.layers.1.mlp",
        EXPERTS,
        f"{EXPERTS}.",
        "layers.1.mlp.experts",
        r"re:.*layers\.1\.mlp\.experts\..*",
        "re:model.layers.1.*_proj$",
        "model.layers.1.*",
        "*layers.1.mlp.experts*",
    ],
)
@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers", "ignore"])
def test_a_layer_that_a_list_takes_out_is_what_its_tensors_are(model: Any, entry: str, key: str) -> None:
    directory = model("fp8")
    edit(directory, section(directory, **{key: ["lm_head", entry]}), layer_in_bf16)
    assert layer_spec(directory, 0).quant_label == "fp8_block"
    assert layer_spec(directory, 1).quant_label == "bf16"
    assert check_layer(directory, 1).spec.quant_label == "bf16"
    assert read_config(directory).spec.quant_label == "fp8_block"
    tensors, found = load_file(directory / FILE), whole(directory)
    assert found.w13_eFH.dtype == torch.bfloat16
    for expert in range(4):
        rows = [tensors[f"{EXPERTS}.{expert}.{part}_proj.weight"] for part in ("gate", "up")]
        assert torch.equal(found.w13_eFH[expert], torch.cat(rows))


@pytest.mark.parametrize(
    "entry", ["lm_head", "model.layers.11", "gate", "layers.1.mlp.gate", "re:.*self_attn.*", "*.10.*"]
)
def test_lists_that_name_other_modules_change_nothing(model: Any, entry: str) -> None:
    directory = model("fp8")
    edit(directory, section(directory, modules_to_not_convert=[entry]))
    assert check_layer(directory, 1).spec.quant_label == "fp8_block"


def test_config_and_headers_that_contradict_each_other_are_both_named(model: Any) -> None:
    directory = edit(model("fp8"), None, layer_in_bf16)
    text = refusal(directory, CheckpointError)
    assert f"tensor {EXPERTS}.0.gate_proj.weight has dtype BF16" in text
    assert "quantization_config in" in text
    assert "no list takes it out" in text
    other = model("bf16")
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    edit(other, {"quantization_config": config | {"ignored_layers": ["model.layers.0"]}})
    assert layer_spec(other, 0).quant_label == "bf16"
    assert "has dtype BF16" in refusal(other)
    edit(directory, section(directory, ignored_layers=["model.layers.0"]))
    with pytest.raises(CheckpointError, match=r"dtype F8_E4M3, but quantization_config in .* lists this layer as not"):
        layer_spec(directory, 0)
    edit(directory, {"quantization_config": ...})
    with pytest.raises(CheckpointError, match=r"dtype F8_E4M3, but .*config\.json has no quantization_config"):
        layer_spec(directory, 0)


def test_experts_of_two_formats_in_one_layer_are_refused(model: Any) -> None:
    directory = model("fp8")
    edit(directory, section(directory, ignore=[f"{EXPERTS}.3"]))
    assert f"it converts {EXPERTS}.0.gate_proj but not {EXPERTS}.3" in refusal(directory, UnsupportedError)
    edit(directory, section(directory, ignore=["down_proj"]))
    assert "the experts of a layer must have one format" in refusal(directory, UnsupportedError)


def test_a_shared_expert_of_another_format_is_refused_only_if_it_is_asked_for(model: Any) -> None:
    directory = model("deepseek")

    def plain(tensors: Tensors) -> Tensors:
        kept = {name: tensor for name, tensor in tensors.items() if not ("shared" in name and "scale" in name)}
        return {name: tensor.float().bfloat16() if "shared" in name else tensor for name, tensor in kept.items()}

    edit(directory, section(directory, modules_to_not_convert=["model.layers.1.mlp.shared_experts"]), plain)
    check_layer(directory, 1)
    with pytest.raises(UnsupportedError, match=r"shared expert of layer 1 .* in BF16"):
        check_layer(directory, 1, shared=True)


def test_where_the_config_says_no_dtype_the_headers_do(model: Any) -> None:
    directory = edit(model("bf16"), {"torch_dtype": ...})
    assert layer_spec(directory, 1).quant_label == "bf16"
    edit(directory, None, lambda tensors: {name: tensor.float() for name, tensor in tensors.items()})
    assert layer_spec(directory, 1).quant_label == "fp32"
    assert whole(directory).w13_eFH.dtype == torch.float32
    edit(directory, {"torch_dtype": "bfloat16"})
    assert "has dtype F32, but" in refusal(directory, CheckpointError)
    edit(directory, {"dtype": "float32"})
    assert "key dtype = 'float32' contradicts torch_dtype = 'bfloat16'" in refusal(directory, CheckpointError)
    edit(directory, {"torch_dtype": ..., "dtype": ...}, lambda tensors: {n: t.half() for n, t in tensors.items()})
    assert "dtype F16 of tensor" in refusal(directory, UnsupportedError)


# Quantization that is not read


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale_fmt": "e5m2"}, "scale_fmt is 'e5m2'"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"activation_scheme": "static"}, "activation_scheme is 'static'"),
        ({"weight_block_size": ...}, "weight_block_size is None"),
        ({"weight_block_size": [128, 64]}, "weight_block_size is [128, 64]"),
        ({"dequantize": True}, "dequantize is True"),
        ({"dequantize": 0}, "dequantize is 0"),
        ({"rotation": "hadamard"}, "key 'rotation' = 'hadamard' is not known"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is"),
        ({"quant_method": "awq", "bits": 4}, "quant_method is 'awq', bits is 4"),
        ({"quant_method": ...}, "quant_method is None"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo is 'NVFP4'"),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8_PB_WO"}}, "quant_algo is 'FP8_PB_WO'"),
        (
            {
                "quant_method": "compressed-tensors", "format": "float-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
            },
            "format is 'float-quantized', fmt is 'e4m3', weights have num_bits 8, type 'float', strategy 'channel'",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_sections_that_are_not_read_say_what_was_found(model: Any, changes: dict[str, Any], said: str) -> None:
    directory = model("fp8")
    edit(directory, section(directory, **changes))
    text = refusal(directory, UnsupportedError)
    assert said in text
    assert "quantization_config in" in text
    with pytest.raises(UnsupportedError):
        read_config(directory)


def test_sections_that_change_nothing_are_read(model: Any) -> None:
    directory = model("fp8")
    harmless = {"fmt": "float8_e4m3fn", "scale_fmt": "ue8m0", "dequantize": False, "ignored_layers": None, "ignore": []}
    edit(directory, section(directory, **harmless))
    assert check_layer(directory, 1).spec.quant_label == "fp8_block"


def test_a_layer_left_out_of_a_quantization_that_is_not_read_is_read(model: Any) -> None:
    directory = model("bf16")
    left_out = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "ignore": ["re:.*layers.1.mlp.*"],
    }
    edit(directory, {"quantization_config": left_out})
    assert layer_spec(directory, 1).quant_label == "bf16"
    with pytest.raises(UnsupportedError, match="nvfp4-pack-quantized"):
        layer_spec(directory, 0)
    edit(directory, {"quantization_config": ...})
    (directory / "hf_quant_config.json").write_text(
        json.dumps(MODELOPT | {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["model.layers.1*"]}})
    )
    assert layer_spec(directory, 1).quant_label == "bf16"
    with pytest.raises(UnsupportedError, match=r"hf_quant_config\.json is not supported: quant_algo is 'NVFP4'"):
        layer_spec(directory, 0)


def test_modelopts_file_is_heard(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    directory = model("bf16")
    path = directory / "hf_quant_config.json"
    path.write_text(json.dumps(MODELOPT | {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}))
    assert main(["plan", "--checkpoint", str(directory)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert str(path) in err
    assert "quant_algo is 'NVFP4' with group_size 16" in err
    for algorithm in ("FP8_PB_WO", "MIXED_PRECISION", 4, ["W4A8"]):
        path.write_text(json.dumps(MODELOPT | {"quantization": {"quant_algo": algorithm}}))
        assert f"quant_algo is {algorithm!r}" in refusal(directory, UnsupportedError)
    path.write_text(json.dumps(MODELOPT | {"quantization": {"quant_algo": "FP8"}}))
    assert f"has dtype BF16, but the quantization in {path} makes this layer F8_E4M3" in refusal(
        directory, CheckpointError
    )
    path.write_text(json.dumps(MODELOPT | {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}))
    assert check_layer(directory, 1).spec.quant_label == "bf16"
    path.write_text(json.dumps(MODELOPT | {"quantization": {"quant_algo": None, "awq_block_size": 128}}))
    assert "key 'awq_block_size' = 128 is not known" in refusal(directory, UnsupportedError)
    for content in ({"quantization": {}}, {"quantization": {"kv_cache_quant_algo": "FP8"}}):
        path.write_text(json.dumps(content))
        assert "says nothing of quant_algo" in refusal(directory, UnsupportedError)
    for text, said in (("{", "can't be read as JSON"), ("{}", "key quantization = None is no dict")):
        path.write_text(text)
        assert said in refusal(directory, CheckpointError)


def test_two_files_that_contradict_each_other_are_both_named(model: Any) -> None:
    directory = model("fp8")
    content = {"quant_algo": "FP8", "exclude_modules": ["model.layers.1*"]}
    (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": content}))
    text = refusal(directory, CheckpointError)
    assert "quantization_config in" in text
    assert "hf_quant_config.json leaves them out" in text


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_other_libraries_files_are_heard(model: Any, name: str) -> None:
    directory = model("bf16")
    (directory / name).write_text(json.dumps({"bits": 4, "group_size": 128}))
    assert f"{name} is not supported: its weights have 4 bits" in refusal(directory, UnsupportedError)


@pytest.mark.parametrize("name", [
    "quantization_config.json", "quant_model_description.json", "adapter_config.json", "adapter_model.safetensors",
    "adapter_model.bin",
])  # fmt: skip
def test_files_that_change_what_the_weights_mean_are_refused(model: Any, name: str) -> None:
    directory = model("bf16")
    (directory / "recipe.yaml").write_text("default_stage: {}")  # the story of how it was made changes nothing
    check_layer(directory, 1)
    (directory / name).write_text("{}")
    assert f"{name} beside the weights is not supported: " in refusal(directory, UnsupportedError)


@pytest.mark.parametrize("key", ["compression_config", "quantization", "quant_config", "weight_quant"])
def test_other_keys_that_hint_at_a_quantization_are_heard(model: Any, key: str) -> None:
    directory = edit(model("bf16"), {key: {"bits": 4}})
    assert f"key {key!r} may say how numbers are stored" in refusal(directory, UnsupportedError)
    assert check_layer(edit(directory, {key: None}), 1).spec.quant_label == "bf16"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization_config": [1]}, "key quantization_config = [1] is no dict"),
        ({"ignore": "lm_head"}, "key ignore = 'lm_head' is no list"),
        ({"ignore": [5]}, "ignore holds 5, which is no name of a module"),
        ({"ignore": ["."]}, "ignore holds '.', which is no name of a module"),
        ({"ignored_layers": ["re:("]}, "ignored_layers holds 're:(', no pattern"),
        ({"ignore": ["re:(?!x).*"]}, "look-around, flags and back references are not read"),
        ({"ignore": ["*x"] * 1001}, "1,001 patterns, at most 1,000 are read"),
    ],
)  # fmt: skip
def test_sections_that_are_none_are_refused(model: Any, changes: dict[str, Any], said: str) -> None:
    directory = model("fp8")
    edit(directory, changes if "quantization_config" in changes else section(directory, **changes))
    assert said in refusal(directory, CheckpointError)


def test_exceptions_are_runs_of_whole_parts_of_a_name() -> None:
    found = Exceptions.parse(["mlp.experts.1", "re:a.b$", "c.*.d"], "ignore", "config.json")
    assert found.cover("model.layers.0.mlp.experts.1.up_proj")
    assert not found.cover("model.layers.0.mlp.experts.11.up_proj")
    assert found.cover("a.b")
    assert not found.cover("x.a.b")  # a pattern matches from the start
    assert found.cover("c.x.d")
