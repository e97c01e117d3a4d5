"""Tensors as they cross a collective."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.model.quantization import FP8

# torch 2.13 has new names for these two and warns at the old ones.
gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
scatter_sum_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def wire(tensor: Tensor) -> Tensor:
    """FP8 crosses a collective as bytes: gloo refuses it, and a refusal would poison the next barrier."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor


def copied(parts: Sequence[Tensor], into: Sequence[Tensor] | None) -> list[Tensor]:
    """`parts`, or `into` filled with them where that is given."""
    if into is None:
        return list(parts)
    return [target.copy_(part) for target, part in zip(into, parts, strict=True)]


def row_bytes_of(part: Tensor) -> Tensor:
    """[n, ...] as uint8 [n, bytes of a row]."""
    return plain(part.reshape(part.shape[0], math.prod(part.shape[1:]))).view(torch.uint8)


def plain(rows: Tensor) -> Tensor:
    """A copy with ordinary strides: `contiguous` leaves odd ones on dimensions of size 0 and 1, and a change of the
    element size trips over them."""
    return rows.clone(memory_format=torch.contiguous_format)
