"""Partial reads of one MoE layer from safetensors: a rank reads its own slices of its own experts and nothing else.

On disk an expert is {gate_proj, up_proj}.weight [I, H] and down_proj.weight [H, I], each with a weight_scale_inv of one
number per 128×128 block if quantized (DeepSeek-V3's FP8 form; the scale multiplies, whatever its name says).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_dist.checkpoint.config import ModelConfig
from moe_dist.checkpoint.reader import Checkpoint, TensorFormat
from moe_dist.errors import CheckpointError, ConfigError
from moe_dist.placement import Placement
from moe_dist.quantization import FP8
from moe_dist.spec import BLOCK, MoESpec
from moe_dist.weights import ExpertWeights

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
SCALE_DTYPES = ("F32", "BF16")  # as safetensors headers spell them
WEIGHT_DTYPES = {"bf16": "BF16", "fp32": "F32", "fp8_block": "F8_E4M3"}


@dataclass(frozen=True)
class RouterWeights:
    """gate_EH in the dtype it is stored in (bf16 or float32); bias_E float32, None for routers without it."""

    gate_EH: Tensor
    bias_E: Tensor | None


Source = Checkpoint | Path | str


def check_layer(source: Source, layer: int, shared: bool = False) -> ModelConfig:
    """Raise CheckpointError unless every tensor of the layer's router and experts (and shared expert, if `shared`) is
    there in the right shape and dtype, in files that are not truncated. Reads headers only: milliseconds per file."""
    checkpoint = _open_layer(source, layer)
    spec = checkpoint.config.spec
    wanted = _router_tensors(layer, spec)
    for expert in range(spec.num_experts):
        wanted += _expert_tensors(_expert_prefix(layer, expert), spec, spec.intermediate)
    if shared:
        _require_shared(checkpoint)
        wanted += _expert_tensors(_shared_prefix(layer), spec, spec.shared_intermediate)
    checkpoint.require(tensor.name for tensor in wanted)
    for tensor in wanted:
        checkpoint.expect(tensor)
    return checkpoint.config


def load_shard(
    source: Source,
    layer: int,
    placement: Placement,
    rank: int,
    device: torch.device | str = "cpu",
    progress: Callable[[], None] | None = None,
) -> ExpertWeights:
    """What `rank` holds of a layer, on `device`; `progress` is called after each expert. A rank without experts gets
    the format with 0 of them. Raises ConfigError (no such MoE layer or rank, a placement made for another spec) or
    CheckpointError (a tensor of this rank missing, of the wrong form, or holding NaN)."""
    checkpoint = _open_layer(source, layer)
    spec = checkpoint.config.spec
    _check_placement(spec, placement, rank)
    experts = placement.experts_of(rank)
    return _load(
        checkpoint,
        [_expert_prefix(layer, expert) for expert in experts],
        spec,
        spec.intermediate,
        placement.slice_of(rank),
        device,
        progress,
    )


def load_shared_shard(
    source: Source, layer: int, start: int, stop: int, device: torch.device | str = "cpu"
) -> ExpertWeights:
    """Columns [start, stop) of the shared expert's width, as ExpertWeights of one expert (`spec.shared_spec()`)."""
    checkpoint = _open_layer(source, layer)
    spec = checkpoint.config.spec
    _require_shared(checkpoint)
    width = spec.shared_intermediate
    _check_slice("shared slice", start, stop, width, spec)
    return _load(checkpoint, [_shared_prefix(layer)], spec, width, (start, stop), device, None)


def load_router(source: Source, layer: int, device: torch.device | str = "cpu") -> RouterWeights:
    """The router of a layer, whole: every rank needs all of it. Raises like `load_shard`."""
    checkpoint = _open_layer(source, layer)
    wanted = _router_tensors(layer, checkpoint.config.spec)
    checkpoint.require(tensor.name for tensor in wanted)
    loaded = []
    for tensor in wanted:
        checkpoint.expect(tensor)
        values = checkpoint.read(tensor.name)
        _check_values(checkpoint, tensor.name, values)
        loaded.append(values.to(device))
    gate, *bias = loaded
    return RouterWeights(gate, bias[0].float() if bias else None)


def _open_layer(source: Source, layer: int) -> Checkpoint:
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    checkpoint.config.require_moe_layer(layer)
    return checkpoint


def _expert_prefix(layer: int, expert: int) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}"


def _shared_prefix(layer: int) -> str:
    return f"model.layers.{layer}.mlp.shared_experts"


def _router_tensors(layer: int, spec: MoESpec) -> list[TensorFormat]:
    name, E = f"model.layers.{layer}.mlp.gate", spec.num_experts
    tensors = [TensorFormat(f"{name}.weight", (E, spec.hidden), SCALE_DTYPES)]
    if spec.correction_bias:
        tensors.append(TensorFormat(f"{name}.e_score_correction_bias", (E,), SCALE_DTYPES))
    return tensors


