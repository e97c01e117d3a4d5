"""Checkpoints: partial reads against a plain read of everything, configs of real models, and every way to be broken."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_dist.checkpoint import (
    Checkpoint,
    check_layer,
    load_router,
    load_shard,
    load_shared_shard,
    make_checkpoint,
    read_config,
    spec_from_config,
)
from moe_dist.checkpoint import synthetic as synthetic_module
from moe_dist.errors import CheckpointError, ConfigError, UnsupportedError
from moe_dist.model.placement import Placement
from moe_dist.model.routing import route
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import ExpertWeights, shard

SEED = secrets.randbelow(10**6)
LAYER = 1
EXPERT = f"model.layers.{LAYER}.mlp.experts.2"
Change = Callable[[dict[str, torch.Tensor]], Any]


@pytest.fixture(autouse=True)
def _print_seed() -> None:
    print(f"seed {SEED}")  # pytest shows it when a test fails


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and on a busy machine waiting for them costs ten times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_checkpoint with sizes of a test, each distinct checkpoint once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(**options: Any) -> Path:
        options = {"hidden": 256, "intermediate": 384, "num_experts": 8, "top_k": 2, "seed": SEED} | options
        return make_checkpoint(root / "-".join(map(str, options.values())), **options)

    return make


@pytest.fixture
def broken(made: Callable[..., Path], tmp_path: Path) -> Path:
    """A DeepSeek-like checkpoint that a test may damage."""
    return Path(shutil.copytree(made(model_type="deepseek_v3"), tmp_path / "broken"))


def everything(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


def whole_layer(directory: Path, prefixes: list[str]) -> ExpertWeights:
    """The named experts, stacked from a plain read of all files: shares no code with load.py."""
    tensors, spec = everything(directory), read_config(directory).spec

    def gather(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        def each(projection: str) -> list[torch.Tensor]:
            return [tensors[f"{prefix}.{projection}.{kind}"] for prefix in prefixes]

        pairs = zip(each("gate_proj"), each("up_proj"), strict=True)
        return torch.stack([torch.cat(pair) for pair in pairs]), torch.stack(each("down_proj"))

    scales = gather("weight_scale_inv") if spec.quantized else ()
    return ExpertWeights(spec.quant, spec.gated, *gather("weight"), *scales)


def experts_of_layer(directory: Path, layer: int = LAYER) -> ExpertWeights:
    experts = range(read_config(directory).spec.num_experts)
    return whole_layer(directory, [f"model.layers.{layer}.mlp.experts.{expert}" for expert in experts])


def assert_same(found: ExpertWeights, wanted: ExpertWeights) -> None:
    assert (found.kind, found.gated) == (wanted.kind, wanted.gated)
    assert found.tensors().keys() == wanted.tensors().keys()
    for name, tensor in wanted.tensors().items():
        other = found.tensors()[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(other.view(torch.uint8), tensor.view(torch.uint8)), name
        assert other.is_contiguous(), name


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    merged = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not ...}))


def file_of(directory: Path, name: str) -> Path:
    return directory / json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][name]


def edit_tensor(directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Path:
    """Replace one tensor in its file; None takes it out (the index still lists it)."""
    path = file_of(directory, name)
    tensors = load_file(path)
    changed = change(tensors.pop(name))
    save_file(tensors | ({} if changed is None else {name: changed.contiguous()}), path)
    return path


# Partial reads


@pytest.mark.parametrize(
    ("parallel", "widths"),
    [
        ({"tp": 3}, [128] * 3),
        ({"tp": 2}, [256, 128]),
        ({"ep": 4}, [384] * 4),
        ({"ep": 3}, [384] * 3),
        ({"tp": 2, "ep": 2}, [256, 128, 256, 128]),
        ({"tp": 2, "ep": 3, "replicas": {0: [2, 1], 7: [0]}}, [256, 128] * 3),
        ({"tp": 4, "ep": 9, "allow_empty_shards": True}, [128, 128, 128, 0] * 9),
    ],
)
@pytest.mark.parametrize("quant", ["fp8_block", "none"])
def test_shards_equal_the_sharded_layer(
    made: Callable[..., Path], parallel: dict[str, Any], widths: list[int], quant: str
) -> None:
    directory = made(quant=quant)
    spec = read_config(directory).spec
    # A placement for FP8 blocks is legal for bf16 too, which has the finer granularity.
    placement = Placement.build(spec.with_changes(quant="fp8_block"), ParallelSpec(**parallel))
    layer = experts_of_layer(directory)
    for rank in range(placement.world):
        found = load_shard(directory, LAYER, placement, rank)
        assert found.width == widths[rank]
        assert_same(found, shard(layer, placement, rank))


@pytest.mark.parametrize(("quant", "widths"), [("fp8_block", [128, 128, 64]), ("none", [112, 112, 96])])
def test_last_block_or_slice_may_be_partial(made: Callable[..., Path], quant: str, widths: list[int]) -> None:
    directory = made(quant=quant, intermediate=320)
    placement = Placement.build(read_config(directory).spec, ParallelSpec(tp=3))
    layer = experts_of_layer(directory)
    for rank, width in enumerate(widths):
        found = load_shard(directory, LAYER, placement, rank)
        assert found.width == width
        assert_same(found, shard(layer, placement, rank))


def test_layers_and_files_are_told_apart(made: Callable[..., Path]) -> None:
    single, sharded = (made(hidden=128, intermediate=128, shards=shards) for shards in (1, 5))
    assert [path.name for path in single.glob("*.safetensors*")] == ["model.safetensors"]
    assert len(list(sharded.glob("*.safetensors"))) == 5
    placement = Placement.build(read_config(single).spec, ParallelSpec())
    first, second = (load_shard(single, layer, placement, 0) for layer in (0, 1))
    assert_same(first, experts_of_layer(single, 0))
    assert_same(load_shard(sharded, 1, placement, 0), second)
    assert not torch.equal(first.w2_eHi.view(torch.uint8), second.w2_eHi.view(torch.uint8))


def test_gate_comes_before_up_and_scales_fit(made: Callable[..., Path]) -> None:
    """The generator makes up a quarter of gate's size: a swap or a wrong scale would show in the dequantized sizes."""
    directory = made()
    weights = load_shard(directory, LAYER, Placement.build(read_config(directory).spec, ParallelSpec()), 0)
    for slot in range(weights.num_experts):
        w13, w2 = weights.dequantized(slot)
        gate, up = w13.chunk(2)
        assert gate.std().item() == pytest.approx(256**-0.5, rel=0.05)
        assert up.std().item() == pytest.approx(256**-0.5 / 4, rel=0.05)
        assert w2.std().item() == pytest.approx(384**-0.5, rel=0.05)


