"""gpt-oss as it is published: experts in MXFP4, read as the bf16 numbers that they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FILE, edit, whole
from safetensors.torch import load_file

from moe_dist.checkpoint import Checkpoint, check_layer, layer_spec, load_shard, make_checkpoint
from moe_dist.checkpoint.mxfp4 import unpacked
from moe_dist.checkpoint.whole import WholeExperts
from moe_dist.errors import CheckpointError, UnsupportedError
from moe_dist.model.placement import Placement
from moe_dist.model.spec import ParallelSpec
from moe_dist.model.weights import quantize_weights, slice_width

LAYER, E, H, I = 1, 3, 96, 160
EXPERTS = f"model.layers.{LAYER}.mlp.experts"
SECTION = {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                      "lm_head"], "quant_method": "mxfp4"}  # fmt: skip
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Tensors = dict[str, torch.Tensor]


def packed(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes [..., G, 16] and exponents [..., G] of [..., 32 G]: the nearest of MXFP4's numbers, one by one."""
    groups = dense.float().unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1).log2().floor() - 2).clamp(-127, 127)  # 4 to 6 become 4 to 8, and those 6
    scaled = groups / 2 ** exponents[..., None]
    codes = (scaled.abs()[..., None] - torch.tensor(MAGNITUDES)).abs().argmin(-1) + 8 * (scaled < 0)
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).byte(), (exponents + 127).byte()


