"""Partial reads of one MoE layer from safetensors: a rank reads its own slices of its own experts and nothing else.
`layout.py` says where they lie."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.checkpoint.layout import Layer, Source, open_layer, spec_as
from moe_dist.checkpoint.pieces import Piece
from moe_dist.checkpoint.reader import Checkpoint, TensorFormat
from moe_dist.errors import CheckpointError, ConfigError
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import FP8
from moe_dist.model.spec import MoESpec, QuantKind
from moe_dist.model.weights import LARGEST_SCALE, LARGEST_WEIGHT, ExpertWeights, quantize_weights, slice_width


@dataclass(frozen=True)
class RouterWeights:
    """gate_EH in the dtype it is stored in (bf16 or float32); bias_E, which corrects scores, and logit_bias_E float32,
    None for routers without it."""

    gate_EH: Tensor
    bias_E: Tensor | None
    logit_bias_E: Tensor | None = None


def load_shard(
    source: Source,
    layer: int,
    placement: Placement,
    rank: int,
    device: torch.device | str = "cpu",
    progress: Callable[[], None] | None = None,
    quant: QuantKind | None = None,
) -> ExpertWeights:
    """What `rank` holds of a layer, on `device`; `progress` is called after each expert. A rank without experts gets
    the format with 0 of them. `quant` quantizes a layer that is stored as bf16 (`spec_as`). Raises ConfigError (no such
    MoE layer or rank, a placement made for another spec, a `quant` that can't be), CheckpointError (a tensor of this
    rank missing, of the wrong form, all zeros, or holding NaN) or UnsupportedError (a format that is not read)."""
    found = open_layer(source, layer)
    spec = spec_as(found.spec, quant)
    _check_placement(spec, placement, rank)
    held = placement.experts_of(rank)
    experts, bounds = [found.expert(expert) for expert in held], placement.slice_of(rank)
    if spec != found.spec:
        return _load_quantized(found, experts, bounds, spec, device, progress)
    weights = _load(found, experts, bounds, device, progress)
    _fill_inputs(found, weights, list(held))
    return weights


def load_shared_shard(
    source: Source,
    layer: int,
    start: int,
    stop: int,
    device: torch.device | str = "cpu",
    quant: QuantKind | None = None,
) -> ExpertWeights:
    """Columns [start, stop) of the shared expert's width, as ExpertWeights of one expert (`spec.shared_spec()`), with
    its gate where it has one. `quant` as in `load_shard`."""
    found = open_layer(source, layer)
    pieces, spec = found.shared_expert(), spec_as(found.spec, quant)
    _check_slice("shared slice", start, stop, spec.shared_intermediate, spec)
    if spec != found.spec:
        weights = _load_quantized(found, [pieces], (start, stop), spec, device, None)
    else:
        weights = _load(found, [pieces], (start, stop), device, None)
        _fill_inputs(found, weights, [None])
    for gate in found.token_gate():
        found.check([gate])
        values = found.checkpoint.read(gate.name)
        _check_values(found.checkpoint, gate.name, values)
        weights.token_gate_eH = values.to(device, torch.float32).reshape(1, -1)
    return weights


def load_router(source: Source, layer: int, device: torch.device | str = "cpu") -> RouterWeights:
    """The router of a layer, whole: every rank needs all of it. Raises like `load_shard`."""
    found = open_layer(source, layer)
    wanted = found.router()
    found.check(wanted)
    loaded = []
    for tensor in wanted:
        values = found.checkpoint.read(tensor.name)
        _check_values(found.checkpoint, tensor.name, values, bias=tensor is not wanted[0])
        loaded.append(values.to(device))
    gate, *biases = loaded
    spec, of_scores, of_logits = found.checkpoint.config.spec, None, None
    if spec.correction_bias:
        of_scores = biases.pop(0).float().reshape(-1)
    if spec.router_bias:
        of_logits = biases.pop(0).float().reshape(-1)
    return RouterWeights(gate, of_scores, of_logits)


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
    layer: Layer,
    experts: list[list[Piece]],
    bounds: tuple[int, int],
    device: torch.device | str,
    progress: Callable[[], None] | None,
) -> ExpertWeights:
    """These experts, stacked. The stack is allocated once and filled, so that no second copy ever exists."""
    start, stop = bounds
    weights = ExpertWeights.empty(layer.spec, len(experts), stop - start, device)
    layer.check(tensor for pieces in experts for piece in pieces for tensor in piece.tensors)
    for slot, pieces in enumerate(experts):
        for piece in pieces:
            target = _target(weights, slot, piece)
            if piece.bias and piece.matrix == "down" and start:  # it is in the slice that begins at column 0
                target.zero_()
            elif target.numel():
                _fill(layer.checkpoint, piece, target, start, stop)
        if progress:
            progress()
    return weights


def _load_quantized(
    layer: Layer,
    experts: list[list[Piece]],
    bounds: tuple[int, int],
    spec: MoESpec,
    device: torch.device | str,
    progress: Callable[[], None] | None,
) -> ExpertWeights:
    """These experts, read as they are stored and quantized as `spec` says. Blocks lie within a slice. Scales of whole
    rows and matrices are those of the whole expert, so that they don't depend on the placement: it is read whole."""
    start, stop = bounds
    weights = ExpertWeights.empty(spec, len(experts), stop - start, device)
    within = spec.quant == "fp8_block"
    for slot, pieces in enumerate(experts):
        dense = _load(layer, [pieces], bounds if within else (0, pieces[0].width), device, None)
        made = quantize_weights(dense.w13_eFH, dense.w2_eHi, spec).with_tensors(**dense.biases)
        made = made if within else slice_width(made, start, stop)
        for name, tensor in weights.tensors().items():
            tensor[slot].copy_(made.tensors()[name][0])
        if progress:
            progress()
    return weights