@pytest.mark.parametrize("parallel", [{"tp": 3}, {"tp": 2}, {"ep": 3}, {"tp": 2, "ep": 2}])
def test_a_rank_reads_only_what_it_holds(made: Callable[..., Path], parallel: dict[str, Any]) -> None:
    directory = made()
    placement = Placement.build(read_config(directory).spec, ParallelSpec(**parallel))
    whole = experts_of_layer(directory).nbytes()
    read = []
    for rank in range(placement.world):
        checkpoint = Checkpoint(directory)
        weights = load_shard(checkpoint, LAYER, placement, rank)
        assert checkpoint.bytes_read == weights.nbytes()
        read.append(checkpoint.bytes_read)
    assert sum(read) == whole
    assert max(read) < whole


def test_checks_and_empty_shards_read_no_data(made: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(made())
    placement = Placement.build(checkpoint.config.spec, ParallelSpec(ep=9, allow_empty_shards=True))
    assert check_layer(checkpoint, LAYER).spec == checkpoint.config.spec
    assert load_shard(checkpoint, LAYER, placement, 8).num_experts == 0
    assert checkpoint.bytes_read == 0


def test_progress_is_told_of_every_expert(made: Callable[..., Path]) -> None:
    directory, calls = made(), []
    placement = Placement.build(read_config(directory).spec, ParallelSpec(ep=2))
    load_shard(directory, LAYER, placement, 1, progress=lambda: calls.append(1))
    assert len(calls) == 4


def test_bf16_scales_become_float32(broken: Path) -> None:
    edit_tensor(broken, f"{EXPERT}.up_proj.weight_scale_inv", lambda scales: scales.bfloat16())
    placement = Placement.build(read_config(broken).spec, ParallelSpec())
    weights = load_shard(broken, LAYER, placement, 0)
    assert weights.s13 is not None
    assert weights.s13.dtype == torch.float32
    stored = everything(broken)[f"{EXPERT}.up_proj.weight_scale_inv"]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(weights.s13[2, 3:], stored.float())


def test_fp32_checkpoints_stay_fp32(made: Callable[..., Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(made(quant="none", shards=1), tmp_path / "fp32"))
    save_file({k: v.float() for k, v in everything(directory).items()}, directory / "model.safetensors")
    edit_config(directory, torch_dtype="float32")
    placement = Placement.build(read_config(directory).spec, ParallelSpec(tp=2))
    assert_same(load_shard(directory, LAYER, placement, 1), shard(experts_of_layer(directory), placement, 1))


def test_shared_expert_in_slices(made: Callable[..., Path]) -> None:
    directory = made(model_type="deepseek_v3")
    spec = read_config(directory).spec
    assert (spec.shared_experts, spec.shared_intermediate) == ("none", 384)
    whole = whole_layer(directory, [f"model.layers.{LAYER}.mlp.shared_experts"])
    placement = Placement.build(spec.shared_spec(), ParallelSpec(tp=2))
    for rank in range(2):
        found = load_shared_shard(directory, LAYER, *placement.slice_of(rank))
        assert_same(found, shard(whole, placement, rank))
    with pytest.raises(ConfigError, match="multiples of 128"):
        load_shared_shard(directory, LAYER, 64, 384)
    with pytest.raises(ConfigError, match="0 to 384"):
        load_shared_shard(directory, LAYER, 128, 512)
    with pytest.raises(ConfigError, match="no shared expert"):
        load_shared_shard(made(), LAYER, 0, 384)


def test_router_and_bias(made: Callable[..., Path]) -> None:
    name = f"model.layers.{LAYER}.mlp.gate"
    deepseek, qwen = made(model_type="deepseek_v3"), made()
    router, tensors = load_router(deepseek, LAYER), everything(deepseek)
    assert router.gate_EH.dtype == torch.bfloat16
    assert torch.equal(router.gate_EH, tensors[f"{name}.weight"])
    assert router.bias_E is not None
    assert router.bias_E.dtype == torch.float32
    assert torch.equal(router.bias_E, tensors[f"{name}.e_score_correction_bias"])
    assert load_router(qwen, LAYER).bias_E is None
    assert torch.equal(load_router(qwen, LAYER).gate_EH, everything(qwen)[f"{name}.weight"])


# Configs of real models, the keys that concern the experts as published

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
    "hidden_size": 7168, "intermediate_size": 18432, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "quantization_config": FP8,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "vocab_size": 129280,
}  # fmt: skip
KIMI_K2 = DEEPSEEK_V3 | {
    "first_k_dense_replace": 1, "model_type": "kimi_k2", "n_group": 1, "n_routed_experts": 384,
    "num_nextn_predict_layers": 0, "routed_scaling_factor": 2.827, "topk_group": 1, "vocab_size": 163840,
}  # fmt: skip
QWEN3_235B = {
    "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 12288, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 1536,
    "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 94,
    "quantization_config": FP8 | {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]},
    "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_30B = {key: value for key, value in QWEN3_235B.items() if key not in ("quantization_config", "torch_dtype")} | {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
    "dtype": "bfloat16",
}  # fmt: skip

