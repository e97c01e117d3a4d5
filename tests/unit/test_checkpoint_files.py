"""The forms of tensors on disk, what a near miss is told, folders that mean harm, and torch's defaults."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FILE, INDEX, Tensors, edit, fused, layer_in_bf16, section, whole
from safetensors.torch import load_file, save_file

from moe_dist.checkpoint import (
    Checkpoint,
    check_layer,
    layer_spec,
    load_router,
    load_shard,
    load_shared_shard,
    make_checkpoint,
    read_config,
)
from moe_dist.errors import CheckpointError, ConfigError, MoeDistError, UnsupportedError
from moe_dist.model.placement import Placement
from moe_dist.model.spec import ParallelSpec
from moe_dist.model.weights import ExpertWeights, shard

SIZES: dict[str, Any] = {"hidden": 256, "intermediate": 256, "num_experts": 4, "top_k": 2, "shards": 1}
LAYER = "model.layers.1.mlp"
EXPERTS = f"{LAYER}.experts"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    kinds = {
        "fp8": {},
        "bf16": {"quant": "none"},
        "deepseek": {"model_type": "deepseek_v3", "num_experts": 8},
        "sharded": {"shards": 2},
        "narrow": {"intermediate": 192},
    }
    return {name: make_checkpoint(root / name, **(SIZES | options)) for name, options in kinds.items()}


@pytest.fixture
def model(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy that a test may change."""
    return lambda kind: Path(shutil.copytree(originals[kind], tmp_path / kind))


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def assert_equal(found: ExpertWeights, wanted: ExpertWeights) -> None:
    assert found.tensors().keys() == wanted.tensors().keys()
    for name, tensor in wanted.tensors().items():
        assert found.tensors()[name].dtype == tensor.dtype
        assert torch.equal(found.tensors()[name].view(torch.uint8), tensor.view(torch.uint8)), name


def refusal(directory: Path, kind: type[MoeDistError] = MoeDistError) -> str:
    """The one line that a layer is refused with."""
    with pytest.raises(kind) as caught:
        check_layer(directory, 1)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1500
    assert str(caught.value).isprintable()
    return str(caught.value)


# Forms


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("parallel", [{}, {"tp": 2}, {"ep": 3}, {"tp": 2, "ep": 2}])
def test_fused_experts_are_read_in_slices(originals: Any, model: Any, kind: str, parallel: dict[str, int]) -> None:
    plain, directory = whole(originals[kind]), edit(model(kind), None, fused)
    spec = layer_spec(directory, 1)
    placement = Placement.build(spec, ParallelSpec(**parallel))
    read = 0
    for rank in range(placement.world):
        checkpoint = Checkpoint(directory)
        found = load_shard(checkpoint, 1, placement, rank)
        assert_equal(found, shard(plain, placement, rank))
        assert checkpoint.bytes_read == found.nbytes()
        read += checkpoint.bytes_read
    assert read == plain.nbytes()
    assert check_layer(directory, 1).spec == spec


def test_fused_experts_that_are_not_whole(model: Any) -> None:
    directory = edit(model("fp8"), None, fused)

    def bad(number: int, value: int) -> Callable[[Tensors], Tensors]:
        def change(tensors: Tensors) -> Tensors:
            tensors[f"{EXPERTS}.gate_up_proj"].view(torch.uint8)[number, 256:] = value
            return tensors

        return change

    edit(directory, None, bad(2, 0))
    check_layer(directory, 1)
    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj, expert 2, is all zeros"):
        whole(directory)
    edit(directory, None, bad(2, 0x7F))
    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj, expert 2, holds NaN"):
        whole(directory)
    edit(directory, None, lambda tensors: tensors | {f"{EXPERTS}.gate_up_proj": tensors[f"{EXPERTS}.gate_up_proj"][:3]})
    assert "has shape (3, 512, 256), the config asks for (4, 512, 256)" in refusal(directory)
    turned = edit(model("bf16"), None, fused)
    edit(turned, None, lambda tensors: {n: t.mT if n.endswith("gate_up_proj") else t for n, t in tensors.items()})
    assert "has shape (4, 256, 512), the config asks for (4, 512, 256)" in refusal(turned)


