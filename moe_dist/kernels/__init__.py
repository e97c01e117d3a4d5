"""Row operations around the experts: plain torch on a CPU, Triton on a GPU, equal results on both."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.quantization import QuantizedRows
from moe_dist.quantization import quantize_rows as quantize_rows_torch
from moe_dist.spec import QuantKind


def take_rows(rows: Tensor, index_S: Tensor) -> Tensor:
    """rows[index] for [R, ...] and int64 indices; FP8 too."""
    if rows.is_cuda:
        from moe_dist.kernels.triton.rows import take_rows as kernel

        return kernel(rows, index_S)
    return rows[index_S]


def sum_rows(rows_RH: Tensor, position_TW: Tensor) -> Tensor:
    """y[t] = sum over w of rows[position[t, w]], added in float32 in the order of w, in the dtype of `rows`; a position
    of -1 adds nothing. No atomics: the same bits in every run."""
    if rows_RH.is_cuda:
        from moe_dist.kernels.triton.rows import sum_rows as kernel

        return kernel(rows_RH, position_TW)
    y_TH = torch.zeros(position_TW.shape[0], rows_RH.shape[1], dtype=torch.float32)
    for position_T in position_TW.unbind(1):
        token = (position_T >= 0).nonzero()[:, 0]
        y_TH[token] += rows_RH[position_T[token]].float()
    return y_TH.to(rows_RH.dtype)


def quantize_rows(x_RH: Tensor, kind: QuantKind, static_scale: Tensor | None = None) -> QuantizedRows:
    """See quantization.quantize_rows; one launch on a GPU (two for fp8_tensor_dynamic)."""
    if x_RH.is_cuda and x_RH.numel():
        from moe_dist.kernels.triton.quantize import quantize_rows as kernel

        return kernel(x_RH, kind, static_scale)
    return quantize_rows_torch(x_RH, kind, static_scale)
