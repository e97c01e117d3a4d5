"""Layers of several families and formats: on any grid they give what they give on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dist.pool import Pool

from moe_dist import Comm, load_layer
from moe_dist.checkpoint import make_checkpoint
from moe_dist.oracle.reference import relative_error

SIZES: dict[str, Any] = {"hidden": 256, "intermediate": 256, "num_experts": 8, "top_k": 2}
LAYER, TOKENS = 1, 12
# What crosses ranks is rounded to bf16. What goes into GEMM2 may be rounded to FP8 by the scale of a row or a group,
# of which a rank has its own slice only.
CLOSE = {"none": 1e-2, "fp8_tensor_static": 1e-2, "fp8_channel": 5e-2}


def tokens(rank: int, world: int) -> torch.Tensor:
    return torch.randn(TOKENS, 256, generator=torch.Generator().manual_seed(3)).bfloat16().chunk(world)[rank]


def output(comm: Comm, checkpoint: Path, options: dict[str, Any]) -> torch.Tensor:
    return load_layer(checkpoint, LAYER, comm=comm, **options)(tokens(comm.rank, comm.world))


@pytest.mark.parametrize(
    ("family", "quant", "world", "options"),
    [
        ("nemotron_h", "fp8_tensor_static", 2, {"tp": 2, "shared_experts": "tp"}),
        ("mixtral", "fp8_channel", 2, {"ep": 2}),
        ("ernie4_5_moe", "fp8_tensor_static", 4, {"tp": 2, "ep": 2}),
        ("deepseek_v2", "fp8_channel", 4, {"tp": 4}),
        ("qwen3_vl_moe", "none", 2, {"tp": 2}),
        ("gpt_oss", "none", 4, {"tp": 2, "ep": 2}),
        ("qwen3_next", "none", 2, {"ep": 2}),
        ("llama4", "none", 4, {"tp": 2, "ep": 2}),
        ("llama4_text", "fp8_channel", 2, {"ep": 2}),
    ],
)
def test_every_grid_gives_what_one_rank_gives(
    pool: Pool, tmp_path: Path, family: str, quant: Any, world: int, options: dict[str, Any]
) -> None:
    sizes = SIZES | {"top_k": 1} if family.startswith("llama4") else SIZES
    directory = make_checkpoint(tmp_path / family, model_type=family, quant=quant, **sizes)
    found = torch.cat(pool.run(world, output, directory, options))
    shared = "none" if options.get("shared_experts") == "none" else None
    alone = load_layer(directory, LAYER, shared_experts=shared)(tokens(0, 1))
    assert relative_error(found, alone) < CLOSE[quant]