def test_fused_scales_of_gate_and_up_in_one_block_are_refused(model: Any) -> None:
    assert "192 is no multiple of 128" in refusal(edit(model("narrow"), None, fused), UnsupportedError)


def test_both_forms_at_once_are_refused(model: Any) -> None:
    directory = edit(model("bf16"), None, lambda tensors: tensors | fused(tensors))
    assert "which of them counts" in refusal(directory, CheckpointError)


def test_powers_of_two_as_scales(model: Any) -> None:
    """E8M0 codes c are 2^(c - 127), 0xFF is NaN."""
    directory, codes = model("fp8"), {}

    def powers(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            if name.endswith("scale_inv"):
                codes[name] = torch.randint(110, 140, tensor.shape, dtype=torch.uint8)
                tensors[name] = codes[name].view(torch.float8_e8m0fnu)
        return tensors

    edit(directory, None, powers)
    check_layer(directory, 1)
    placement = Placement.build(layer_spec(directory, 1), ParallelSpec(tp=2))
    found = load_shard(directory, 1, placement, 1)
    assert found.s13 is not None
    assert found.s13.dtype == torch.float32
    wanted = codes[f"{EXPERTS}.2.up_proj.weight_scale_inv"][1:2].double()
    assert torch.equal(found.s13[2, 1:].double(), 2 ** (wanted - 127))

    def nan(tensors: Tensors) -> Tensors:
        tensors[f"{EXPERTS}.2.up_proj.weight_scale_inv"].view(torch.uint8)[1] = 0xFF
        return tensors

    edit(directory, None, nan)
    with pytest.raises(CheckpointError, match="weight_scale_inv holds NaN"):
        whole(directory)


def test_transformers_5_names_the_number_of_experts_otherwise(model: Any) -> None:
    directory = edit(model("bf16"), {"num_experts": ..., "num_local_experts": 4, "mlp_only_layers": None})
    assert check_layer(directory, 1).spec.num_experts == 4
    edit(directory, {"num_experts": 8})
    assert "key num_experts = 8 contradicts num_local_experts = 4" in refusal(directory)
    assert check_layer(edit(directory, {"num_experts": 4}), 1).spec.num_experts == 4


# Near misses


@pytest.mark.parametrize(
    ("change", "there"),
    [
        (lambda name: f"language_model.{name}", f"language_model.{EXPERTS}.0.gate_proj.weight"),
        (lambda name: name.removeprefix("model."), "layers.1.mlp.experts.0.gate_proj.weight"),
        (lambda name: name.replace("weight_scale_inv", "weight_scale"), f"{EXPERTS}.0.gate_proj.weight_scale"),
        (lambda name: name.replace("_proj.weight_scale_inv", "_proj.scales"), f"{EXPERTS}.0.gate_proj.scales"),
        (lambda name: name.replace("mlp.experts", "block_sparse_moe.experts"), "block_sparse_moe.experts.0.gate_proj"),
        (lambda name: name.replace("gate_proj", "w1"), f"{EXPERTS}.0.w1.weight"),
        (lambda name: name.replace("layers.1", "layers.7"), "model.layers.7.mlp.experts.0.gate_proj.weight"),
        (lambda name: name.replace("1.mlp.experts.0.", "1.mlp.experts.\x1b[31m."), "\\x1b[31m"),
    ],
)
def test_a_near_miss_is_told_what_is_there(model: Any, change: Callable[[str], str], there: str) -> None:
    text = refusal(edit(model("fp8"), None, renamed(change)), CheckpointError)
    assert there in text
    assert " missing: " in text or "nothing here reads" in text


def test_gate_and_up_in_one_tensor_for_each_expert(model: Any) -> None:
    def joined(tensors: Tensors) -> Tensors:
        for expert in range(4):
            parts = [tensors.pop(f"{EXPERTS}.{expert}.{name}_proj.weight") for name in ("gate", "up")]
            tensors[f"{EXPERTS}.{expert}.gate_up_proj.weight"] = torch.cat(parts)
        return tensors

    text = refusal(edit(model("bf16"), None, joined))
    assert f"missing: {EXPERTS}.0.gate_proj.weight; there is" in text
    assert f"{EXPERTS}.0.gate_up_proj.weight" in text


@pytest.mark.parametrize(
    "name",
    [f"{EXPERTS}.0.up_proj.bias", f"{EXPERTS}.4.up_proj.weight", f"{LAYER}.gate.e_score_correction_bias",
     f"{EXPERTS}.03.gate_proj.weight", f"{EXPERTS}.\u0663.up_proj.weight",
     f"{LAYER}.shared_expert.up_proj.weight", f"{EXPERTS}.0.up_proj.input_scale", f"{LAYER}.up_proj.weight"],
)  # fmt: skip
def test_tensors_that_would_be_left_out_are_refused(model: Any, name: str) -> None:
    directory = edit(model("fp8"), None, lambda tensors: tensors | {name: torch.ones(256)})
    assert f"layer 1 has tensors that nothing here reads: {name}" in refusal(directory, CheckpointError)
    check_layer(directory, 0)


def test_scales_beside_weights_that_are_not_quantized_are_refused(model: Any) -> None:
    name = f"{EXPERTS}.0.up_proj.weight_scale_inv"
    directory = edit(model("bf16"), None, lambda tensors: tensors | {name: torch.ones(2, 2)})
    assert f"nothing here reads: {name}" in refusal(directory, CheckpointError)


def test_models_inside_of_others(model: Any) -> None:
    directory = model("fp8")
    inner = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({"model_type": "kimi_vl", "text_config": inner}))
    text = refusal(directory, UnsupportedError)
    assert "model_type 'kimi_vl'" in text
    assert "its text_config is of model_type 'qwen3_moe'" in text


