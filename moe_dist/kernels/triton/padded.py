"""Rows sorted by expert, each expert's part padded to whole tiles: the layout that DeepGEMM's grouped GEMMs want."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.kernels.triton.fused_moe import activated
from moe_dist.kernels.triton.launch import launch
from moe_dist.kernels.triton.quantize import quantized
from moe_dist.kernels.triton.step import ACTIVATIONS, Step, blocks, cut
from moe_dist.quantization import FP8, FP8_MAX, TINY
from moe_dist.weights import ExpertWeights

TILE = 128  # rows that an expert's part is padded to

# (codes [rows, K], their scales [rows, K/128]), (weights [e, N, K], their scales), the output [rows, N] in bf16, and
# the expert of each row, -1 in padding.
GroupedGemm = Callable[[tuple[Tensor, Tensor], tuple[Tensor, Tensor | None], Tensor, Tensor], None]


@triton.jit
def _pad_rows(
    x, xs, starts, stops, ends, order, padded_x, padded_s, experts, places,
    E: tl.constexpr, WIDE: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of the padded layout. `ends`: where each expert's padded part ends."""
    row = tl.program_id(0)
    lane = tl.arange(0, WIDE)
    end = tl.load(ends + lane, mask=lane < E, other=2147483647)
    expert = tl.sum((end <= row).to(tl.int32), 0)
    here = expert < E
    known = tl.minimum(expert, E - 1)
    first = tl.max(tl.where(end <= row, end, 0), 0)
    count = tl.load(stops + known) - tl.load(starts + known)
    real = here & (row - first < count)
    tl.store(experts + row, tl.where(real, expert, -1))
    if real:
        pair = tl.load(order + tl.load(starts + known) + row - first)
        tl.store(places + pair, row)
        source = (pair // K).to(tl.int64)
        for at in range(0, H, BLOCK):
            column = at + tl.arange(0, BLOCK)
            codes = tl.load(x + source * H + column, mask=column < H)
            tl.store(padded_x + row.to(tl.int64) * H + column, codes, mask=column < H)
        GROUPS: tl.constexpr = (H + 127) // 128
        for at in range(0, GROUPS, 128):
            group = at + tl.arange(0, 128)
            scale = tl.load(xs + source * GROUPS + group, mask=group < GROUPS)
            tl.store(padded_s + row.to(tl.int64) * GROUPS + group, scale, mask=group < GROUPS)


@triton.jit
def _activate_rows(
    d, experts, h, hs, I: tl.constexpr, ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr, TOGETHER: tl.constexpr,
    FP8_MAX: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """h = act(d) in FP8, TOGETHER groups of 128 of one row."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(experts + row) < 0:
        return
    GATED: tl.constexpr = ACTIVATION != 2
    WIDTH: tl.constexpr = 2 * I if GATED else I
    GROUPS: tl.constexpr = (I + 127) // 128
    group = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < I
    gate = tl.load(d + row * WIDTH + (0 if GATE_FIRST or not GATED else I) + column, mask=inside, other=0.0)
    gate = gate.to(tl.float32)
    up = gate
    if GATED:
        up = tl.load(d + row * WIDTH + (I if GATE_FIRST else 0) + column, mask=inside, other=0.0).to(tl.float32)
    values = tl.where(inside, activated(gate, up, ACTIVATION), 0.0)
    codes, scale = quantized(values, tl.max(tl.abs(values), 1), FP8_MAX, TINY)
    tl.store(h + row * I + column, codes.to(h.dtype.element_ty), mask=inside)
    tl.store(hs + row * GROUPS + group, scale, mask=group < GROUPS)


class PaddedStep(Step):
    """fp8_block only. The number of rows is the most that there can be, so that it needs no word from the device."""

    def __init__(self, slots_RK: Tensor, experts: ExpertWeights, gemm: GroupedGemm) -> None:
        E, H = experts.num_experts, experts.hidden
        self.rows = (slots_RK.numel() + E * (TILE - 1)) // TILE * TILE
        super().__init__(slots_RK, experts, TILE, pdl=False, rows=self.rows)
        self.gemm = gemm
        self.expert_R, self.places, self.x, self.xs, self.d = cut(
            slots_RK.device,
            *(((size,), torch.int32) for size in (self.rows, self.pairs)),
            ((self.rows, H), FP8),
            ((self.rows, blocks(H)), torch.float32),
            ((self.rows, experts.w13_eFH.shape[1]), torch.bfloat16),
        )

    def gemm1(self, values: Tensor, scales: Tensor, activation: str) -> None:
        experts, (E, H, i) = self.experts, (self.experts.num_experts, self.experts.hidden, self.experts.width)
        ends = ((self.stops - self.starts + TILE - 1) // TILE * TILE).cumsum(0, dtype=torch.int32)
        launch(
            _pad_rows,
            (self.rows, 1, 1),
            (values, scales, self.starts, self.stops, ends, self.order, self.x, self.xs, self.expert_R, self.places),
            (),
            (E, triton.next_power_of_2(E), self.slots_RK.shape[1], H, min(4096, triton.next_power_of_2(H))),
        )
        self.gemm((self.x, self.xs), (experts.w13_eFH, experts.s13), self.d, self.expert_R)
        together = min(4, triton.next_power_of_2(blocks(i)))
        launch(
            _activate_rows,
            (self.rows, -(-blocks(i) // together), 1),
            (self.d, self.expert_R, self.h, self.hs),
            (),
            (i, ACTIVATIONS[activation], experts.gate_first, together, FP8_MAX, TINY),
        )

    def gemm2(self) -> None:
        self.gemm(
            (self.h, self.hs.view(self.rows, -1)), (self.experts.w2_eHi, self.experts.s2), self.out[0], self.expert_R
        )