SIGMOID = {"scoring": "sigmoid", "correction_bias": True, "hidden": 7168, "intermediate": 2048, "top_k": 8}
SOFTMAX = {"scoring": "softmax", "num_experts": 128, "top_k": 8}
REAL = [
    (
        DEEPSEEK_V3,
        MoESpec(**SIGMOID, num_experts=256, num_groups=8, top_groups=4, routed_scaling=2.5, shared_intermediate=2048),
        range(3, 61),
    ),
    (KIMI_K2, MoESpec(**SIGMOID, num_experts=384, routed_scaling=2.827, shared_intermediate=2048), range(1, 61)),
    (QWEN3_235B, MoESpec(**SOFTMAX, hidden=4096, intermediate=1536, quant="fp8_block"), range(94)),
    (QWEN3_30B, MoESpec(**SOFTMAX, hidden=2048, intermediate=768, quant="none"), range(48)),
]


def write_config(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(("config", "spec", "layers"), REAL, ids=["deepseek-v3", "kimi-k2", "qwen3-235b", "qwen3-30b"])
def test_configs_of_real_models(config: dict[str, Any], spec: MoESpec, layers: range, tmp_path: Path) -> None:
    found = read_config(write_config(tmp_path / "model", config))
    assert found.spec == spec.with_changes(name="model")
    assert found.spec.model_dump() == spec.with_changes(name="model").model_dump()
    assert found.moe_layers == tuple(layers)
    assert found.model_type == config["model_type"]
    assert spec_from_config(config) == spec


def test_dense_layers(tmp_path: Path) -> None:
    sparse = QWEN3_30B | {"num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert read_config(write_config(tmp_path, sparse)).moe_layers == (1, 5, 7)
    every_third = DEEPSEEK_V3 | {"num_hidden_layers": 10, "moe_layer_freq": 3}
    assert read_config(write_config(tmp_path, every_third)).moe_layers == (3, 6, 9)
    no_defaults = {k: v for k, v in DEEPSEEK_V3.items() if k not in ("topk_method", "scoring_func", "n_shared_experts")}
    assert spec_from_config(no_defaults).shared_intermediate == 0
    wide = DEEPSEEK_V3 | {"n_shared_experts": 2, "norm_topk_prob": False, "routed_scaling_factor": 1}
    spec = spec_from_config(wide)
    assert (spec.shared_intermediate, spec.renormalize, spec.routed_scaling) == (4096, False, 1.0)


def test_asking_for_a_layer_that_is_not_moe(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, DEEPSEEK_V3))
    config.require_moe_layer(3)
    with pytest.raises(ConfigError, match=r"checkpoint\.layer = 2: this layer is dense.*legal: 3 to 60"):
        config.require_moe_layer(2)
    for layer in (61, -1):
        with pytest.raises(ConfigError, match=rf"checkpoint\.layer = {layer}: the model has 61 layers.*3 to 60"):
            config.require_moe_layer(layer)
    sparse = QWEN3_30B | {"num_hidden_layers": 8, "mlp_only_layers": [1, 5]}
    with pytest.raises(ConfigError, match="legal: 0, 2 to 4, 6 to 7"):
        check_layer(write_config(tmp_path, sparse), 5)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"model_type": "jamba"}, "model_type 'jamba'.*not known.*deepseek_v2, deepseek_v3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'.*supported: silu"),
        ({"topk_method": "group_limited_greedy"}, "topk_method 'group_limited_greedy'.*supported: noaux_tc"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax'.*supported: sigmoid"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quant_method is 'gptq'.*supported: quant_metho",
        ),
        ({"quantization_config": FP8 | {"weight_block_size": [64, 64]}}, r"weight_block_size is \[64, 64\]"),
        ({"quantization_config": FP8 | {"activation_scheme": "static"}}, "activation_scheme is 'static'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size is None"),
        ({"quantization_config": None, "torch_dtype": "float16"}, "torch_dtype 'float16'.*supported: bfloat16"),
    ],
)
def test_unsupported_configs(changes: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=pattern):
        read_config(write_config(tmp_path, DEEPSEEK_V3 | changes))


