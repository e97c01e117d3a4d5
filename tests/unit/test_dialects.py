"""How FP8 checkpoints store their numbers, against a float32 reading that is written here: a weight is its E4M3 code
times the scale of its block, row or matrix; an input is divided by its scale before it is rounded. Sources:
quant_args.py of compressed-tensors and its `float-quantized` format, ModelOpt's hf_quant_config.json with quant_algo
FP8, and AutoFP8's quant_method fp8 with activation_scheme static, as vLLM's loaders read them
(model_executor/layers/quantization/)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FILE, Tensors, edit, section, whole
from safetensors.torch import load_file

from moe_dist import load_layer
from moe_dist.checkpoint import Checkpoint, check_layer, load_shard, load_shared_shard, make_checkpoint, read_config
from moe_dist.checkpoint.layout import layer_spec
from moe_dist.checkpoint.whole import WholeExperts
from moe_dist.errors import CheckpointError, UnsupportedError
from moe_dist.model.placement import Placement
from moe_dist.model.spec import ParallelSpec

LAYER, E, H, I = 1, 4, 256, 256
SIZES: dict[str, Any] = {"hidden": H, "intermediate": I, "num_experts": E, "top_k": 2, "layers": 2, "shards": 1}
# Family: where its experts are, their matrices, and its shared expert.
FORMS = {
    "qwen3_moe": ("model.layers.1.mlp", ("gate_proj", "up_proj", "down_proj"), None),
    "glm4_moe": ("model.layers.1.mlp", ("gate_proj", "up_proj", "down_proj"), "shared_experts"),
    "mixtral": ("model.layers.1.block_sparse_moe", ("w1", "w3", "w2"), None),
    "nemotron_h": ("backbone.layers.1.mixer", ("up_proj", "down_proj"), "shared_experts"),
}
KINDS = ("fp8_channel", "fp8_tensor_dynamic", "fp8_tensor_static")
NUMBERS = {"num_bits": 8, "symmetric": True, "type": "float"}


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """A section as llm-compressor writes it."""
    group = {
        "format": None, "output_activations": None, "targets": ["Linear"],
        "weights": NUMBERS | {"actorder": None, "dynamic": False, "observer": "minmax"} | weights,
        "input_activations": inputs and NUMBERS | {"observer": None, "observer_kwargs": {}} | inputs,
    }  # fmt: skip
    return {
        "config_groups": {"group_0": group}, "format": "float-quantized", "global_compression_ratio": None,
        "ignore": ["lm_head", "re:.*mlp.gate$"], "kv_cache_scheme": None, "quant_method": "compressed-tensors",
        "quantization_status": "compressed", "sparsity_config": {}, "transform_config": {}, "version": "0.12.2",
    } | more  # fmt: skip


PER_TOKEN = {"dynamic": True, "strategy": "token"}


def one_scale(tensors: Tensors) -> Tensors:
    """Each row's codes as they are, with the scale of the first row for all of them."""
    return {
        name: tensor.flatten()[:1].clone() if name.endswith("weight_scale") else tensor
        for name, tensor in tensors.items()
    }


def renamed(tensors: Tensors) -> Tensors:
    return {name.replace("weight_scale_inv", "weight_scale"): tensor for name, tensor in tensors.items()}


def flat(tensors: Tensors) -> Tensors:
    """Scales without a dimension of one, and single numbers with one."""
    return {
        name: tensor.flatten() if name.endswith(("weight_scale", "input_scale")) else tensor
        for name, tensor in tensors.items()
    }


