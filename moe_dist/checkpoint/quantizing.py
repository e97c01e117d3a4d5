"""A checkpoint's experts in FP8 blocks, as such checkpoints are stored; everything else stays as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import Tensor

from moe_dist.checkpoint.folder import CONFIG_LIMIT, folder, read_json
from moe_dist.checkpoint.layout import layer_spec, spec_as
from moe_dist.checkpoint.load import load_shard
from moe_dist.checkpoint.quantization import CONFIG_FILE, SECTION
from moe_dist.checkpoint.reader import SINGLE_FILE, WEIGHT_FILES, Checkpoint
from moe_dist.checkpoint.synthetic import stored_matrices
from moe_dist.checkpoint.synthetic_configs import FP8_BLOCK
from moe_dist.checkpoint.writing import write_tensors
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.model.placement import Placement
from moe_dist.model.spec import BLOCK, ParallelSpec
from moe_dist.model.weights import ExpertWeights


def quantize_checkpoint(source: Path | str, directory: Path | str) -> Path:
    """Write `directory`: the checkpoint in `source` with its experts as E4M3 codes and the float32 scales of blocks of
    128×128 (weight_scale_inv), each matrix under a name of its own. Attention, router and whatever else there is keep
    their numbers, and config.json names them as exceptions. All of it is held in memory, and goes into one file.

    Raises ConfigError for a directory that is there, UnsupportedError for experts that aren't bf16 or whose sizes
    aren't multiples of 128, CheckpointError for a source that can't be read, OSError where nothing can be written."""
    source, target = folder(source, "source"), folder(directory, "directory")
    checkpoint = Checkpoint(source)
    if target.exists():
        raise ConfigError("directory", str(target), "is there already", "a new folder")
    names, layers = checkpoint.config.names, checkpoint.config.moe_layers
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        _check(layer, source)
        held = _quantized(checkpoint, layer, source)
        for expert in range(held.num_experts):
            tensors |= stored_matrices(f"{names.experts(layer)}.{expert}", names, held.one(expert))
    replaced = tuple(f"{names.experts(layer)}." for layer in layers)
    kept = [name for name in checkpoint.files if not name.startswith(replaced)]
    tensors |= {name: checkpoint.read(name) for name in kept}
    section = FP8_BLOCK | {"modules_to_not_convert": _modules(checkpoint, kept)}
    config = {**read_json(source, CONFIG_FILE, CONFIG_LIMIT), SECTION: section}
    target.mkdir(parents=True)
    for path in source.iterdir():  # the tokenizer's files among them
        if path.is_file() and not path.name.endswith(WEIGHT_FILES) and path.name != CONFIG_FILE:
            shutil.copyfile(path, target / path.name)
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tensors(tensors, target / SINGLE_FILE)
    return target


def _check(layer: int, source: Path) -> None:
    spec = layer_spec(source, layer)
    reasons = [f"its format is {spec.quant} already"] * spec.quantized
    reasons += ["its experts have biases, with which no FP8 checkpoint is read"] * spec.expert_bias
    for name in ("hidden", "intermediate"):
        if getattr(spec, name) % BLOCK:
            reasons.append(f"{name} is {getattr(spec, name)}, no multiple of {BLOCK}")
    if reasons:
        raise UnsupportedError(f"quantizing layer {layer} of {source}", reasons)


def _quantized(checkpoint: Checkpoint, layer: int, source: Path) -> ExpertWeights:
    whole = Placement.build(spec_as(layer_spec(source, layer), "fp8_block"), ParallelSpec())
    return load_shard(checkpoint, layer, whole, 0, quant="fp8_block")


def _modules(checkpoint: Checkpoint, kept: list[str]) -> list[str]:
    """The modules with a matrix that keeps its numbers, as config.json names them."""
    matrices = [name for name in kept if len(checkpoint.header(name)[1]) > 1]
    return sorted({name.rpartition(".")[0] for name in matrices})