@pytest.mark.parametrize(
    "key",
    [
        "model_type", "hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_group",
        "topk_group", "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace", "num_hidden_layers",
        "hidden_act",
    ],
)  # fmt: skip
def test_missing_and_mistyped_keys(key: str, tmp_path: Path) -> None:
    for config in ({k: v for k, v in DEEPSEEK_V3.items() if k != key}, DEEPSEEK_V3 | {key: None}):
        with pytest.raises(CheckpointError, match=rf"config\.json: key {key} is missing"):
            read_config(write_config(tmp_path, config))
    with pytest.raises(CheckpointError, match=rf"config\.json: key {key} = \[1\] is no"):
        read_config(write_config(tmp_path, DEEPSEEK_V3 | {key: [1]}))


@pytest.mark.parametrize("factor", [0, -1.0, 1e-320, 1e-7, 1e7, float("inf"), float("nan")])
def test_a_scaling_that_loses_the_output(factor: float) -> None:
    with pytest.raises(CheckpointError, match=r"routed_scaling_factor = .* must be from 1e-06 to 1e\+06"):
        spec_from_config(DEEPSEEK_V3 | {"routed_scaling_factor": factor})


def test_contradictory_configs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json.*model\.top_k = 300: must not exceed"):
        read_config(write_config(tmp_path, DEEPSEEK_V3 | {"num_experts_per_tok": 300}))
    with pytest.raises(CheckpointError, match=r"config\.json: none of its 61 layers has experts"):
        read_config(write_config(tmp_path, DEEPSEEK_V3 | {"first_k_dense_replace": 61}))
    with pytest.raises(CheckpointError, match="moe_layer_freq = 0 must be 1 or more"):
        read_config(write_config(tmp_path, DEEPSEEK_V3 | {"moe_layer_freq": 0}))
    with pytest.raises(CheckpointError, match="key hidden_size = True is no int"):
        read_config(write_config(tmp_path, DEEPSEEK_V3 | {"hidden_size": True}))