# Dialect: what is made, the section then written, what the tensors become, and what is computed.
DIALECTS: dict[str, tuple[str, Any, Callable[[Tensors], Tensors], str]] = {
    "per channel, per token": (
        "fp8_channel", compressed({"strategy": "channel"}, PER_TOKEN), lambda tensors: tensors, "fp8_channel"),
    "per channel, flat": ("fp8_channel", compressed({"strategy": "channel"}, PER_TOKEN), flat, "fp8_channel"),
    "per tensor, per token": ("fp8_channel", compressed({"strategy": "tensor"}, PER_TOKEN), one_scale, "fp8_channel"),
    "per tensor, dynamic": (
        "fp8_tensor_dynamic", compressed({"strategy": "tensor"}, {"dynamic": True, "strategy": "tensor"}), flat,
        "fp8_tensor_dynamic"),
    "per tensor, static": (
        "fp8_tensor_static", compressed({"strategy": "tensor"}, {"dynamic": False, "strategy": "tensor"}), flat,
        "fp8_tensor_static"),
    "blocks": (
        "fp8_block", compressed({"strategy": "block", "block_structure": [128, 128]},
                                {"dynamic": True, "strategy": "group", "group_size": 128}), renamed, "fp8_block"),
    "AutoFP8": (
        "fp8_tensor_static", {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        lambda tensors: tensors, "fp8_tensor_static"),
    "ModelOpt, in groups": (
        "fp8_tensor_static", {"quant_algo": "FP8", "quant_method": "modelopt", "ignore": ["lm_head"], "producer": {},
                              "kv_cache_scheme": {"num_bits": 8}, "config_groups": {"group_0": {
                                  "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
                                  "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
                                  "targets": ["Linear"]}}}, lambda tensors: tensors, "fp8_tensor_static"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("dialects")

    def make(model_type: str, quant: str) -> Path:
        return make_checkpoint(root / f"{model_type}-{quant}", model_type=model_type, quant=quant, **SIZES)

    return make


def matrix(tensors: Tensors, prefix: str) -> torch.Tensor:
    """[N, K] in float32: codes times scales, which are [N, 1] or [N], one number, or one for each block."""
    codes = tensors[f"{prefix}.weight"].float()
    scales = next(
        tensors[f"{prefix}.{name}"] for name in ("weight_scale", "weight_scale_inv") if f"{prefix}.{name}" in tensors
    )
    if scales.numel() == 1:
        return codes * scales.item()
    if scales.numel() == len(codes):
        return codes * scales.reshape(-1, 1)
    return codes * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)


def expert(tensors: Tensors, family: str, number: int | None) -> list[torch.Tensor]:
    """Its matrices, down last; None is the shared one."""
    block, modules, shared = FORMS[family]
    prefix = f"{block}.{shared}" if number is None else f"{block}.experts.{number}"
    return [matrix(tensors, f"{prefix}.{module}") for module in modules]


def output(x: torch.Tensor, matrices: list[torch.Tensor]) -> torch.Tensor:
    *first, down = matrices
    inner = [x @ part.T for part in first]
    hidden = inner[0].relu() ** 2 if len(first) == 1 else inner[0] * inner[0].sigmoid() * inner[1]
    return hidden @ down.T


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def layer_error(loaded: Path, written: Path, family: str) -> float:
    """Of the layer in `loaded`, whose inputs are rounded to FP8, against exact experts from the files in `written`."""
    tensors, layer = load_file(written / FILE), load_layer(loaded, LAYER)
    x = torch.randn(32, H, generator=torch.Generator().manual_seed(5)).bfloat16()
    assert layer.router is not None
    routing = layer.router(x)
    weights = torch.zeros(len(x), E).scatter_(1, routing.ids_TK.long(), routing.weights_TK)
    wanted = sum(weights[:, [number]] * output(x.float(), expert(tensors, family, number)) for number in range(E))
    if FORMS[family][2]:
        wanted = wanted + output(x.float(), expert(tensors, family, None))
    assert isinstance(wanted, torch.Tensor)
    return difference(layer(x), wanted)


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_their_codes_times_their_scales(made: Any, family: str, kind: str) -> None:
    directory, (_, modules, shared) = made(family, kind), FORMS[family]
    tensors, spec = load_file(directory / FILE), check_layer(directory, LAYER, shared=FORMS[family][2] is not None).spec
    assert spec.quant == kind
    apart = WholeExperts(directory, LAYER)
    placement = Placement.build(spec, ParallelSpec(tp=2, ep=2))
    for rank in range(4):
        source = Checkpoint(directory)
        held = load_shard(source, LAYER, placement, rank)
        start, stop = placement.slice_of(rank)
        assert stop - start == I // 2
        for slot, number in enumerate(placement.experts_of(rank)):
            *first, down = expert(tensors, family, number)
            w13, w2 = held.dequantized(slot)
            assert torch.equal(w13, torch.cat([part[start:stop] for part in first]))
            assert torch.equal(w2, down[:, start:stop])
            gate, up, whole_down = apart.expert(number)
            assert torch.equal(torch.cat([gate, up]), torch.cat(first))
            assert torch.equal(whole_down, down)
        # One static scale of each of the layer's other matrices comes on top.
        others = (E + (shared is not None)) * (len(modules) - 1) - 1
        assert source.bytes_read == held.nbytes() + (4 * others if kind == "fp8_tensor_static" else 0)
    assert layer_error(directory, directory, family) < 0.06


@pytest.mark.parametrize("family", FORMS)
def test_static_scales_of_inputs(made: Any, family: str) -> None:
    """One for what goes into a layer, the largest that any of its experts has; one for each expert's last matrix."""
    directory, (block, modules, shared) = made(family, "fp8_tensor_static"), FORMS[family]
    louder = f"{block}.{shared or 'experts.3'}.{modules[-2]}.input_scale"
    tensors = load_file(directory / FILE)
    changed = edit_copy(directory, {louder: tensors[louder] * 3})
    for source in (directory, changed):
        tensors = load_file(source / FILE)
        prefixes = [f"{block}.experts.{number}" for number in range(E)] + [f"{block}.{shared}"] * bool(shared)
        largest = max(
            float(tensors[f"{prefix}.{module}.input_scale"]) for prefix in prefixes for module in modules[:-1]
        )
        weights = whole(source, LAYER)
        assert weights.a13 is not None
        assert weights.a2 is not None
        assert float(weights.a13) == largest
        assert weights.a2.tolist() == [float(tensors[f"{prefix}.{modules[-1]}.input_scale"]) for prefix in prefixes[:E]]
        if shared:
            part = load_shared_shard(source, LAYER, 0, check_layer(source, LAYER).spec.shared_intermediate)
            assert part.a13 is not None
            assert part.a2 is not None
            assert (float(part.a13), float(part.a2)) == (
                largest,
                float(tensors[f"{prefixes[-1]}.{modules[-1]}.input_scale"]),
            )
    assert float(tensors[louder]) == largest


def edit_copy(directory: Path, changes: Tensors) -> Path:
    copy = directory.with_name(f"{directory.name}-changed")
    shutil.rmtree(copy, ignore_errors=True)
    return edit(Path(shutil.copytree(directory, copy)), None, lambda tensors: tensors | changes)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects(tmp_path: Path, dialect: str) -> None:
    quant, said, change, computed = DIALECTS[dialect]
    directory = make_checkpoint(tmp_path / "model", quant=quant, **SIZES)
    edit(directory, {"quantization_config": said}, change)
    assert read_config(directory).spec.quant == check_layer(directory, LAYER).spec.quant == computed
    tensors, weights = load_file(directory / FILE), whole(directory, LAYER)
    for number in range(E):
        *first, down = expert(tensors, "qwen3_moe", number)
        w13, w2 = weights.dequantized(number)
        assert torch.equal(w13, torch.cat(first))
        assert torch.equal(w2, down)
    assert layer_error(directory, directory, "qwen3_moe") < 0.06


@pytest.mark.parametrize("kind", [*KINDS, "fp8_block"])
@pytest.mark.parametrize("module", ["gate_proj", "up_proj", "down_proj"])
def test_a_wrong_scale_would_be_seen(made: Any, kind: str, module: str) -> None:
    directory = made("qwen3_moe", kind)
    suffix = "weight_scale_inv" if kind == "fp8_block" else "weight_scale"
    names = [f"model.layers.1.mlp.experts.{number}.{module}.{suffix}" for number in range(E)]
    tensors = load_file(directory / FILE)
    assert layer_error(edit_copy(directory, {name: 2 * tensors[name] for name in names}), directory, "qwen3_moe") > 0.3


def test_modelopts_own_file_and_config_say_the_same(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", quant="fp8_tensor_static", **SIZES)
    left_out = ["lm_head", "model.layers.0.mlp*"]
    said = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": left_out}
    own = {"producer": {"name": "modelopt"}, "quantization": said}
    (directory / "hf_quant_config.json").write_text(json.dumps(own))
    assert layer_spec(directory, LAYER).quant == "fp8_tensor_static"
    with pytest.raises(CheckpointError, match=r"quantizes the experts of layer 0, .* leaves them out"):
        layer_spec(directory, 0)
    edit(directory, {"quantization_config": compressed({"strategy": "channel"}, PER_TOKEN)})
    with pytest.raises(CheckpointError, match="quantize layer 1 in two ways"):
        layer_spec(directory, LAYER)


FIXED = {"dynamic": False, "strategy": "tensor"}
REFUSALS: list[tuple[Any, str]] = [
    (compressed({"strategy": "channel"}, None), "input_activations is None"),
    (compressed({"strategy": "channel"}, FIXED), "'channel' and .* by 'tensor', dyn"),
    (compressed({"strategy": "tensor"}, FIXED | {"strategy": "token"}), "'tensor' and .* by 'token', dynamic False"),
    (compressed({"strategy": "group", "group_size": 32}, PER_TOKEN), "weights: key 'group_size' = 32 is not known"),
    (compressed({"strategy": "block", "block_structure": [64, 128]}, PER_TOKEN), r"block_structure is \[64, 128\]"),
    (compressed({"strategy": "block"}, {"dynamic": True, "strategy": "group", "group_size": 128}), "are not computed"),
    (compressed({"strategy": ["channel"]}, PER_TOKEN), "are not computed"),
    (compressed({"strategy": "channel", "num_bits": 4}, PER_TOKEN), "weights: num_bits is 4"),
    (compressed({"strategy": "channel", "num_bits": None}, PER_TOKEN), "weights: num_bits is None"),
    (compressed({"strategy": "channel", "type": "int"}, PER_TOKEN), "weights: type is 'int'"),
    (compressed({"strategy": "channel", "symmetric": False}, PER_TOKEN), "weights: symmetric is False"),
    (compressed({"strategy": "channel", "actorder": "static"}, PER_TOKEN), "weights: actorder is 'static'"),
    (compressed({"strategy": "channel", "rotated": 1}, PER_TOKEN), "key 'rotated' = 1 is not known"),
    (compressed({"strategy": "channel"}, PER_TOKEN, format="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'"),
    (compressed({"strategy": "channel"}, PER_TOKEN, format=None), "format is None"),
    (compressed({"strategy": "channel"}, PER_TOKEN, quantization_status="frozen"), "quantization_status is 'frozen'"),
    (compressed({"strategy": "channel"}, PER_TOKEN, transform_config={"R1": {}}), "transform_config is"),
    (compressed({"strategy": "channel"}, PER_TOKEN, config_groups={}), "config_groups is {}, and one group is read"),
    (compressed({"strategy": "channel"}, PER_TOKEN, config_groups={"a": 1, "b": 2}), "and one group is read"),
    (compressed({"strategy": "channel"}, PER_TOKEN, config_groups={"a": 1}), "its group is 1"),
    ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "weight_block_size is None"),
    ({"quant_method": ["fp8"]}, r"quant_method is \['fp8'\]"),
    ({"quant_method": "modelopt", "quant_algo": "FP8", "rotation": 1}, "key 'rotation' = 1 is not known"),
    ({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "quant_algo is 'FP8_PER_CHANNEL"),
    ({"quant_method": "modelopt", "quant_algo": "FP8", "config_groups": compressed({"strategy": "channel"}, PER_TOKEN)[
        "config_groups"]}, "are not FP8's"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "why"), REFUSALS, ids=[why for _, why in REFUSALS])
def test_what_no_backend_computes_is_refused_by_name(made: Any, tmp_path: Path, said: Any, why: str) -> None:
    config = json.loads((made("qwen3_moe", "fp8_block") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    with pytest.raises(UnsupportedError, match=why):
        read_config(tmp_path)


def test_scales_that_are_missing_or_not_read(made: Any) -> None:
    directory = made("mixtral", "fp8_tensor_static")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.input_scale"
    copy = edit_copy(directory, {})
    edit(copy, None, lambda tensors: {other: tensor for other, tensor in tensors.items() if other != name})
    for ask in (lambda: check_layer(copy, LAYER), lambda: layer_spec(copy, LAYER), lambda: whole(copy, LAYER)):
        with pytest.raises(CheckpointError, match=rf"1 tensor is missing: {name}"):
            ask()
    dynamic = edit_copy(made("mixtral", "fp8_channel"), {name: torch.ones(())})
    with pytest.raises(CheckpointError, match=rf"nothing here reads: {name}"):
        check_layer(dynamic, LAYER)
    for value in (0.0, -1.0, torch.nan, torch.inf):
        with pytest.raises(CheckpointError, match=name):
            whole(edit_copy(directory, {name: torch.tensor(value)}), LAYER)
    with pytest.raises(CheckpointError, match=r"shape \(2,\), the config asks for \(\)"):
        check_layer(edit_copy(directory, {name: torch.ones(2)}), LAYER)


def test_powers_of_two_as_scales_of_rows(made: Any) -> None:
    """ue8m0: an exponent alone."""
    directory = made("qwen3_moe", "fp8_channel")
    tensors = load_file(directory / FILE)
    powers = {
        name: (2.0 ** scales.log2().round()).to(torch.float8_e8m0fnu)
        for name, scales in tensors.items() if name.endswith("weight_scale")
    }  # fmt: skip
    copy = edit_copy(directory, powers)
    *first, down = expert({name: tensor.float() for name, tensor in load_file(copy / FILE).items()}, "qwen3_moe", 0)
    w13, w2 = whole(copy, LAYER).dequantized(0)
    assert torch.equal(w13, torch.cat(first))
    assert torch.equal(w2, down)


def test_fused_experts_have_scales_of_blocks_only(made: Any) -> None:
    directory = made("qwen3_moe", "fp8_channel")
    tensors = load_file(directory / FILE)
    prefix = "model.layers.1.mlp.experts"
    gate, up = ([tensors[f"{prefix}.{n}.{part}_proj.weight"] for n in range(E)] for part in ("gate", "up"))
    both = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
    copy = edit_copy(directory, {})
    edit(
        copy,
        None,
        lambda found: {n: t for n, t in found.items() if f"{prefix}." not in n} | {f"{prefix}.gate_up_proj": both},
    )
    with pytest.raises(UnsupportedError, match=r"fused experts .* are read with a scale for each 128×128 block"):
        check_layer(copy, LAYER)


def test_a_list_takes_layers_out_of_every_method(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", quant="fp8_channel", **SIZES)
    changes = section(directory, ignore=["re:.*layers\\.1\\.mlp\\.experts.*"])
    names = (".weight_scale",)
    edit(directory, changes, lambda tensors: {
        name: tensor.float().bfloat16() if "layers.1.mlp.experts" in name else tensor
        for name, tensor in tensors.items() if not ("layers.1" in name and name.endswith(names))})  # fmt: skip
    assert layer_spec(directory, 1).quant_label == "bf16"
    assert layer_spec(directory, 0).quant_label == "fp8_channel"
