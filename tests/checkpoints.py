"""Small checkpoints that tests change: copies, keys of config.json, tensors, other forms on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moe_dist.checkpoint import layer_spec, load_shard
from moe_dist.model.placement import Placement
from moe_dist.model.spec import ParallelSpec
from moe_dist.model.weights import ExpertWeights

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


def edit(
    directory: Path, config: dict[str, Any] | None = None, tensors: Callable[[Tensors], Tensors] | None = None
) -> Path:
    """Change keys of config.json (... takes one out) and the tensors of model.safetensors."""
    path = directory / "config.json"
    merged = json.loads(path.read_text()) | (config or {})
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not ...}))
    if tensors:
        changed = tensors(load_file(directory / FILE))
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, directory / FILE)
    return directory


def section(directory: Path, **changes: Any) -> dict[str, Any]:
    """config.json's quantization_config with changed keys, for `edit`."""
    found = json.loads((directory / "config.json").read_text())["quantization_config"] | changes
    return {"quantization_config": {key: value for key, value in found.items() if value is not ...}}


def layer_in_bf16(tensors: Tensors, layer: int = 1) -> Tensors:
    """Its routed experts without their scales."""
    prefix = f"layers.{layer}.mlp.experts"
    kept = {name: tensor for name, tensor in tensors.items() if not (prefix in name and "scale" in name)}
    return {name: tensor.float().bfloat16() if prefix in name else tensor for name, tensor in kept.items()}


def fused(tensors: Tensors) -> Tensors:
    """Experts one by one to transformers 5's fused ones, in all layers."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for prefix in sorted({name.split(".experts.")[0] + ".experts" for name in tensors if ".experts." in name}):
        experts = range(sum(f"{prefix}.{number}.up_proj.weight" in tensors for number in range(len(tensors))))
        for suffix, after in ((".weight", ""), (".weight_scale_inv", "_scale_inv")):
            if f"{prefix}.0.up_proj{suffix}" in tensors:
                part = {
                    name: torch.stack([tensors[f"{prefix}.{expert}.{name}_proj{suffix}"] for expert in experts])
                    for name in ("gate", "up", "down")
                }
                found[f"{prefix}.gate_up_proj{after}"] = torch.cat([part["gate"], part["up"]], 1)
                found[f"{prefix}.down_proj{after}"] = part["down"]
    return found


def whole(directory: Path, layer: int = 1) -> ExpertWeights:
    """All experts of a layer, by load_shard."""
    return load_shard(directory, layer, Placement.build(layer_spec(directory, layer), ParallelSpec()), 0)