def test_unreadable_configs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_config(tmp_path)
    for text, pattern in (("{", "can't be read as JSON"), ("[]", "holds a JSON list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"config\.json: {pattern}"):
            read_config(tmp_path)


# Broken checkpoints


def load_all(directory: Path) -> None:
    load_router(directory, LAYER)
    load_shard(directory, LAYER, Placement.build(read_config(directory).spec, ParallelSpec(tp=3)), 1)


def assert_rejected(directory: Path, pattern: str, by_headers: bool = True) -> None:
    """Loading fails, and so does check_layer if headers alone can tell."""
    with pytest.raises(CheckpointError, match=pattern):
        load_all(directory)
    if by_headers:
        with pytest.raises(CheckpointError, match=pattern):
            check_layer(directory, LAYER, shared=True)
    else:
        check_layer(directory, LAYER, shared=True)


def test_a_whole_checkpoint_is_accepted(broken: Path) -> None:
    assert check_layer(broken, LAYER, shared=True).moe_layers == (1,)
    load_all(broken)
    with pytest.raises(ConfigError, match=r"checkpoint\.layer = 0: this layer is dense"):
        load_router(broken, 0)


def test_missing_files(broken: Path) -> None:
    name = f"{EXPERT}.down_proj.weight"
    file_of(broken, name).unlink()
    assert_rejected(broken, rf"{file_of(broken, name).name}: no such file, though .*index\.json names it")
    (broken / "model.safetensors.index.json").unlink()
    assert_rejected(broken, r"neither model\.safetensors nor model\.safetensors\.index\.json")


def test_bad_index(broken: Path) -> None:
    index = broken / "model.safetensors.index.json"
    for text, pattern in (("{", "can't be read as JSON"), ('{"weight_map": [1]}', "weight_map must map")):
        index.write_text(text)
        assert_rejected(broken, rf"index\.json: .*{pattern}")


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_damaged_files(broken: Path, damage: str) -> None:
    path = file_of(broken, f"{EXPERT}.down_proj.weight")
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-1], "header": b"\xff" * 64 + content[64:], "empty": b""}[damage])
    assert_rejected(broken, rf"{path.name}: is truncated or no safetensors file")


def test_missing_tensors(broken: Path) -> None:
    index = broken / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for kind in ("weight", "weight_scale_inv"):
        for projection in ("gate_proj", "up_proj"):
            del content["weight_map"][f"{EXPERT}.{projection}.{kind}"]
    index.write_text(json.dumps(content))
    pattern = rf"4 tensors are missing: {EXPERT}\.gate_proj\.weight, .*, \.\.\."
    assert_rejected(broken, pattern)
    placement = Placement.build(read_config(broken).spec, ParallelSpec(ep=2))
    assert load_shard(broken, LAYER, placement, 1).num_experts == 4  # another rank's tensors are not its concern


def test_tensor_that_the_index_promises(broken: Path) -> None:
    path = edit_tensor(broken, f"{EXPERT}.up_proj.weight", lambda _: None)
    assert_rejected(broken, rf"{path.name}: tensor {EXPERT}\.up_proj\.weight is missing, though")


