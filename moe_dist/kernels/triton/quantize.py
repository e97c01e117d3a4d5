"""Rows to FP8 E4M3 in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.kernels.triton.launch import launch
from moe_dist.model.quantization import FP8, FP8_MAX, TINY, QuantizedRows, dynamic_scale
from moe_dist.model.sizes import cdiv, power_of_2
from moe_dist.model.spec import BLOCK, QuantKind
from moe_dist.step.workspace import Take

LONGEST_ROW = 16384  # a whole row lies in one program's registers for a scale per row


def quantize_rows(
    x_RH: Tensor, kind: QuantKind, static_scale: Tensor | None, used_R: Tensor | None, take: Take
) -> QuantizedRows:
    """See kernels.quantize_rows."""
    R, H = x_RH.shape
    x_RH = x_RH.contiguous()
    values = take((R, H), FP8)
    if kind == "fp8_block":
        groups = cdiv(H, BLOCK)
        scales = take((R, groups), torch.float32)
        together = 8  # groups of one row in a program
        grid = (R, cdiv(groups, together), 1)
        launch(
            _quantize_groups, grid, (x_RH, values, scales), (H, groups), (FP8_MAX, TINY, BLOCK, together), num_warps=4
        )
        return QuantizedRows(values, scales)
    if kind == "fp8_channel":
        if H > LONGEST_ROW:
            raise ValueError(f"rows of {H} values exceed the kernel's {LONGEST_ROW}")
        scales = take((R, 1), torch.float32)
        constants = (FP8_MAX, TINY, power_of_2(H))
        launch(_quantize_whole_rows, (R, 1, 1), (x_RH, values, scales), (H,), constants, num_warps=8)
        return QuantizedRows(values, scales)
    if kind == "fp8_tensor_dynamic":
        scale = dynamic_scale(x_RH, used_R)
    elif static_scale is None:
        raise ValueError("fp8_tensor_static needs its static scale")
    else:
        scale = static_scale
    block = min(2048, power_of_2(H))
    launch(_cast, (R, cdiv(H, block), 1), (x_RH, values, scale), (H,), (FP8_MAX, block))
    if kind == "fp8_tensor_static":
        return QuantizedRows(values, None)
    return QuantizedRows(values, scale.expand(R, 1).contiguous())


@triton.jit
def divided(values, scale):
    """values / scale for many values to a scale (broadcast): the reciprocal's product and one correction (Markstein
    1990), a third of div.rn's instructions, and quantizing a prefill's rows waits for these. As IEEE rounds, but for
    rare pairs that are off by the last bit; none of bf16 values over the scales of bf16 rows is."""
    inverse = tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
    quotient = values * inverse
    rest = tl.fma(-quotient, scale + tl.zeros_like(values), values)
    corrected = tl.fma(rest, inverse + tl.zeros_like(values), quotient)
    return tl.where(tl.abs(quotient) <= 3.0e38, corrected, quotient)  # an infinite one has no correction


@triton.jit
def scale_from(amax, FP8_MAX: tl.constexpr, TINY: tl.constexpr):
    return tl.maximum(tl.div_rn(amax, tl.full(amax.shape, FP8_MAX, tl.float32)), TINY)


@triton.jit
def quantized(values, amax, FP8_MAX: tl.constexpr, TINY: tl.constexpr):
    """(codes in float32, scales) of values with one largest magnitude for each row of them."""
    scale = scale_from(amax, FP8_MAX, TINY)
    return tl.clamp(divided(values, scale[:, None]), -FP8_MAX, FP8_MAX), scale


@triton.jit
def _quantize_groups(
    x, q, s, H, groups, FP8_MAX: tl.constexpr, TINY: tl.constexpr, GROUP: tl.constexpr, TOGETHER: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < H
    values = tl.load(x + row * H + column, mask=inside, other=0.0).to(tl.float32)
    codes, scale = quantized(values, tl.max(tl.abs(values), 1), FP8_MAX, TINY)
    tl.store(q + row * H + column, codes.to(q.dtype.element_ty), mask=inside)
    tl.store(s + row * groups + group, scale, mask=group < groups)


@triton.jit
def _quantize_whole_rows(x, q, s, H, FP8_MAX: tl.constexpr, TINY: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < H
    values = tl.load(x + row * H + column, mask=inside, other=0.0).to(tl.float32)
    scale = scale_from(tl.max(tl.abs(values), 0), FP8_MAX, TINY)
    codes = tl.clamp(divided(values, scale), -FP8_MAX, FP8_MAX)
    tl.store(q + row * H + column, codes.to(q.dtype.element_ty), mask=inside)
    tl.store(s + row, scale)


@triton.jit
def _cast(x, q, scale, H, FP8_MAX: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    values = tl.load(x + row * H + column, mask=inside, other=0.0).to(tl.float32)
    codes = tl.clamp(divided(values, tl.load(scale)), -FP8_MAX, FP8_MAX)
    tl.store(q + row * H + column, codes.to(q.dtype.element_ty), mask=inside)
