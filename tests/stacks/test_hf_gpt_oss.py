"""gpt-oss as transformers saves and computes it, and as it is published, against layers loaded from the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import outputs, prompts, tiny

from moe_dist import load_layer
from moe_dist.checkpoint import read_config
from moe_dist.checkpoint.mxfp4 import unpacked
from moe_dist.integrations.transformers import replace_experts
from moe_dist.oracle.reference import relative_error

pytestmark = pytest.mark.stacks

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
LOUD = 6.0  # times a usual token: gate and up are clamped


def saved(directory: Path, dtype: torch.dtype) -> Any:
    model = tiny("gpt_oss", dtype, **SIZES)
    model.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    del config["moe_intermediate_size"]  # the tiny models have it in common, and gpt-oss none
    path.write_text(json.dumps(config))
    return model


def tokens(dtype: torch.dtype) -> torch.Tensor:
    return (LOUD * torch.randn(33, 64, generator=torch.Generator().manual_seed(2))).to(dtype)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_a_layer_of_the_saved_files_is_the_model_s_block(tmp_path: Path, dtype: torch.dtype, close: float) -> None:
    """Router, experts and both kinds of bias."""
    model, x = saved(tmp_path, dtype), tokens(dtype)
    config = read_config(tmp_path)
    assert (config.spec.activation, config.spec.expert_bias, config.moe_layers) == ("swigluoai", True, (0, 1))
    for number in config.moe_layers:
        block = model.model.layers[number].mlp.float()
        with torch.no_grad():
            wanted = block(x.float()[None])[0][0]
            inner = x.float() @ block.experts.gate_up_proj[0] + block.experts.gate_up_proj_bias[0]
        assert (inner[:, 0::2] > 7).any()
        assert (inner[:, 1::2].abs() > 7).any()
        assert relative_error(load_layer(tmp_path, number)(x).float(), wanted) < close


def test_a_block_without_biases_or_with_its_halves_swapped_would_be_seen(tmp_path: Path) -> None:
    model, x = saved(tmp_path, torch.float32), tokens(torch.float32)
    y = load_layer(tmp_path, 0)(x)
    block = model.model.layers[0].mlp
    for name in ("gate_up_proj_bias", "down_proj_bias", "gate_up_proj"):
        parameter = getattr(block.experts, name)
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(kept.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if name == "gate_up_proj" else 0 * kept)
            assert relative_error(block(x[None])[0][0], y) > 1e-3, name
            parameter.copy_(kept)


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (3, 20, 5, 16), generator=generator).byte()
    scales = torch.randint(100, 140, (3, 20, 5), generator=generator).byte()
    assert torch.equal(unpacked(blocks, scales).transpose(1, 2), convert_moe_packed_tensors(blocks, scales))


def test_a_published_checkpoint_is_the_block_that_transformers_makes_of_it(tmp_path: Path) -> None:
    """Random bytes in the names and shapes of the published files."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model, x = saved(tmp_path, torch.bfloat16), tokens(torch.bfloat16)
    block, generator = model.model.layers[1].mlp.float(), torch.Generator().manual_seed(3)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, rows, columns in (("gate_up_proj", 192, 64), ("down_proj", 64, 96)):
        for layer in (0, 1):
            prefix = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[prefix]
            blocks = torch.randint(0, 256, (6, rows, columns // 32, 16), generator=generator).byte()
            scales = torch.randint(121, 124, (6, rows, columns // 32), generator=generator).byte()
            tensors |= {f"{prefix}_blocks": blocks, f"{prefix}_scales": scales}
        with torch.no_grad():
            getattr(block.experts, name).copy_(convert_moe_packed_tensors(blocks, scales))
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        "quant_method": "mxfp4",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        wanted = block(x.float()[None])[0][0]
    assert relative_error(load_layer(tmp_path, 1)(x).float(), wanted) < 1e-2
    assert relative_error(load_layer(tmp_path, 1, quant="fp8_block")(x).float(), wanted) < 6e-2


def test_replaced_experts_can_be_quantized_and_generate() -> None:
    model, ids = tiny("gpt_oss", **SIZES), prompts(2, 5)
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False)
    replace_experts(model, token_layout="replicated")
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), wanted)
    model = tiny("gpt_oss", torch.bfloat16, **SIZES)
    eager = outputs(model, ids)
    replace_experts(model, token_layout="replicated", quant="fp8_block")
    assert relative_error(outputs(model, ids), eager.float()) < 0.1
