"""bf16 checkpoints that are quantized when they are loaded, because somebody asked for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FILE, edit
from safetensors.torch import load_file

from moe_dist.checkpoint import Checkpoint, load_shard, load_shared_shard, make_checkpoint
from moe_dist.checkpoint.layout import layer_spec
from moe_dist.errors import ConfigError
from moe_dist.model.placement import Placement
from moe_dist.model.spec import ParallelSpec

LAYER, E, H, I = 1, 4, 256, 384
SIZES: dict[str, Any] = {"hidden": H, "intermediate": I, "num_experts": E, "top_k": 2, "layers": 2, "shards": 1}
KINDS = ("fp8_block", "fp8_channel", "fp8_tensor_dynamic")
FORMS = {
    "deepseek_v3": ("model.layers.1.mlp", ("gate_proj", "up_proj", "down_proj"), "shared_experts"),
    "nemotron_h": ("backbone.layers.1.mixer", ("up_proj", "down_proj"), "shared_experts"),
}


@pytest.fixture(scope="module", params=FORMS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    root = tmp_path_factory.mktemp("bf16")
    return request.param, make_checkpoint(root / request.param, model_type=request.param, quant="none", **SIZES)


def rounded(dense: torch.Tensor, kind: str) -> torch.Tensor:
    """float32 [N, K] to what E4M3 makes of it: each block, row or matrix has the scale max / 448."""
    if kind == "fp8_block":
        blocks = dense.abs().unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).amax((1, 3))
        scales = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1) / 448
    else:
        scales = (dense.abs().amax(1, keepdim=True) if kind == "fp8_channel" else dense.abs().amax()) / 448
    return (dense / scales).to(torch.float8_e4m3fn).float() * scales


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parallel", [{}, {"tp": 3}, {"tp": 2, "ep": 2}])
def test_a_rank_s_slice_is_that_of_the_whole_quantized_expert(model: Any, kind: Any, parallel: dict[str, int]) -> None:
    family, directory = model
    block, modules, _ = FORMS[family]
    tensors, spec = load_file(directory / FILE), layer_spec(directory, LAYER, kind)
    assert (spec.quant, spec.dtype) == (kind, "bf16")
    placement = Placement.build(spec, ParallelSpec(**parallel))
    for rank in range(placement.world):
        source, told = Checkpoint(directory), []
        found = load_shard(source, LAYER, placement, rank, progress=lambda told=told: told.append(1), quant=kind)
        start, stop = placement.slice_of(rank)
        held = placement.experts_of(rank)
        assert (found.kind, len(told)) == (kind, len(held))
        width = stop - start if kind == "fp8_block" else I
        assert source.bytes_read == 2 * len(held) * len(modules) * width * H
        for slot, number in enumerate(held):
            whole = [rounded(tensors[f"{block}.experts.{number}.{name}.weight"].float(), kind) for name in modules]
            w13, w2 = found.dequantized(slot)
            assert torch.equal(w13, torch.cat([part[start:stop] for part in whole[:-1]]))
            assert torch.equal(w2, whole[-1][:, start:stop])


@pytest.mark.parametrize("kind", KINDS)
def test_the_shared_expert_likewise(model: Any, kind: Any) -> None:
    family, directory = model
    block, modules, shared = FORMS[family]
    tensors, spec = load_file(directory / FILE), layer_spec(directory, LAYER, kind)
    found = load_shared_shard(directory, LAYER, 128, 384, quant=kind)
    assert found.width == 256 < spec.shared_intermediate
    whole = [rounded(tensors[f"{block}.{shared}.{name}.weight"].float(), kind) for name in modules]
    w13, w2 = found.dequantized(0)
    assert torch.equal(w13, torch.cat([part[128:384] for part in whole[:-1]]))
    assert torch.equal(w2, whole[-1][:, 128:384])


def test_nothing_is_quantized_that_nobody_asked_for(model: Any) -> None:
    spec = layer_spec(model[1], LAYER)
    assert spec.quant_label == "bf16"
    placement = Placement.build(spec, ParallelSpec())
    assert load_shard(model[1], LAYER, placement, 0).w13_eFH.dtype == torch.bfloat16
    assert load_shard(model[1], LAYER, placement, 0, quant="none").w13_eFH.dtype == torch.bfloat16


def test_what_can_not_be_asked_for(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quant = 'fp8_tensor_static': .* no scales of activations.*fp8_block"):
        layer_spec(model[1], LAYER, "fp8_tensor_static")
    with pytest.raises(ConfigError, match=r"quant = 'int4': is no FP8 format"):
        layer_spec(model[1], LAYER, "int4")  # type: ignore[arg-type]
    stored = make_checkpoint(tmp_path / "fp8", model_type=model[0], quant="fp8_block", **SIZES)
    for quant in ("fp8_channel", "none"):
        with pytest.raises(
            ConfigError, match=rf"quant = '{quant}': the layer is stored as fp8_block \(legal: fp8_block\)"
        ):
            layer_spec(stored, LAYER, quant)
    assert layer_spec(stored, LAYER, "fp8_block") == layer_spec(stored, LAYER)
    wide = make_checkpoint(tmp_path / "fp32", model_type=model[0], quant="none", **SIZES)
    edit(wide, {"torch_dtype": "float32"}, lambda tensors: {name: tensor.float() for name, tensor in tensors.items()})
    with pytest.raises(ConfigError, match="the layer is stored as fp32"):
        layer_spec(wide, LAYER, "fp8_block")
    narrow = Placement.build(layer_spec(model[1], LAYER), ParallelSpec(tp=16))  # slices of bf16 may cut blocks
    with pytest.raises(ConfigError, match=r"placement\.slices.*whole multiples of 128"):
        load_shard(model[1], LAYER, narrow, 1, quant="fp8_block")
