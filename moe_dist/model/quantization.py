"""FP8 E4M3 casts in plain torch, for CPU and GPU. A value is its FP8 code times its scale, scales are float32. What a
scale can't hold saturates: with one static scale an infinite value, too, becomes the largest.

| kind | weights | activations |
|---|---|---|
| fp8_block | one scale per 128×128 block | one per row and group of 128 columns, from the row itself |
| fp8_tensor_static | one per matrix | one for all rows, fixed beforehand |
| fp8_tensor_dynamic | one per matrix | one for all rows of the source rank, from those that are computed |
| fp8_channel | one per output row | one per row (token), from the row itself |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import BLOCK, QuantKind

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest finite E4M3 value
TINY = 1e-12  # least scale: keeps all-zero rows at zero instead of NaN


@dataclass(frozen=True)
class QuantizedRows:
    """`values_RH` FP8 rows; `scales_RS` float32 with S = ceil(H / 128) (fp8_block) or 1 (channel, dynamic tensor),
    or None where one static scale, known to every rank, serves all rows."""

    values_RH: Tensor
    scales_RS: Tensor | None

    @property
    def shape(self) -> torch.Size:
        return self.values_RH.shape


Activations = Tensor | QuantizedRows


def cast(values: Tensor, scales: Tensor) -> Tensor:
    """values / scales as E4M3, saturating. `scales` broadcasts."""
    return (values.float() / scales).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def scale_of(amax: Tensor) -> Tensor:
    """amax / 448, rounded as IEEE prescribes. For a divisor that is a plain number, torch multiplies by its reciprocal
    on GPUs, which moves the scale by its last bit, and with it codes that lie on ties."""
    return (amax.float() / torch.full((), FP8_MAX, dtype=torch.float32, device=amax.device)).clamp_min(TINY)


def dynamic_scale(values_RK: Tensor, used_R: Tensor | None = None) -> Tensor:
    """One scale for all rows, or for those that are True in `used_R`; a scalar."""
    amax_R = values_RK.abs().amax(1) if values_RK.numel() else values_RK.new_zeros(len(values_RK))
    if used_R is not None:
        amax_R = amax_R.masked_fill(~used_R, 0)
    return scale_of(amax_R.amax() if len(amax_R) else amax_R.new_zeros(()))


def pad_to_blocks(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Zero-pad each of the (negative) `dims` to a multiple of 128, so that partial blocks need no special case."""
    padding: list[int] = []
    for dim in range(-1, min(dims) - 1, -1):
        padding += [0, -values.shape[dim] % BLOCK if dim in dims else 0]
    return torch.nn.functional.pad(values, padding) if any(padding) else values


def quantize_blocks(values_NK: Tensor) -> tuple[Tensor, Tensor]:
    """[..., N, K] -> FP8 codes of that shape and scales [..., ceil(N/128), ceil(K/128)]."""
    N, K = values_NK.shape[-2:]
    blocks = pad_to_blocks(values_NK.float(), (-1, -2)).unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scales = scale_of(blocks.abs().amax((-3, -1)))
    codes = cast(blocks, scales[..., :, None, :, None])
    return codes.flatten(-4, -3).flatten(-2, -1)[..., :N, :K].contiguous(), scales


def expand_blocks(scales: Tensor, N: int, K: int) -> Tensor:
    """Block scales [..., ceil(N/128), ceil(K/128)] to one per element [..., N, K]."""
    return scales.repeat_interleave(BLOCK, -2)[..., :N, :].repeat_interleave(BLOCK, -1)[..., :K]


def quantize_groups(values_RK: Tensor) -> QuantizedRows:
    """Rows [R, K] with one scale per 128 columns."""
    K = values_RK.shape[-1]
    groups = pad_to_blocks(values_RK.float(), (-1,)).unflatten(-1, (-1, BLOCK))
    scales = scale_of(groups.abs().amax(-1))
    return QuantizedRows(cast(groups, scales[..., None]).flatten(-2)[..., :K].contiguous(), scales)


def quantize_rows(
    values_RK: Tensor, kind: QuantKind, static_scale: Tensor | None = None, used_R: Tensor | None = None
) -> QuantizedRows:
    """A GEMM's input rows as `kind` prescribes. fp8_tensor_static needs `static_scale`: scalar, or [R, 1] if rows of
    several experts with scales of their own lie together. fp8_tensor_dynamic takes all given rows as one tensor, but
    for those that are False in `used_R` (bool): what padding holds must not decide how others are rounded."""
    if kind == "fp8_block":
        return quantize_groups(values_RK)
    if kind == "fp8_tensor_static":
        if static_scale is None:
            raise ValueError("fp8_tensor_static needs its static scale")
        return QuantizedRows(cast(values_RK, static_scale), None)
    if kind == "fp8_channel":
        scales = scale_of(values_RK.abs().amax(-1, keepdim=True))
    elif kind == "fp8_tensor_dynamic":
        scales = dynamic_scale(values_RK, used_R).expand(len(values_RK), 1).contiguous()
    else:
        raise ValueError(f"{kind} is no FP8 kind")
    return QuantizedRows(cast(values_RK, scales), scales)


def dequantize_rows(rows: QuantizedRows, static_scale: Tensor | None = None) -> Tensor:
    """Back to float32 [R, K]."""
    values = rows.values_RH.float()
    if rows.scales_RS is None:
        if static_scale is None:
            raise ValueError("rows without scales need the static scale")
        return values * static_scale
    if rows.scales_RS.shape[1] == 1:
        return values * rows.scales_RS
    return values * rows.scales_RS.repeat_interleave(BLOCK, 1)[:, : values.shape[1]]


def scale_columns(kind: QuantKind, hidden: int) -> int:
    """Scales that travel with one row of `hidden` values."""
    return {"fp8_block": cdiv(hidden, BLOCK), "fp8_channel": 1, "fp8_tensor_dynamic": 1}.get(kind, 0)
