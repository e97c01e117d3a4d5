"""Llama 4 as transformers saves and computes it, against layers loaded from the files, whole and on ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dist.pool import Pool
from tiny_models import COMMON

from moe_dist import load_layer
from moe_dist.checkpoint import read_config
from moe_dist.errors import UnsupportedError
from moe_dist.integrations.transformers import register, replace_experts
from moe_dist.oracle.reference import relative_error

pytestmark = pytest.mark.stacks

SIZES: dict[str, Any] = {
    **{name: value for name, value in COMMON.items() if name not in ("moe_intermediate_size", "bos_token_id")},
    "hidden_size": 128, "intermediate_size": 256, "intermediate_size_mlp": 96, "num_hidden_layers": 4,
    "num_local_experts": 6, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
}  # fmt: skip
LAYER, TOKENS = 3, 33
FAR = 0.03  # most of what comes out is the shared expert's
X = torch.randn(TOKENS, 128, generator=torch.Generator().manual_seed(2))


def saved(directory: Path, dtype: torch.dtype, wrapped: bool = False) -> Any:
    """The block of LAYER, in float32 with the numbers of the saved model."""
    import transformers

    config = transformers.Llama4TextConfig(**SIZES)
    torch.manual_seed(3)
    if wrapped:
        # As many layers as the text model has: they have the same numbers.
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
                  "image_size": 28, "patch_size": 14, "projector_input_dim": 32, "projector_output_dim": 32,
                  "vision_output_dim": 32}  # fmt: skip
        around = transformers.Llama4Config(text_config=config.to_dict(), vision_config=vision)
        model = transformers.Llama4ForConditionalGeneration(around)
        layers = model.language_model.model.layers
    else:
        model = transformers.Llama4ForCausalLM(config)
        layers = model.model.layers
    block = layers[LAYER].feed_forward
    with torch.no_grad():
        for parameter in block.parameters():  # large enough for experts to matter, and scores far from 1
            parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
        block.router.weight.mul_(0.5)
    model.to(dtype).eval().save_pretrained(directory)
    return block.float()


def computed(block: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y: torch.Tensor = block(x.float()[None])[0]
    return y


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_a_layer_of_the_saved_files_is_the_model_s_block(
    tmp_path: Path, dtype: torch.dtype, close: float, wrapped: bool
) -> None:
    block, x = saved(tmp_path, dtype, wrapped), X.to(dtype)
    config = read_config(tmp_path)
    assert (config.model_type, config.moe_layers) == ("llama4" if wrapped else "llama4_text", (1, 3))
    assert (config.spec.weights_on_input, config.spec.shared_intermediate) == (True, 256)
    assert relative_error(load_layer(tmp_path, LAYER)(x).float(), computed(block, x)) < close


def test_a_block_that_is_computed_otherwise_would_be_seen(tmp_path: Path) -> None:
    """With its score on the other side, with gate and up exchanged, and with another layer's router."""
    block = saved(tmp_path, torch.float32)
    y = load_layer(tmp_path, LAYER)(X)
    with torch.no_grad():
        scores, _ = block.router(X)
        tokens = X.repeat(6, 1)
        outside = (scores.T.reshape(-1, 1) * block.experts(tokens)).view(6, TOKENS, -1).sum(0) + block.shared_expert(X)
        assert relative_error(outside, y) > FAR
        block.experts.gate_up_proj.copy_(block.experts.gate_up_proj.roll(256, -1))
        assert relative_error(computed(block, X), y) > FAR
        block.experts.gate_up_proj.copy_(block.experts.gate_up_proj.roll(256, -1))
        block.router.weight.copy_(block.router.weight.flip(0))
        assert relative_error(computed(block, X), y) > FAR


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pool]:
    with Pool(size=4, timeout_s=120) as workers:
        yield workers


def on_rank(comm: Any, directory: Path, dtype: torch.dtype, options: dict[str, Any]) -> torch.Tensor:
    layer = load_layer(directory, LAYER, comm=comm, **options)
    x = X.to(dtype)
    y: torch.Tensor = layer(x if options.get("token_layout") == "replicated" else x.tensor_split(comm.world)[comm.rank])
    return y


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, {"tp": 2}),
        (2, {"ep": 2, "exchange": "all_to_all"}),
        (2, {"tp": 2, "token_layout": "replicated"}),
        (4, {"tp": 2, "ep": 2, "exchange": "all_to_all"}),
        (4, {"tp": 2, "ep": 2, "token_layout": "replicated"}),
    ],
    ids=str,
)
def test_ranks(ranks: Pool, tmp_path: Path, world: int, options: dict[str, Any]) -> None:
    """In float32, in bf16, and in FP8 that is made of bf16 while it is loaded."""
    for dtype, quant, close in (
        (torch.float32, None, 1e-6), (torch.bfloat16, None, 1e-2), (torch.bfloat16, "fp8_block", 8e-2),
        (torch.bfloat16, "fp8_channel", 8e-2),
    ):  # fmt: skip
        directory = tmp_path / str(dtype)
        block = saved(directory, dtype)
        found = ranks.run(world, on_rank, directory, dtype, options | {"quant": quant})
        wanted = computed(block, X.to(dtype))
        for y in found if options.get("token_layout") == "replicated" else [torch.cat(found)]:
            assert relative_error(y.float(), wanted) < close, (dtype, quant)


def test_its_modules_in_transformers_are_refused_by_name(tmp_path: Path) -> None:
    """Its experts are called with tokens that are scaled and sorted already, and without a routing."""
    register()
    block = saved(tmp_path, torch.float32)
    for module in (block, block.experts):
        with pytest.raises(UnsupportedError, match="no module of it has the flags of transformers' experts"):
            replace_experts(module, token_layout="replicated")