def _expert_tensors(prefix: str, spec: MoESpec, intermediate: int) -> list[TensorFormat]:
    tensors = []
    for projection in PROJECTIONS:
        shape = (spec.hidden, intermediate) if projection == "down_proj" else (intermediate, spec.hidden)
        tensors.append(TensorFormat(f"{prefix}.{projection}.weight", shape, (WEIGHT_DTYPES[spec.quant_label],)))
        if spec.quantized:
            blocks = tuple(-(-size // BLOCK) for size in shape)
            tensors.append(TensorFormat(f"{prefix}.{projection}.weight_scale_inv", blocks, SCALE_DTYPES))
    return tensors


def _require_shared(checkpoint: Checkpoint) -> None:
    if checkpoint.config.spec.shared_intermediate < 1:
        raise ConfigError("model.shared_intermediate", 0, f"{checkpoint.directory} has no shared expert")


def _check_placement(spec: MoESpec, placement: Placement, rank: int) -> None:
    for field in ("num_experts", "intermediate"):
        given, stored = getattr(placement, field), getattr(spec, field)
        if given != stored:
            raise ConfigError(f"placement.{field}", given, "differs from the checkpoint", (stored,))
    if not 0 <= rank < placement.world:
        raise ConfigError("rank", rank, "no such rank in the placement", f"0 to {placement.world - 1}")
    _check_slice("placement.slices", *placement.slice_of(rank), spec.intermediate, spec)


def _check_slice(field: str, start: int, stop: int, width: int, spec: MoESpec) -> None:
    """A slice that cuts a block in two would pair its columns with another block's scale."""
    if not 0 <= start <= stop <= width:
        raise ConfigError(field, (start, stop), "must lie within the expert's width", f"0 to {width}")
    aligned = start % spec.granularity == 0 and (stop % spec.granularity == 0 or stop == width)
    if start < stop and not aligned:
        raise ConfigError(field, (start, stop), f"must be whole multiples of {spec.granularity} (quant {spec.quant})")


def _load(
    checkpoint: Checkpoint,
    prefixes: list[str],
    spec: MoESpec,
    intermediate: int,
    bounds: tuple[int, int],
    device: torch.device | str,
    progress: Callable[[], None] | None,
) -> ExpertWeights:
    """One expert per prefix, stacked. The stack is allocated once and filled, so that no second copy ever exists."""
    start, stop = bounds
    weights = _allocate(spec, len(prefixes), stop - start, device)
    wanted = [_expert_tensors(prefix, spec, intermediate) for prefix in prefixes]
    checkpoint.require(tensor.name for tensors in wanted for tensor in tensors)
    for slot, tensors in enumerate(wanted):
        targets = _targets(weights, slot)
        for tensor, target in zip(tensors, targets, strict=True):
            checkpoint.expect(tensor)
            if start < stop:
                _fill(checkpoint, tensor, target, start, stop)
        if progress:
            progress()
    return weights


def _allocate(spec: MoESpec, experts: int, width: int, device: torch.device | str) -> ExpertWeights:
    H, F = spec.hidden, spec.w13_rows(width)
    dtype = FP8 if spec.quantized else spec.torch_dtype
    w13 = torch.empty(experts, F, H, dtype=dtype, device=device)
    w2 = torch.empty(experts, H, width, dtype=dtype, device=device)
    if not spec.quantized:
        return ExpertWeights(spec.quant, spec.gated, w13, w2)
    blocks, hidden_blocks = -(-width // BLOCK), -(-H // BLOCK)
    s13 = torch.empty(experts, spec.w13_rows(blocks), hidden_blocks, device=device)
    s2 = torch.empty(experts, hidden_blocks, blocks, device=device)
    return ExpertWeights(spec.quant, spec.gated, w13, w2, s13, s2)


def _targets(weights: ExpertWeights, slot: int) -> list[Tensor]:
    """Where the tensors of one expert go, in the order of `_expert_tensors`: the rows of w13 are [gate; up]."""
    parts = [*weights.w13_eFH[slot].chunk(2), weights.w2_eHi[slot]]
    if weights.s13 is None or weights.s2 is None:
        return parts
    scales = [*weights.s13[slot].chunk(2), weights.s2[slot]]
    return [tensor for pair in zip(parts, scales, strict=True) for tensor in pair]


def _fill(checkpoint: Checkpoint, tensor: TensorFormat, target: Tensor, start: int, stop: int) -> None:
    """Read columns [start, stop) of the expert's width into `target`, and check them where they now lie."""
    if _is_scale(tensor.name):
        start, stop = start // BLOCK, -(-stop // BLOCK)
    part = slice(start, stop)
    sliced = {"columns": part} if "down_proj" in tensor.name else {"rows": part}
    target.copy_(checkpoint.read(tensor.name, **sliced))
    _check_values(checkpoint, tensor.name, target)


def _is_scale(name: str) -> bool:
    return name.endswith("weight_scale_inv")


def _check_values(checkpoint: Checkpoint, name: str, values: Tensor) -> None:
    if values.dtype == FP8:
        # E4M3 has two NaN codes, 0x7F and 0xFF, and no infinity; float8 tensors have no max() of their own.
        bad = bool((values.view(torch.uint8) & 0x7F).max() == 0x7F)
    else:
        bad = not bool(torch.isfinite(values).all())
    if bad:
        raise CheckpointError(checkpoint.path_of(name), f"tensor {name} holds NaN or infinity")
    if _is_scale(name) and bool((values <= 0).any()):
        raise CheckpointError(checkpoint.path_of(name), f"tensor {name} holds a scale that is not positive")