def _fill_inputs(layer: Layer, weights: ExpertWeights, experts: list[int | None]) -> None:
    """Static scales of what goes into the two GEMMs; None is the shared expert. The first one is the layer's largest,
    so that a row is quantized once, whichever experts it goes to."""
    if weights.a13 is None or weights.a2 is None:
        return
    wanted = layer.inputs()
    second = [layer.second_input(expert) for expert in experts]
    layer.check([*wanted, *second])
    first, *own = [_number(layer.checkpoint, tensors) for tensors in (wanted, *([tensor] for tensor in second))]
    weights.a13.fill_(first)
    weights.a2.copy_(torch.tensor(own, dtype=torch.float32, device="cpu"))


def _number(checkpoint: Checkpoint, tensors: list[TensorFormat]) -> float:
    """The largest of these scales."""
    found = []
    for tensor in tensors:
        values = checkpoint.read(tensor.name).float()
        _check_values(checkpoint, tensor.name, values, scale=True)
        found.append(float(values))
    return max(found)


def _target(weights: ExpertWeights, slot: int, piece: Piece) -> Tensor:
    """Where a piece of one expert goes: the rows of w13 are [gate; up], or those of up alone."""
    first, second = ("b13_eF", "b2_eH") if piece.bias else ("s13", "s2") if piece.scale else ("w13_eFH", "w2_eHi")
    target: Tensor = getattr(weights, second if piece.matrix == "down" else first)[slot]
    if piece.matrix in ("both", "down"):
        return target
    halves = target.chunk(2 if weights.gated else 1)
    return halves[0 if piece.matrix == "gate" else -1]


def _fill(checkpoint: Checkpoint, piece: Piece, target: Tensor, start: int, stop: int) -> None:
    """Read columns [start, stop) of the expert's width into `target`, and check them where they now lie."""
    name, shape = piece.tensor.name, tuple(target.shape)
    target.copy_(piece.canonical(piece.values(checkpoint.read, start, stop), shape).to(target.dtype))
    for number, half in enumerate(piece.halves(target)):
        values = half
        if not piece.scale and not piece.bias and not _any(half):  # padding may fill a rank's whole slice, but not more
            values = piece.halves(piece.canonical(piece.values(checkpoint.read, 0, piece.width), shape))[number]
        # Of MXFP4, bytes may be all zeros; whatever else is wrong with values is the fault of their exponents.
        blamed = piece.packed.name if piece.packed and _any(values) else name
        _check_values(checkpoint, blamed, values, piece.scale is not None, piece.expert, zeros=piece.bias)


def _check_values(
    checkpoint: Checkpoint,
    name: str,
    values: Tensor,
    scale: bool = False,
    expert: int | None = None,
    bias: bool = False,
    zeros: bool = False,
) -> None:
    """CheckpointError for NaN or infinity, for a scale that is not positive, for weights so large that what they are
    multiplied by overflows, and, unless they may be `zeros`, for all zeros: what of a file was never written reads so.
    A `bias` of a router may be as large as it likes, and zeros."""
    limit = LARGEST_SCALE if scale else LARGEST_WEIGHT
    if values.dtype == FP8:
        # E4M3 has two NaN codes, 0x7F and 0xFF, and no infinity; float8 tensors have no max() of their own.
        largest = float((values.view(torch.uint8) & 0x7F).max())
        bad, huge = largest == 0x7F, False
    else:
        largest = float(values.abs().max())
        bad, huge = not math.isfinite(largest), largest > limit and not bias
    what = f"tensor {name}" + ("" if expert is None else f", expert {expert},")
    if bad:
        raise CheckpointError(checkpoint.path_of(name), f"{what} holds NaN or infinity")
    if scale and bool((values <= 0).any()):
        raise CheckpointError(checkpoint.path_of(name), f"{what} holds a scale that is not positive")
    if huge:
        problem = f"holds {largest:.3g}, and beyond {limit:.3g} the results overflow"
        raise CheckpointError(checkpoint.path_of(name), f"{what} {problem}")
    if largest == 0 and not bias and not zeros:
        raise CheckpointError(checkpoint.path_of(name), f"{what} is all zeros")


def _any(values: Tensor) -> bool:
    return bool(((values.view(torch.uint8) & 0x7F) if values.dtype == FP8 else values).any())
