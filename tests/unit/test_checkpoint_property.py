"""Any change of a small checkpoint is refused with a MoeDistError or read as a plain reading of the files says.

The plain reading shares no code with the package: JSON, whole files, one multiplication. It also says what may not be
read at all, such as a quantization of another name.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from checkpoints import FILE, INDEX, edit, fused
from hypothesis import event, given
from hypothesis import strategies as st
from profiles import examples
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moe_dist.checkpoint import check_layer, layer_spec, load_router, load_shard, load_shared_shard, make_checkpoint
from moe_dist.errors import MoeDistError
from moe_dist.model.placement import Placement
from moe_dist.model.spec import MoESpec, ParallelSpec

SIZES: dict[str, Any] = {"hidden": 128, "intermediate": 256, "num_experts": 4, "top_k": 2}
MLP = "model.layers.1.mlp"
KINDS: dict[str, dict[str, Any]] = {
    "fp8": {"shards": 1},
    "bf16": {"shards": 1, "quant": "none"},
    "sharded": {"shards": 2},
    "deepseek": {"shards": 2, "model_type": "deepseek_v3", "num_experts": 8},
    "fused": {"shards": 1},
    "fused_bf16": {"shards": 1, "quant": "none"},
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.float8_e8m0fnu, torch.uint8, torch.int32]  # fmt: skip

NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 8, 64, 100, 128, 256, 512, -1, 10**9, 10**10, 10**400, 0.5, 2.5, 1e308])
WORDS = st.sampled_from([
    "fp8", "e4m3", "e5m2", "float8_e4m3fn", "dynamic", "static", "ue8m0", "modelopt", "NVFP4", "FP8", "bfloat16",
    "float16", "float32", "silu", "gelu", "sigmoid", "softmax", "qwen3_moe", "deepseek_v3", "kimi_k2", "mixtral", "",
    "\x1b[31m", "\ud800", "compressed-tensors",
])  # fmt: skip
SPECIAL = st.sampled_from(
    [None, True, False, float("nan"), float("inf"), [], {}, [128, 128], [128, 64], [[[[1]]]], [0]]
)
MODULES = st.sampled_from([
    "lm_head", "model.layers.1", "model.layers.1.mlp", f"{MLP}.experts", f"{MLP}.experts.0", f"{MLP}.gate", "experts",
    "down_proj", "model.layers.0.mlp.experts", "re:.*experts.*", "re:model", "re:(", "*", "model.layers.1*", "", ".",
    "re:", f"{MLP}.shared_experts",
])  # fmt: skip
JUNK = NUMBERS | WORDS | SPECIAL | st.lists(MODULES, max_size=3)
CONFIG_KEYS = st.sampled_from([
    "model_type", "hidden_act", "hidden_size", "moe_intermediate_size", "norm_topk_prob", "num_experts_per_tok",
    "num_hidden_layers", "torch_dtype", "dtype", "quantization_config", "num_experts", "num_local_experts",
    "n_routed_experts", "decoder_sparse_step", "mlp_only_layers", "first_k_dense_replace", "moe_layer_freq", "n_group",
    "topk_group", "n_shared_experts", "routed_scaling_factor", "scoring_func", "topk_method", "text_config",
    "compression_config", "vocab_size", "quantization",
])  # fmt: skip
SECTION_KEYS = st.sampled_from([
    "quant_method", "weight_block_size", "fmt", "activation_scheme", "scale_fmt", "modules_to_not_convert", "ignore",
    "ignored_layers", "quant_algo", "dequantize", "rotation", "kv_cache_scheme", "config_groups", "quantization",
])  # fmt: skip
PLACES = st.floats(0, 1, exclude_max=True)


CHANGES = st.one_of(
    st.tuples(st.just("config"), CONFIG_KEYS, JUNK | st.just(...)),
    st.tuples(st.just("section"), SECTION_KEYS, JUNK | st.just(...)),
    st.tuples(st.just("exceptions"), st.sampled_from(["ignore", "ignored_layers"]), st.lists(MODULES, max_size=3)),
    st.tuples(st.just("bf16 layer"), st.lists(MODULES, max_size=3)),
    st.tuples(st.just("modelopt"), st.dictionaries(st.sampled_from(["quant_algo", "exclude_modules", "x"]), JUNK)),
    st.tuples(st.just("index"), PLACES, st.sampled_from(["../x", "/etc/passwd", "no.safetensors", FILE, 5, "", ...])),
    st.tuples(st.just("rename"), PLACES, st.sampled_from(["prefix", "no prefix", "suffix", "other", "swap"])),
    st.tuples(st.just("drop"), PLACES),
    st.tuples(st.just("extra"), st.sampled_from([f"{MLP}.experts.0.up_proj.bias", f"{MLP}.experts.9.up_proj.weight",
                                                 "model.layers.1.mlp.shared_experts.up_proj.weight", "model.x"])),
    st.tuples(st.just("cast"), PLACES, st.sampled_from(DTYPES)),
    st.tuples(st.just("shape"), PLACES, st.sampled_from(["turn", "cut", "flat", "empty", "more"])),
    st.tuples(st.just("values"), PLACES, st.sampled_from(["zero", "nan", "bytes", "negative", "row"])),
    st.tuples(st.just("cut"), PLACES),
    st.tuples(st.just("bytes"), st.lists(st.tuples(PLACES, st.integers(0, 255)), min_size=1, max_size=4)),
    st.tuples(st.just("text"), st.sampled_from(["", "{", "[]", "[" * 3000, '{"a": 1, "a": 2}', "\0", '{"a": 1e999}'])),
    st.tuples(st.just("place"), st.sampled_from(["config.json", FILE, INDEX]),
              st.sampled_from(["fifo", "folder", "zero", "gone", "copy"])),
)  # fmt: skip


@cache
def original(kind: str) -> Path:
    """One folder for each kind and process, removed when it ends."""
    folder = _FOLDERS.setdefault(kind, tempfile.TemporaryDirectory(prefix="moe-dist-"))
    made = make_checkpoint(Path(folder.name) / "model", **(SIZES | KINDS[kind]))
    return edit(made, None, fused) if kind.startswith("fused") else made


_FOLDERS: dict[str, tempfile.TemporaryDirectory[str]] = {}


# Making changes


def weight_file(directory: Path) -> Path:
    return max(directory.glob("*.safetensors"))  # the last one has layer 1


def pick(items: list[str], place: float) -> str:
    return items[int(place * len(items))]


def apply(directory: Path, change: tuple[Any, ...]) -> None:
    what, *arguments = change
    if not all(path.is_file() for path in directory.iterdir()):
        return  # a FIFO of an earlier change would block
    try:
        if what in ("rename", "drop", "extra", "cast", "shape", "values", "bf16 layer"):
            change_tensors(directory, what, arguments)
        else:
            FILES[what](directory, *arguments)
    except (OSError, ValueError, KeyError, IndexError, AttributeError, TypeError, RecursionError, SafetensorError):
        pass  # an earlier change left nothing that this one could change


def change_config(directory: Path, key: str, value: Any) -> None:
    edit(directory, {key: value})


def change_section(directory: Path, key: str, value: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    found = {**config.get("quantization_config", {}), key: value}
    edit(directory, {"quantization_config": {name: item for name, item in found.items() if item is not ...}})


def write_modelopt(directory: Path, content: dict[str, Any]) -> None:
    (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": content}))


def change_index(directory: Path, place: float, value: Any) -> None:
    path = directory / INDEX
    index = json.loads(path.read_text())
    name = pick([name for name in index["weight_map"] if MLP in name], place)
    index["weight_map"][name] = value
    index["weight_map"] = {key: item for key, item in index["weight_map"].items() if item is not ...}
    path.write_text(json.dumps(index))


def cut(directory: Path, place: float) -> None:
    path = weight_file(directory)
    os.truncate(path, int(place * path.stat().st_size))


def change_bytes(directory: Path, changes: list[tuple[float, int]]) -> None:
    path = weight_file(directory)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for place, value in changes:
        content[int(place * min(len(content), 2 * header))] = value
    path.write_bytes(content)


def change_text(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)


def change_place(directory: Path, name: str, what: str) -> None:
    path = directory / name
    if what == "copy":
        shutil.copy(weight_file(directory), path)
        return
    path.unlink(missing_ok=True)
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "zero":
        path.symlink_to("/dev/zero")


FILES: dict[str, Callable[..., None]] = {
    "config": change_config, "section": change_section, "exceptions": change_section, "modelopt": write_modelopt,
    "index": change_index, "cut": cut, "bytes": change_bytes, "text": change_text, "place": change_place,
}  # fmt: skip


def change_tensors(directory: Path, what: str, arguments: list[Any]) -> None:
    path = weight_file(directory)
    tensors = load_file(path)
    if what == "bf16 layer":
        change_section(directory, "ignore", arguments[0])
        prefix = f"{MLP}.experts"
        tensors = {name: t for name, t in tensors.items() if not (prefix in name and "scale" in name)}
        tensors = {name: t.float().bfloat16() if prefix in name else t for name, t in tensors.items()}
    elif what == "extra":
        tensors[arguments[0]] = torch.ones(256, 128, dtype=torch.bfloat16)
    else:
        name = pick(sorted(name for name in tensors if MLP in name), arguments[0])
        tensor = tensors.pop(name)
        for changed, value in changed_tensor(tensors, name, tensor, what, *arguments[1:]).items():
            tensors[changed] = value
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    if (directory / INDEX).is_file():
        index = json.loads((directory / INDEX).read_text())
        kept = {name: file for name, file in index["weight_map"].items() if file != path.name}
        index["weight_map"] = kept | dict.fromkeys(tensors, path.name)
        (directory / INDEX).write_text(json.dumps(index))


def changed_tensor(
    tensors: dict[str, torch.Tensor], name: str, tensor: torch.Tensor, what: str, how: Any = None
) -> dict[str, torch.Tensor]:
    if what == "drop":
        return {}
    if what == "rename":
        other = pick(sorted(tensors), 0.6)
        if how == "swap":
            return {name: tensors[other], other: tensor}
        names = {"prefix": f"language_model.{name}", "no prefix": name.removeprefix("model."),
                 "suffix": f"{name}_2", "other": other}  # fmt: skip
        return {names[how]: tensor}
    if what == "cast":
        return {name: tensor.float().to(how)}
    raw = tensor.contiguous().clone().view(torch.uint8)
    if what == "shape":
        shaped = {"turn": tensor.mT if tensor.ndim > 1 else tensor, "cut": tensor[:-1], "flat": tensor.flatten(),
                  "empty": tensor[:0], "more": tensor[None]}  # fmt: skip
        return {name: shaped[how]}
    if how == "zero":
        raw.zero_()
    elif how == "nan":
        raw[0] = 0xFF
    elif how == "bytes":
        raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)))
    elif how == "negative":
        raw[..., -1] ^= 0x80
    else:
        raw[0] = raw[-1].clone()
    return {name: raw.view(tensor.dtype)}


# The plain reading


class Plain:
    """What stands in the files, for a layer that was accepted."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = json.loads((directory / "config.json").read_text())
        index = directory / INDEX
        if index.is_file():
            files = json.loads(index.read_text())["weight_map"]
            content = {
                file: load_file(directory / file) for file in set(files.values()) if (directory / file).is_file()
            }
            self.tensors = {name: content[file][name] for name, file in files.items() if name in content.get(file, {})}
        else:
            self.tensors = load_file(directory / FILE)

    def experts(self) -> int:
        keys = ("num_experts", "num_local_experts", "n_routed_experts")
        if self.config["model_type"] != "qwen3_moe":
            keys = keys[::-1]
        return next(self.config[key] for key in keys if self.config.get(key) is not None)

    def dense(self, name: str, number: int | None = None) -> torch.Tensor:
        values = self.tensors[name].double() if number is None else self.tensors[name][number].double()
        assert bool(values.isfinite().all())
        assert bool(values.any())
        scales = self.tensors.get(f"{name}_scale_inv")
        if self.tensors[name].dtype != torch.float8_e4m3fn:
            assert scales is None
            return values
        assert scales is not None
        scales = scales.double() if number is None else scales[number].double()
        assert bool((scales.isfinite() & (scales > 0)).all())
        return values * torch.kron(scales, torch.ones(128, 128, dtype=torch.float64))

    def expert(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        prefix = f"{MLP}.experts"
        if f"{prefix}.gate_up_proj" in self.tensors:
            return self.dense(f"{prefix}.gate_up_proj", number), self.dense(f"{prefix}.down_proj", number)
        return self.named(f"{prefix}.{number}")

    def named(self, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up, down = (self.dense(f"{prefix}.{name}_proj.weight") for name in ("gate", "up", "down"))
        return torch.cat([gate, up]), down

    def may_be_read(self, spec: MoESpec) -> None:
        """The files say that this is the layer's format."""
        found = [name for name in self.tensors if name.startswith(f"{MLP}.experts.") and "scale" not in name]
        dtypes = {self.tensors[name].dtype for name in found}
        wanted = {"fp8_block": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp32": torch.float32}
        assert dtypes == {wanted[spec.quant_label]}
        assert len(found) in (2, 3 * self.experts())
        section = self.config.get("quantization_config")
        if spec.quantized:
            assert section["quant_method"] == "fp8"
            assert section["weight_block_size"] == [128, 128]
            assert section.get("fmt") in (None, "e4m3", "float8_e4m3fn")
            assert section.get("activation_scheme") in (None, "dynamic")
            assert section.get("dequantize") in (None, False)
            assert not {key for key, value in section.items() if value is not None} & {"rotation", "config_groups"}
        elif section is not None:
            lists = [section.get(key) or [] for key in ("ignore", "ignored_layers", "modules_to_not_convert")]
            nothing = section.get("quant_algo", ...) is None or section.get("quantization") == {"quant_algo": None}
            assert nothing or any(entry not in ("lm_head", f"{MLP}.gate", "") for entries in lists for entry in entries)
        modelopt = self.directory / "hf_quant_config.json"
        if modelopt.is_file():
            content = json.loads(modelopt.read_text())["quantization"]
            assert content["quant_algo"] is None or (content.get("exclude_modules") and not spec.quantized)
        assert "compression_config" not in self.config or self.config["compression_config"] is None


def compare(directory: Path) -> str:
    """Load the layer in every way and hold it against the plain reading; what became of it."""
    try:
        config = check_layer(directory, 1)
        spec = config.spec
        assert layer_spec(directory, 1) == spec
        whole = load_shard(directory, 1, Placement.build(spec, ParallelSpec()), 0)
        narrow = spec.intermediate <= 128
        placement = Placement.build(spec, ParallelSpec(tp=1 if narrow else 2))
        shards = [load_shard(directory, 1, placement, rank) for rank in range(placement.world)]
        router = load_router(directory, 1)
    except MoeDistError as error:
        text = str(error)
        assert len(text.splitlines()) == 1, text
        assert text.isprintable(), text
        assert len(text) < 3000, text
        return type(error).__name__
    plain = Plain(directory)
    plain.may_be_read(spec)
    keys = plain.config
    assert (spec.hidden, spec.intermediate) == (keys["hidden_size"], keys["moe_intermediate_size"])
    assert (spec.num_experts, spec.top_k) == (plain.experts(), keys["num_experts_per_tok"])
    assert spec.renormalize is keys["norm_topk_prob"]
    for number in range(spec.num_experts):
        w13, w2 = plain.expert(number)
        for found, wanted in zip(whole.dequantized(number), (w13, w2), strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=2e-45)  # the least float32
        parts = [part.dequantized(number) for part in shards]
        halves = [torch.cat([part[0].chunk(2)[half] for part in parts]) for half in (0, 1)]
        torch.testing.assert_close(torch.cat(halves).double(), w13, rtol=1e-6, atol=2e-45)
        torch.testing.assert_close(torch.cat([part[1] for part in parts], 1).double(), w2, rtol=1e-6, atol=2e-45)
    assert torch.equal(router.gate_EH, plain.tensors[f"{MLP}.gate.weight"])
    if spec.correction_bias:
        assert router.bias_E is not None
        assert torch.equal(router.bias_E, plain.tensors[f"{MLP}.gate.e_score_correction_bias"].float())
    compare_shared(directory, spec, plain)
    return "read"


def compare_shared(directory: Path, spec: MoESpec, plain: Plain) -> None:
    if not spec.shared_intermediate:
        return
    try:
        found = load_shared_shard(directory, 1, 0, spec.shared_intermediate)
    except MoeDistError:
        return
    for one, wanted in zip(found.dequantized(0), plain.named(f"{MLP}.shared_experts"), strict=True):
        torch.testing.assert_close(one.double(), wanted, rtol=1e-6, atol=2e-45)


def test_the_originals_are_read() -> None:
    for kind in KINDS:
        assert compare(original(kind)) == "read"


@examples(60)
@given(kind=st.sampled_from(sorted(KINDS)), changes=st.lists(CHANGES, min_size=1, max_size=3))
def test_a_changed_checkpoint_is_refused_or_read_as_it_is(kind: str, changes: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory(prefix="moe-dist-") as folder:
        directory = Path(folder) / "model"
        shutil.copytree(original(kind), directory)
        for change in changes:
            apply(directory, change)
        event(compare(directory))