def test_missing_correction_bias(broken: Path) -> None:
    name = f"model.layers.{LAYER}.mlp.gate.e_score_correction_bias"
    index = broken / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    assert_rejected(broken, f"1 tensor is missing: {name}")


@pytest.mark.parametrize(
    ("name", "change", "pattern"),
    [
        ("gate_proj.weight", lambda w: w[:-1], r"has shape \(383, 256\), the config asks for \(384, 256\)"),
        ("down_proj.weight", lambda w: w.view(torch.uint8).T.contiguous().view(w.dtype), r"has shape \(384, 256\)"),
        ("up_proj.weight", lambda w: w.bfloat16(), "has dtype BF16, the layer's format asks for F8_E4M3"),
        ("up_proj.weight_scale_inv", lambda s: s[:, :1], r"has shape \(3, 1\), the config asks for \(3, 2\)"),
        ("up_proj.weight_scale_inv", lambda s: s.half(), "has dtype F16, the layer's format asks for F32 or BF16"),
    ],
)
def test_wrong_shape_or_dtype(broken: Path, name: str, change: Change, pattern: str) -> None:
    path = edit_tensor(broken, f"{EXPERT}.{name}", change)
    assert_rejected(broken, rf"{path.name}: tensor {EXPERT}\.{name} {pattern}")


def put(value: float, row: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Write `value` (a byte for FP8) into a row; rank 1 of 3 holds rows or columns 128 to 255, blocks 1 to 1."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        target = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        target[row, -1] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "change", "pattern"),
    [
        ("gate_proj.weight", put(0x7F, 200), "holds NaN or infinity"),
        ("up_proj.weight", put(0xFF, 130), "holds NaN or infinity"),
        ("gate_proj.weight_scale_inv", put(float("nan"), 1), "holds NaN or infinity"),
        ("up_proj.weight_scale_inv", put(float("inf"), 1), "holds NaN or infinity"),
        ("up_proj.weight_scale_inv", put(0.0, 1), "a scale that is not positive"),
        ("gate_proj.weight_scale_inv", put(-1.0, 1), "a scale that is not positive"),
    ],
)
def test_bad_values(broken: Path, name: str, change: Change, pattern: str) -> None:
    path = edit_tensor(broken, f"{EXPERT}.{name}", change)
    assert_rejected(broken, rf"{path.name}: tensor {EXPERT}\.{name} .*{pattern}", by_headers=False)


def test_largest_codes_are_no_nan(broken: Path) -> None:
    for code in (0x7E, 0xFE, 0x80):  # 448, -448, -0
        edit_tensor(broken, f"{EXPERT}.gate_proj.weight", put(code, 200))
        load_all(broken)