def values_of(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The same back, number by number in Python."""
    rows = []
    for row, powers in zip(blocks.flatten(0, -3).tolist(), scales.flatten(0, -2).tolist(), strict=True):
        found = []
        for group, power in zip(row, powers, strict=True):
            for byte in group:
                for code in (byte & 15, byte >> 4):
                    found.append((-1) ** (code >> 3) * MAGNITUDES[code & 7] * 2.0 ** (power - 127))
        rows.append(found)
    return torch.tensor(rows).unflatten(0, blocks.shape[:-2])


def in_mxfp4(tensors: Tensors) -> Tensors:
    found = dict(tensors)
    for name in tensors:
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            dense = found.pop(name).transpose(1, 2)  # a row of 32 numbers goes along the columns of a product
            found[f"{name}_blocks"], found[f"{name}_scales"] = packed(dense)
    return found


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("mxfp4") / "gpt-oss")


def made(directory: Path, change: Any = lambda tensors: tensors, **sizes: int) -> Path:
    wanted = {"hidden": H, "intermediate": I, "num_experts": E, "top_k": 2, "shards": 1} | sizes
    make_checkpoint(directory, model_type="gpt_oss", quant="none", **wanted)
    config = {"quantization_config": SECTION, "torch_dtype": ...}
    return edit(directory, config, lambda tensors: change(in_mxfp4(tensors)))


def test_every_code_and_exponent() -> None:
    blocks = torch.arange(256).byte().view(1, 16, 16).expand(1, 16, 16)
    scales = torch.tensor([0, 1, 2, 60, 100, 120, 126, 127, 128, 129, 140, 160, 200, 250, 252, 251]).byte()[None]
    found = unpacked(blocks, scales)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.double(), values_of(blocks, scales).double())
    assert unpacked(blocks, scales.clone().fill_(255)).isnan().all()
    for exponent in (253, 254):
        wanted = values_of(blocks, scales.clone().fill_(exponent).double()).double()
        beyond = wanted.abs() >= 2.0**128
        large = unpacked(blocks, scales.clone().fill_(exponent)).double()
        assert bool(beyond.any())
        assert torch.equal(large, torch.where(beyond, wanted.sign() * torch.inf, wanted))


def test_experts_are_what_the_files_hold(published: Path) -> None:
    tensors, spec = load_file(published / FILE), check_layer(published, LAYER).spec
    assert (spec.quant_label, spec.activation, spec.expert_bias) == ("bf16", "swigluoai", True)
    loaded, apart = whole(published, LAYER), WholeExperts(published, LAYER)
    assert loaded.w13_eFH.dtype == torch.bfloat16
    both, down = (
        values_of(*(tensors[f"{EXPERTS}.{name}_proj_{end}"] for end in ("blocks", "scales")))
        for name in ("gate_up", "down")
    )
    for number in range(E):
        gate, up = both[number, 0::2], both[number, 1::2]
        assert torch.equal(loaded.w13_eFH[number].float(), torch.cat([gate, up]))
        assert torch.equal(loaded.w2_eHi[number].float(), down[number])
        for found, wanted in zip(apart.expert(number), (gate, up, down[number]), strict=True):
            assert torch.equal(found, wanted)
        for found, wanted in zip(apart.biases(number), (loaded.b13_eF[number], loaded.b2_eH[number]), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("parallel", [ParallelSpec(tp=2), ParallelSpec(tp=3, ep=2), ParallelSpec(tp=5)],
                         ids=lambda parallel: parallel.label)  # fmt: skip
def test_a_rank_reads_its_slices(published: Path, parallel: ParallelSpec) -> None:
    """Slices of 16 columns may cut a group of 32 in two, which two ranks then read."""
    loaded, placement = whole(published, LAYER), Placement.build(layer_spec(published, LAYER), parallel)
    for rank in range(placement.world):
        source = Checkpoint(published)
        shard = load_shard(source, LAYER, placement, rank)
        (start, stop), held = placement.slice_of(rank), list(placement.experts_of(rank))
        wanted = slice_width(loaded.with_tensors(**{n: t[held] for n, t in loaded.tensors().items()}), start, stop)
        for name, tensor in shard.tensors().items():
            assert torch.equal(tensor, wanted.tensors()[name]), name
        groups = -(-stop // 32) - start // 32
        of_expert = 17 * (2 * (stop - start) * H // 32 + H * groups) + 2 * 2 * (stop - start) + 2 * H * (start == 0)
        assert source.bytes_read == len(held) * of_expert


@pytest.mark.parametrize("quant", ["fp8_block", "fp8_channel", "fp8_tensor_dynamic"])
def test_quantized_when_it_is_loaded(published: Path, quant: Any) -> None:
    spec, dense = layer_spec(published, LAYER, quant), whole(published, LAYER)
    placement = Placement.build(spec, ParallelSpec(tp=2))
    wanted = quantize_weights(dense.w13_eFH, dense.w2_eHi, spec).with_tensors(**dense.biases)
    for rank in range(2):
        found = load_shard(published, LAYER, placement, rank, quant=quant).tensors()
        for name, tensor in slice_width(wanted, *placement.slice_of(rank)).tensors().items():
            assert torch.equal(found[name].float(), tensor.float()), name


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    name = f"{EXPERTS}.down_proj"
    changes: list[tuple[Any, str]] = [
        (lambda tensors: {n: t for n, t in tensors.items() if n != f"{name}_scales"}, "1 tensor is missing: .*_scales"),
        (lambda tensors: tensors | {f"{name}_scales": tensors[f"{name}_scales"][..., 1:]}, "_scales has shape"),
        (lambda tensors: tensors | {f"{name}_blocks": tensors[f"{name}_blocks"].int()}, "_blocks has dtype I32"),
        (lambda tensors: tensors | {name: torch.ones(2)}, r"nothing here reads: .*down_proj"),
    ]
    for number, (change, said) in enumerate(changes):
        with pytest.raises(CheckpointError, match=said):
            check_layer(made(tmp_path / str(number), change), LAYER)
    no_number = made(tmp_path / "nan", lambda t: t | {f"{name}_scales": t[f"{name}_scales"].clone().fill_(255)})
    with pytest.raises(CheckpointError, match=r"down_proj_scales, expert 0, holds NaN"):
        whole(no_number, LAYER)
    nothing = made(tmp_path / "zeros", lambda t: t | {f"{name}_blocks": t[f"{name}_blocks"].clone().fill_(0x80)})
    with pytest.raises(CheckpointError, match=r"down_proj_blocks, expert 0, is all zeros"):
        whole(nothing, LAYER)
    with pytest.raises(UnsupportedError, match=r"hidden 80 is no multiple of 32"):
        layer_spec(edit(made(tmp_path / "odd"), {"hidden_size": 80}), LAYER)


def test_experts_that_a_list_leaves_out_are_bf16(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "made", hidden=H, intermediate=I, num_experts=E, top_k=2, shards=1,
                                model_type="gpt_oss", quant="none")  # fmt: skip
    before = whole(directory, LAYER)
    edit(directory, {"quantization_config": SECTION | {"modules_to_not_convert": ["model.layers.*.mlp.experts"]}})
    after = whole(directory, LAYER)
    assert all(torch.equal(tensor, after.tensors()[name]) for name, tensor in before.tensors().items())
    assert json.loads((directory / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