def test_a_stray_file_beside_an_index(model: Any, originals: dict[str, Path]) -> None:
    directory = model("sharded")
    shutil.copy(originals["fp8"] / FILE, directory / FILE)
    text = refusal(directory, CheckpointError)
    assert INDEX in text
    assert f"names other files than {FILE}, which lies beside it" in text
    single = model("fp8")
    names = dict.fromkeys(load_file(single / FILE), FILE)
    (single / INDEX).write_text(json.dumps({"weight_map": names}))
    check_layer(single, 1)


def test_a_tensor_lies_where_it_is_read_from_and_nowhere_else(model: Any) -> None:
    directory = model("sharded")
    index = json.loads((directory / INDEX).read_text())["weight_map"]
    name, other = f"{EXPERTS}.3.up_proj.weight", "model-00001-of-00002.safetensors"
    held = load_file(directory / other)
    assert index[name] != other

    def refused(extra: Tensors, file: str = other) -> str:
        save_file(extra if file != other else held | extra, directory / file)
        text = refusal(directory, CheckpointError)
        with pytest.raises(CheckpointError, match=re.escape(text[-40:])):
            layer_spec(directory, 1)
        check_layer(directory, 0)
        (directory / file).unlink()
        save_file(held, directory / other)
        check_layer(directory, 1)
        return text

    assert f"tensor {name} lies in {other} and is read from {index[name]}" in refused({name: torch.ones(2)})
    bias = f"{EXPERTS}.3.up_proj.bias"
    assert f"tensor {bias} lies in {other} which no index names for it" in refused({bias: torch.ones(2)})
    assert f"tensor {bias} lies in more.safetensors" in refused({bias: torch.ones(2)}, "more.safetensors")
    save_file({"adapter.a": torch.ones(2)}, directory / "adapter.safetensors")
    (directory / "broken.safetensors").write_bytes(b"no safetensors")
    check_layer(directory, 1)


