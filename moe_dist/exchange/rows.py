"""Rows on their way, and the shapes and dtypes of what an exchange takes from the workspace: what exchanges share."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.comm import Comm
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import FP8, Activations, QuantizedRows, scale_columns
from moe_dist.model.routing import Routing
from moe_dist.model.sizes import cdiv, power_of_2
from moe_dist.model.spec import MoESpec
from moe_dist.step import Step, TensorSpec


def gather_tokens(step: Step, comm: Comm, x: Activations, routing: Routing, bucket: int) -> tuple[Activations, Routing]:
    """Pad to `bucket` rows with id -1 and weight 0, and collect everybody's: [world·bucket, ...] in rank order."""
    parts = [*parts_of(x), routing.ids_TK, routing.weights_TK]
    fills = [0.0] * (len(parts) - 2) + [-1, 0]
    padded = [pad_rows(step, part, bucket, fill) for part, fill in zip(parts, fills, strict=True)]
    gathered = comm.all_gather(padded, into=room_for(step, padded, comm.world * bucket))
    return activations_of(x, gathered[:-2]), Routing(gathered[-2], gathered[-1])


def gather_specs(spec: MoESpec, placement: Placement, payload: str, bucket: int) -> list[TensorSpec]:
    """The most that quantizing and `gather_tokens` take: own rows, the same padded, everybody's."""
    own = row_specs(spec, payload, bucket)
    everyone = placement.world * bucket
    padded = [*own, *pair_specs(spec, bucket)]
    return [*own, *padded, *row_specs(spec, payload, everyone), *pair_specs(spec, everyone)]


def room_for(step: Step, parts: list[Tensor], rows: int) -> list[Tensor]:
    """Scratch for `rows` rows like those of each part."""
    return [step.workspace.take((rows, *part.shape[1:]), part.dtype) for part in parts]


def pad_rows(step: Step, rows: Tensor, size: int, fill: float) -> Tensor:
    if rows.shape[0] == size:
        return rows
    (padded,) = room_for(step, [rows], size)
    padded[: rows.shape[0]] = rows
    # FP8 has no fill on every device; its zero is the zero byte.
    (padded.view(torch.uint8) if rows.dtype.itemsize == 1 else padded)[rows.shape[0] :].fill_(fill)
    return padded


def parts_of(x: Activations) -> list[Tensor]:
    """The tensors that a row consists of."""
    if isinstance(x, Tensor):
        return [x]
    return [x.values_RH] if x.scales_RS is None else [x.values_RH, x.scales_RS]


def activations_of(like: Activations, parts: list[Tensor]) -> Activations:
    """The inverse of `parts_of`, for rows of the same kind as `like`."""
    if isinstance(like, Tensor):
        return parts[0]
    return QuantizedRows(parts[0], parts[1] if len(parts) > 1 else None)


def payload_row_bytes(spec: MoESpec, payload: str) -> int:
    """Bytes of one dispatched row with its scales, its K ids (or slots) and its K weights."""
    if payload == "fp8":
        values = spec.hidden + 4 * scale_columns(spec.quant, spec.hidden)
    else:
        values = spec.hidden * spec.torch_dtype.itemsize
    return values + 8 * spec.top_k


def row_specs(spec: MoESpec, payload: str, rows: int) -> list[TensorSpec]:
    """Of so many rows as they travel, without their slots and weights."""
    if payload != "fp8":
        return [((rows, spec.hidden), spec.torch_dtype)]
    forms: list[TensorSpec] = [((rows, spec.hidden), FP8)]
    if columns := scale_columns(spec.quant, spec.hidden):
        forms.append(((rows, columns), torch.float32))
    return forms


def pair_specs(spec: MoESpec, rows: int) -> list[TensorSpec]:
    """Of their ids or slots, and of their weights."""
    return [((rows, spec.top_k), torch.int32), ((rows, spec.top_k), torch.float32)]


def sorting_specs(spec: MoESpec, placement: Placement, rows: int) -> list[TensorSpec]:
    """The most that sorting the pairs of so many rows by expert takes."""
    pairs, experts = rows * spec.top_k, max(len(placement.experts_of(rank)) for rank in range(placement.world))
    of_experts = [((experts,), torch.int32)] * 2
    counted: TensorSpec = ((128, max(32, power_of_2(experts))), torch.int32)  # by chunks of many pairs
    return [*of_experts, *([((pairs,), torch.int32)] * 2), counted, ((cdiv(pairs, 1024) + experts,), torch.int32)]