def test_nan_in_router_and_bf16_weights(broken: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    edit_tensor(broken, f"model.layers.{LAYER}.mlp.gate.weight", put(float("nan"), 0))
    assert_rejected(broken, r"mlp\.gate\.weight holds NaN", by_headers=False)
    plain = Path(shutil.copytree(made(quant="none"), tmp_path / "plain"))
    edit_tensor(plain, f"{EXPERT}.up_proj.weight", put(float("inf"), 200))
    with pytest.raises(CheckpointError, match=rf"{EXPERT}\.up_proj\.weight holds NaN or infinity"):
        load_all(plain)


def test_placements_that_do_not_fit(made: Callable[..., Path]) -> None:
    directory = made()
    spec = read_config(directory).spec
    fine = Placement.build(spec.with_changes(quant="none"), ParallelSpec(tp=5))
    with pytest.raises(ConfigError, match=r"placement\.slices = \(0, 80\): must be whole multiples of 128"):
        load_shard(directory, LAYER, fine, 0)
    for field, size in (("num_experts", 6), ("intermediate", 512)):
        other = Placement.build(spec.with_changes(**{field: size}), ParallelSpec(tp=2))
        with pytest.raises(ConfigError, match=rf"placement\.{field} = {size}: differs from the checkpoint"):
            load_shard(directory, LAYER, other, 0)
    with pytest.raises(ConfigError, match=r"rank = 2: no such rank.*0 to 1"):
        load_shard(directory, LAYER, Placement.build(spec, ParallelSpec(tp=2)), 2)


# The synthetic checkpoint


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_synthetic_router_is_uneven(tmp_path: Path, model_type: Any) -> None:
    directory = make_checkpoint(tmp_path / "model", intermediate=16, model_type=model_type, quant="none", seed=SEED)
    spec, router = read_config(directory).spec, load_router(directory, LAYER)
    x_TH = torch.randn(4096, spec.hidden, generator=torch.Generator().manual_seed(SEED))
    routing = route(x_TH @ router.gate_EH.float().T, spec, router.bias_E)
    rows = torch.bincount(routing.ids_TK.flatten(), minlength=spec.num_experts).float()
    # Over 400 seeds 1.49 to 3.5; an even router gives less than 1.1.
    assert 1.35 < (rows.max() / rows.mean()).item() < 4.0


def test_synthetic_is_seeded_and_kept(tmp_path: Path) -> None:
    sizes = {"hidden": 128, "intermediate": 128, "num_experts": 4, "top_k": 2}
    first = make_checkpoint(tmp_path / "a", **sizes, seed=SEED)
    second = make_checkpoint(tmp_path / "b", **sizes, seed=SEED)
    other = make_checkpoint(tmp_path / "c", **sizes, seed=SEED + 1)
    files = sorted(path.name for path in first.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    weights = "model-00001-of-00002.safetensors"
    assert (first / weights).read_bytes() != (other / weights).read_bytes()

    before = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert make_checkpoint(first, **sizes, seed=SEED) == first
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == before
    with pytest.raises(ConfigError, match=rf"made otherwise \(seed is {SEED}, not {SEED + 1}\)"):
        make_checkpoint(first, **sizes, seed=SEED + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_synthetic_keeps_what_others_put_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"directory = .*is no synthetic checkpoint"):
        make_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"directory = .*is no synthetic checkpoint"):
        make_checkpoint(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    assert (make_checkpoint(tmp_path / "empty", hidden=128, intermediate=128) / "config.json").is_file()


def test_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    write = synthetic_module.write_tensors

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(synthetic_module, "write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path / "model", hidden=128, intermediate=128)
    assert len(calls) == 2
    assert not list(tmp_path.iterdir())


def test_two_writers_of_the_same_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one finds the other's on renaming: good if it is the same, an error if not."""
    write = synthetic_module._write
    rival = {"seed": SEED}

    def overtaken(directory: Path, *arguments: Any) -> None:
        monkeypatch.setattr(synthetic_module, "_write", write)
        make_checkpoint(tmp_path / "model", hidden=128, intermediate=128, **rival)
        write(directory, *arguments)

    monkeypatch.setattr(synthetic_module, "_write", overtaken)
    make_checkpoint(tmp_path / "model", hidden=128, intermediate=128, seed=SEED)
    check_layer(tmp_path / "model", LAYER)
    shutil.rmtree(tmp_path / "model")
    rival["seed"] += 1
    monkeypatch.setattr(synthetic_module, "_write", overtaken)
    with pytest.raises(ConfigError, match="made otherwise"):
        make_checkpoint(tmp_path / "model", hidden=128, intermediate=128, seed=SEED)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("options", "error", "pattern"),
    [
        ({"model_type": "jamba"}, UnsupportedError, "model_type 'jamba'.*qwen3_moe, deepseek_v3"),
        ({"quant": "int4"}, UnsupportedError, "quant 'int4'.*none, fp8_block"),
        ({"layers": 0}, ConfigError, "layers = 0.*1 and more"),
        ({"layers": 1, "model_type": "deepseek_v3"}, ConfigError, "layers = 1.*2 and more"),
        ({"shards": 0}, ConfigError, "shards = 0.*legal: 1 to"),
        ({"top_k": 17}, ConfigError, r"model\.top_k = 17"),
        ({"hidden": 0}, ConfigError, r"model\.hidden"),
    ],
)
def test_synthetic_parameters(tmp_path: Path, options: Any, error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        make_checkpoint(tmp_path / "model", **({"hidden": 128, "intermediate": 128} | options))
    assert not list(tmp_path.iterdir())
