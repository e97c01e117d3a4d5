"""Rows sorted by expert, each expert's in whole tiles of its own: the layouts that DeepGEMM's grouped GEMMs want."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.kernels.triton.fused_moe import _RELU2, activated
from moe_dist.kernels.triton.launch import is_idle, launch
from moe_dist.kernels.triton.pipeline import ACTIVATIONS, Pipeline, blocks
from moe_dist.kernels.triton.quantize import quantized
from moe_dist.model.quantization import FP8, FP8_MAX, TINY
from moe_dist.model.sizes import cdiv, power_of_2
from moe_dist.model.weights import ExpertWeights
from moe_dist.step import Step, TokenRows

TILE = 128  # rows that an expert's part is padded to

# (codes [rows, K], their scales [rows, K/128]), (weights [e, N, K], their scales), the output [rows, N] in bf16, and
# the expert of each row, -1 in padding.
GroupedGemm = Callable[[tuple[Tensor, Tensor], tuple[Tensor, Tensor | None], Tensor, Tensor], None]
# The same with [e, TILE, ...] instead of rows, the number of rows of each expert, and how many there are on average.
MaskedGemm = Callable[[tuple[Tensor, Tensor], tuple[Tensor, Tensor | None], Tensor, Tensor, int], None]


@triton.jit
def _pad_rows(
    x, xs, starts, stops, order, padded_x, padded_s, experts, places,
    E: tl.constexpr, WIDE: tl.constexpr, K: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, ONE_EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One pair, by its number in the order, to its row of the layout. Each expert has its first in a tile of its own:
    the next after the expert before or, if ONE_EACH, that of its number."""
    number = tl.program_id(0)
    if number >= tl.load(stops + E - 1):
        return
    lane = tl.arange(0, WIDE)
    stop = tl.load(stops + lane, mask=lane < E, other=2147483647)
    expert = tl.sum((stop <= number).to(tl.int32), 0)
    if ONE_EACH:
        first = expert * TILE
    else:
        start = tl.load(starts + lane, mask=lane < expert, other=0)
        first = tl.sum(tl.where(lane < expert, (stop - start + TILE - 1) // TILE * TILE, 0), 0)
    row = first + number - tl.load(starts + expert)
    pair = tl.load(order + number)
    tl.store(experts + row, expert)
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
    d, slots, places, h, hs,
    I: tl.constexpr, ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr, TOGETHER: tl.constexpr,
    FP8_MAX: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """h = act(d) in FP8, TOGETHER groups of 128 of one pair's row."""
    pair = tl.program_id(0)
    if tl.load(slots + pair) < 0:
        return
    row = tl.load(places + pair).to(tl.int64)
    GATED: tl.constexpr = ACTIVATION != _RELU2
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


class PaddedPipeline(Pipeline):
    """fp8_block only. The number of rows is the most that there can be, so that it needs no word from the device. So
    few pairs that an expert with all of them fills one tile have a tile for each expert, which `masked` knows how far
    to read; else `contiguous` reads all there could be."""

    def __init__(
        self, step: Step, rows: TokenRows, experts: ExpertWeights, contiguous: GroupedGemm, masked: MaskedGemm
    ) -> None:
        E, P, H = experts.num_experts, rows.slots_RK.numel(), experts.hidden
        self.one_each = P <= TILE
        self.computed = E * TILE if self.one_each else (P + E * (TILE - 1)) // TILE * TILE
        super().__init__(step, rows, experts, TILE, pdl=False, computed=self.computed)
        self.contiguous, self.masked = contiguous, masked
        self.expert_R, self.places, self.x, self.xs, self.d = self._scratch(
            *(((size,), torch.int32) for size in (self.computed, P)),
            ((self.computed, H), FP8),
            ((self.computed, blocks(H)), torch.float32),
            ((self.computed, experts.w13_eFH.shape[1]), torch.bfloat16),
        )

    def gemm1(self, values: Tensor, scales: Tensor, activation: str) -> None:
        experts, (E, H, i) = self.experts, (self.experts.num_experts, self.experts.hidden, self.experts.width)
        if self.one_each:
            self.counts = self.stops - self.starts
        else:
            self.expert_R.fill_(-1)
        launch(
            _pad_rows,
            (self.pairs, 1, 1),
            (values, scales, *self.lists[1:], self.x, self.xs, self.expert_R, self.places),
            (),
            (E, power_of_2(E), self.slots_RK.shape[1], H, TILE, self.one_each,
             min(4096, power_of_2(H))),
        )  # fmt: skip
        self._gemm(self.x, self.xs, experts.w13_eFH, experts.s13, self.d)
        together = min(4, power_of_2(blocks(i)))
        launch(
            _activate_rows,
            (self.pairs, cdiv(blocks(i), together), 1),
            (self.d, self.slots_RK, self.places, self.h, self.hs),
            (),
            (i, ACTIVATIONS[activation], experts.gate_first, together, FP8_MAX, TINY),
        )

    def gemm2(self, start: int, stop: int) -> None:
        """All columns before the first range is asked for: the library's GEMM knows no ranges."""
        if start:
            return
        self._gemm(self.h, self.hs.view(self.computed, -1), self.experts.w2_eHi, self.experts.s2, self.out[0])

    def _gemm(self, codes: Tensor, scales: Tensor, weights: Tensor, of_weights: Tensor | None, out: Tensor) -> None:
        if is_idle():
            return
        if not self.one_each:
            self.contiguous((codes, scales), (weights, of_weights), out, self.expert_R)
            return
        E = self.experts.num_experts
        rows = codes.view(E, TILE, -1), scales.view(E, TILE, -1)
        self.masked(rows, (weights, of_weights), out.view(E, TILE, -1), self.counts, cdiv(self.pairs, E))