@pytest.mark.parametrize("name", [
    "language_model.model.layers.1.mlp.experts.0.up_proj.weight", "model.layers.1.block_sparse_moe.gate.weight",
    "model.layers.1.shared_mlp.up_proj.weight", "layers.1.mlp.gate.weight", "model.layers.1.feed_forward.router.weight",
])  # fmt: skip
def test_strangers_of_the_layer_under_other_names(model: Any, name: str) -> None:
    """In the file that is read, and in one beside it."""
    directory = edit(model("fp8"), tensors=lambda tensors: tensors | {name: torch.ones(2)})
    assert f"layer 1 has tensors that nothing here reads: {name}" in refusal(directory, CheckpointError)
    check_layer(directory, 0)
    edit(directory, tensors=lambda tensors: {key: value for key, value in tensors.items() if key != name})
    check_layer(directory, 1)
    save_file({name: torch.ones(2)}, directory / "more.safetensors")
    assert f"tensor {name} lies in more.safetensors" in refusal(directory, CheckpointError)


def test_tensors_that_are_not_the_mlps_are_nobodys_business(model: Any) -> None:
    others = ("model.layers.1.self_attn.gate_proj.weight", "model.layers.11.mlp.gate.weight", "model.norm.weight",
              "mtp.layers.1.mlp.gate.weight", "model.layers.1.input_layernorm.weight", "xlayers.1.mlp.weight",
              "visual.blocks.1.mlp.up_proj.weight")  # fmt: skip
    directory = edit(model("fp8"), tensors=lambda tensors: tensors | {name: torch.ones(2) for name in others})
    check_layer(directory, 1)


def test_a_link_to_nothing_says_so(model: Any) -> None:
    directory = model("fp8")
    (directory / FILE).unlink()
    (directory / FILE).symlink_to(directory / "gone")
    assert refusal(directory, CheckpointError).endswith("is a link to a file that isn't there")


def test_weights_in_files_that_are_not_read(model: Any) -> None:
    directory = model("sharded")
    (directory / INDEX).unlink()
    assert f"holds neither {FILE} nor {INDEX}; there is model-00001-of-00002.safetensors" in refusal(directory)
    for path in directory.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    assert "there is model-00001-of-00002.bin" in refusal(directory)
    for path in directory.glob("*.bin"):
        path.unlink()
    assert refusal(directory).endswith(f"holds neither {FILE} nor {INDEX}")
    assert layer_spec(directory, 1).quant_label == "fp8_block"  # enough for a plan


def test_zeros_are_named(model: Any) -> None:
    directory = model("bf16")
    path = directory / FILE
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:header] + bytes(len(content) - header))
    check_layer(directory, 1)
    with pytest.raises(CheckpointError, match=rf"tensor {EXPERTS}\.0\.gate_proj\.weight is all zeros"):
        whole(directory)
    with pytest.raises(CheckpointError, match=rf"tensor {LAYER}\.gate\.weight is all zeros"):
        load_router(directory, 1)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("fp8", "gate_proj.weight_scale_inv", 3e38),
        ("bf16", "up_proj.weight", 3e38),
        ("bf16", "down_proj.weight", -1e20),
    ],
)
def test_weights_whose_results_overflow_are_named(model: Any, kind: str, name: str, value: float) -> None:
    """Infinite on both sides of the check, they would count as other weights than the file's."""
    full = f"{EXPERTS}.3.{name}"

    def huge(tensors: Tensors) -> Tensors:
        return tensors | {full: torch.full_like(tensors[full], value)}

    directory = edit(model(kind), None, huge)
    with pytest.raises(CheckpointError) as caught:
        whole(directory)
    assert f"tensor {full} holds " in str(caught.value)
    assert "results overflow" in str(caught.value)


@pytest.mark.parametrize("kind", ["fp8", "bf16", "fused"])
@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_a_slice_of_zeros_is_fine_where_the_expert_has_others(model: Any, kind: str, projection: str) -> None:
    """A width padded with zeros, as some writers do; an expert of zeros was never written."""

    def zeros(start: int) -> Callable[[Tensors], Tensors]:
        def change(tensors: Tensors) -> Tensors:
            tensor = tensors[f"{EXPERTS}.3.{projection}_proj.weight"]
            (tensor if projection != "down" else tensor.T)[start:] = 0
            return fused(tensors) if kind == "fused" else tensors

        return change

    original = model("bf16" if kind == "fused" else kind)
    directory = edit(Path(shutil.copytree(original, original.parent / "padded")), None, zeros(128))
    placement = Placement.build(layer_spec(directory, 1), ParallelSpec(tp=2))
    held = load_shard(directory, 1, placement, 1)
    assert_equal(held, shard(whole(directory), placement, 1))
    edit(original, None, zeros(0))
    with pytest.raises(CheckpointError, match="expert 3, is all zeros" if kind == "fused" else "is all zeros"):
        load_shard(original, 1, placement, 1)


def test_fused_experts_are_left_out_by_their_own_names(model: Any) -> None:
    directory = model("fp8")
    listed = section(directory, modules_to_not_convert=[f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"])
    edit(directory, listed, lambda tensors: fused(layer_in_bf16(tensors)))
    assert check_layer(directory, 1).spec.quant_label == "bf16"


def test_formats_are_listed_in_words(model: Any) -> None:
    directory = edit(model("bf16"), None, lambda tensors: {name: value.half() for name, value in tensors.items()})
    assert "{" not in refusal(directory, UnsupportedError)


def test_a_plan_looks_at_the_headers_of_router_and_experts(model: Any) -> None:
    for changes in ({"num_experts": 8}, {"num_experts": 3}, {"hidden_size": 128}, {"moe_intermediate_size": 128}):
        directory = edit(model("fp8"), changes)
        with pytest.raises(CheckpointError):
            layer_spec(directory, 1)
        shutil.rmtree(directory)


# Folders that mean harm


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A quarter of a GiB more than now: what would take gigabytes fails instead."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + (1 << 28), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["config.json", INDEX, FILE, "hf_quant_config.json"])
def test_what_is_no_regular_file_is_refused_without_waiting(model: Any, name: str) -> None:
    directory = model("fp8")
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    assert f"{name}: is a FIFO, not a regular file" in refusal(directory, CheckpointError)
    (directory / name).unlink()
    (directory / name).symlink_to("/dev/zero")
    assert f"{name}: is a link out of the folder, to '/dev/zero'" in refusal(directory, CheckpointError)
    (directory / name).unlink()
    (directory / name).mkdir()
    assert f"{name}: is a folder, not a regular file" in refusal(directory, CheckpointError)


@pytest.mark.timeout(30)
@pytest.mark.usefixtures("little_memory")
def test_absurd_files_and_numbers_are_refused_at_once(model: Any) -> None:
    directory = model("fp8")
    config = directory / "config.json"
    text = config.read_text()
    for key in ("num_hidden_layers", "num_experts", "hidden_size", "moe_intermediate_size", "num_experts_per_tok"):
        for value in (10**9, 10**10, 10**400, -1, 0, 1.5, True, "4", [4], float("nan")):
            config.write_text(json.dumps(json.loads(text) | {key: value}))
            assert f"key {key} = " in refusal(directory, CheckpointError)
    config.write_text(json.dumps(json.loads(text) | {"mlp_only_layers": [[1]]}))
    assert "key mlp_only_layers = [[1]] must hold layer numbers" in refusal(directory, CheckpointError)
    for content, said in (
        ("[" * 1_000_000, "nested too deeply"),
        (text.replace(": 2,", f": {'1' * 5000},", 1), "Exceeds the limit"),
        (text.replace("{", '{"hidden_size": 128,', 1), "key 'hidden_size' stands there twice"),
        ("null", "holds a JSON NoneType"),
        ("", "can't be read as JSON"),
    ):
        config.write_text(content)
        assert said in refusal(directory, CheckpointError)
    config.write_bytes(b"\xff\xfe{}")
    assert "is no UTF-8 text" in refusal(directory, CheckpointError)
    with config.open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    assert "is larger than" in refusal(directory, CheckpointError)


@pytest.mark.parametrize(
    "place", ["../x.safetensors", "/tmp/x.safetensors", "a/../../x.safetensors", "", "a\0b", "\ud800"]
)
def test_no_name_of_an_index_leads_out_of_the_folder(model: Any, place: str) -> None:
    directory = model("sharded")
    shutil.copy(next(directory.glob("*.safetensors")), directory.parent / "x.safetensors")
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], place)
    (directory / INDEX).write_text(json.dumps(index))
    assert f"which {INDEX} names, is no file in the folder" in refusal(directory, CheckpointError)


def test_links_of_the_hugging_face_cache_are_followed_and_others_are_not(model: Any, tmp_path: Path) -> None:
    plain = model("sharded")
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123456789"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        shutil.copy(path, cache / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    assert check_layer(snapshot, 1).spec.name == "org/name@01234567"
    assert_equal(whole(snapshot), whole(plain))
    (tmp_path / "shortcut").symlink_to(snapshot)
    check_layer(tmp_path / "shortcut", 1)
    shard_name = "model-00002-of-00002.safetensors"
    (snapshot / shard_name).unlink()
    (snapshot / shard_name).symlink_to(plain / shard_name)
    assert f"{shard_name}: is a link out of the folder" in refusal(snapshot, CheckpointError)
    (snapshot / shard_name).unlink()
    (snapshot / shard_name).symlink_to(snapshot / shard_name)
    assert "can't be read: Too many levels of symbolic links" in refusal(snapshot, CheckpointError)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_no_folder(name: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model("fp8"))
    for call in (read_config, Checkpoint, lambda given: layer_spec(given, 1)):
        with pytest.raises(ConfigError, match=r"^checkpoint = ' ?': is empty"):
            call(name)


# Torch's defaults


def everything(directory: Path) -> list[torch.Tensor]:
    spec = layer_spec(directory, 1)
    placement = Placement.build(spec, ParallelSpec(tp=2))
    router = load_router(directory, 1)
    found = [router.gate_EH, *([] if router.bias_E is None else [router.bias_E])]
    for rank in range(2):
        found += load_shard(directory, 1, placement, rank).tensors().values()
    if spec.shared_intermediate:
        found += load_shared_shard(directory, 1, 0, 128).tensors().values()
    return found


@pytest.mark.parametrize("kind", ["fp8", "bf16", "deepseek", "fused"])
@pytest.mark.parametrize("world", ["bfloat16", "float64", "meta", "inference"])
def test_torchs_defaults_change_nothing(model: Any, kind: str, world: str) -> None:
    directory = edit(model("fp8"), None, fused) if kind == "fused" else model(kind)
    plain = everything(directory)
    before = torch.get_default_dtype()
    try:
        if world == "meta":
            with torch.device("meta"):
                inside = everything(directory)
        elif world == "inference":
            with torch.inference_mode():
                inside = everything(directory)
        else:
            torch.set_default_dtype(getattr(torch, world))
            inside = everything(directory)
    finally:
        torch.set_default_dtype(before)
    for found, wanted in zip(inside, plain, strict=True):
        assert (found.dtype, found.device) == (wanted.dtype, wanted.device)
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("world", ["bfloat16", "meta"])
def test_a_made_checkpoint_does_not_depend_on_torchs_defaults(originals: Any, tmp_path: Path, world: str) -> None:
    before = torch.get_default_dtype()
    try:
        if world == "meta":
            with torch.device("meta"):
                made = make_checkpoint(tmp_path / "made", **SIZES)
        else:
            torch.set_default_dtype(torch.bfloat16)
            made = make_checkpoint(tmp_path / "made", **SIZES)
    finally:
        torch.set_default_dtype(before)
    for name, wanted in load_file(originals["fp8"] / FILE).items():
        found = load_file(made / FILE)[name]
        assert found.dtype == wanted.dtype
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)), name


def test_save_and_read_again(model: Any) -> None:
    """The changes that these tests make are the only ones: a checkpoint rewritten as it is stays equal."""
    directory = model("fp8")
    plain = whole(directory)
    save_file(load_file(directory / FILE), directory / FILE)
    assert_equal(whole(directory), plain)
