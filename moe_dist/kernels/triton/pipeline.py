"""What every fused MoE of ours does around its two grouped GEMMs: align, quantize, requantize, weighted sum.

Pairs are (token, expert) choices, numbered as in the flattened slots: pair p belongs to row p // K. `order` lists the
pairs that are here by expert; expert e has `starts[e]` to `stops[e]` of it. GEMM1's output has its rows in that order,
GEMM2 writes each row back to its pair, and the last kernel adds a token's pairs up in the order of K: no atomics, equal
bits in every run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from moe_dist.errors import UnsupportedError
from moe_dist.kernels.triton.launch import launch
from moe_dist.kernels.triton.permute import Quantizing, sort_pairs, tables_of
from moe_dist.kernels.triton.quantize import divided, quantize_rows, scale_from
from moe_dist.model.quantization import FP8, FP8_MAX, TINY, QuantizedRows
from moe_dist.model.sizes import cdiv, power_of_2
from moe_dist.model.spec import BLOCK
from moe_dist.model.weights import ExpertWeights
from moe_dist.step import Routes, Sink, Step
from moe_dist.step.rows import ExpertRows, TokenRows, used_rows

UNQUANTIZED, BLOCK_SCALES, ROW_SCALES, STATIC = 0, 1, 2, 3  # how a GEMM's input rows are scaled
# Their numbers, and sums of a few of them, are 32-bit integers; what lies at them has 64-bit offsets.
MOST_PAIRS = 2**30
ACTIVATIONS = {"swiglu": 0, "geglu": 1, "relu2": 2, "swigluoai": 3}
# Of the weighted sum: columns of one program, and its warps. With half and twice as many columns steps took as long
# within 1.1 % (benchmarks/2026-11-28-variants.json).
SUM_BLOCK, SUM_WARPS = 1024, 4


@triton.jit
def _weighted_sum(
    out, slots, weights, places, y, R, START, AT, EACH, FIRST, WIDTH, H: tl.constexpr, COLUMNS: tl.constexpr,
    K: tl.constexpr, SPLIT_K: tl.constexpr, PLACED: tl.constexpr, ROUTED: tl.constexpr, EVERY: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[row] = the sum of weight · out over each of R rows' pairs that are here, in float32, in the order of K, for
    COLUMNS columns from START on. A pair's row of `out` has its number or, if PLACED, that in `places`. If ROUTED, `y`
    holds the addresses of Routes, and EACH, FIRST and EVERY are theirs. There, the first of the columns is at AT, and a
    place has WIDTH values. WIDE: sums are float32."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    if ROUTED:  # targets in turns
        ranks = tl.num_programs(0) // EACH
        target = (row + FIRST) % ranks
        there = row // ranks
        row = target * EACH + there
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    real = row < R  # routes may have places for more
    part = tl.cast(R, tl.int64) * K * H
    most = tl.full((), -1, tl.int32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for place in tl.static_range(K):
        pair = row * K + place
        slot = tl.load(slots + pair, mask=real, other=-1)
        most = tl.maximum(most, slot)
        weight = tl.load(weights + pair, mask=slot >= 0, other=0.0)  # what it holds without a slot is ignored
        place_of = tl.load(places + pair, mask=slot >= 0, other=0).to(tl.int64) if PLACED else pair
        at = out + place_of * H + START + column
        value = tl.load(at, mask=inside & (slot >= 0), other=0.0).to(tl.float32)
        for number in tl.static_range(1, SPLIT_K):
            value += tl.load(at + number * part, mask=inside & (slot >= 0), other=0.0).to(tl.float32)
        total += weight * value
    if ROUTED:
        TYPE: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
        begin = tl.multiple_of((tl.load(y + target) + AT).to(tl.pointer_type(TYPE)), 16)
        tl.store(begin + there * WIDTH + column, total.to(TYPE), mask=inside & real & (EVERY | (most >= 0)))
    else:
        tl.store(y + row * COLUMNS + column, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _row_maxima(h, stops, maxima, I: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr):
    """The largest magnitude of each row of h that is in use, 0 for the others."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    used = row < tl.load(stops + E - 1)
    values = tl.load(h + row * I + column, mask=(column < I) & used, other=0.0).to(tl.float32)
    tl.store(maxima + row, tl.max(tl.abs(values), 0))


@triton.jit
def _requantize(
    h, maxima, q, s, I: tl.constexpr, WIDTH: tl.constexpr, FP8_MAX: tl.constexpr, TINY: tl.constexpr
):  # fmt: skip
    """Rows of h to FP8 by the magnitudes given for them; rows not in use get codes that nobody reads."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    values = tl.load(h + row * I + column, mask=column < I, other=0.0).to(tl.float32)
    scale = scale_from(tl.load(maxima + row), FP8_MAX, TINY)
    codes = tl.clamp(divided(values, scale), -FP8_MAX, FP8_MAX)
    tl.store(q + row * I + column, codes.to(q.dtype.element_ty), mask=column < I)
    tl.store(s + row, scale)


class Pipeline(ABC):
    """One call's tensors and its launches, in their order; the two GEMMs are a subclass's. `tile` pairs make an entry
    of `table`, the expert of each tile: expert e's begin at entry starts[e] // tile + e, which leaves room for every
    partial tile whatever the counts are, so that experts need not wait for each other's; entries between are -1.
    `taken` is two zeros, for GEMMs whose thread blocks take tiles as they come to count there; they leave zeros."""

    def __init__(
        self,
        step: Step,
        rows: TokenRows,
        experts: ExpertWeights,
        tile: int,
        pdl: bool,
        split_k: int = 1,
        computed: int | None = None,
    ) -> None:
        """`computed`: rows of h and of GEMM2's output, which lie by pair, unless a subclass says otherwise and sets
        `places`."""
        self.step, self.take, self.rows = step, step.workspace.take, rows
        self.slots_RK, self.experts, self.tile = rows.slots_RK.contiguous(), experts, tile
        self.pdl, self.split_k = pdl, split_k
        self.kind = {"none": UNQUANTIZED, "fp8_block": BLOCK_SCALES, "fp8_tensor_static": STATIC}.get(
            experts.kind, ROW_SCALES
        )
        self.pairs = self.slots_RK.numel()
        if self.pairs > MOST_PAIRS:
            what = f"a step of {self.pairs} (token, expert) pairs"
            raise UnsupportedError(what, [f"kernels count at most {MOST_PAIRS} of them in 32 bits"])
        self.places: Tensor | None = None  # of pairs among GEMM2's rows, where those don't lie by pair
        self.entries = self.pairs // tile + experts.num_experts
        P, E, i = self.pairs, experts.num_experts, experts.width
        computed = P if computed is None else computed
        # A scale for a whole row of h needs another pass over it: until then it waits in bf16.
        codes = FP8 if self.kind in (BLOCK_SCALES, STATIC) else torch.bfloat16
        if isinstance(rows, ExpertRows):
            self.starts, self.stops, self.order = rows.starts_e, rows.stops_e, rows.order_N
        else:
            self.starts, self.stops, self.order = self._scratch(*(((size,), torch.int32) for size in (E, E, P)))
        self.table, self.taken, self.h, self.hs, self.out = self._scratch(
            *(((size,), torch.int32) for size in (self.entries, 2)),
            ((computed, i), codes),
            ((computed * (blocks(i) if self.kind == BLOCK_SCALES else 1),), torch.float32),
            ((split_k, computed, experts.hidden), torch.bfloat16),
        )

    def run(self, activation: str, sink: Sink) -> None:
        """The weighted sums over the experts that are here, to `sink`."""
        stages, weights_RK = self.step.stages, self.rows.weights_RK.contiguous()
        with stages("quantize"):
            values, scales = self.prepare()
        with stages("gemm1"):
            self.gemm1(values, scales, activation)
        if self.kind == ROW_SCALES:
            with stages("quantize"):
                self.requantize()
        for start, stop in sink.columns():
            with stages("gemm2"):
                self.gemm2(start, stop)
            with stages("combine"):
                routes = sink.routes_of(start, stop)
                y_RC = sink.target(start, stop) if routes is None else None
                self.weighted_sum(weights_RK, start, stop, y_RC, routes)
            if y_RC is None:
                sink.store(start, stop)
            else:
                sink.put(start, stop, y_RC)

    @abstractmethod
    def gemm1(self, values: Tensor, scales: Tensor, activation: str) -> None:
        """`h` from the rows and their scales: FP8 with `hs`, or bf16 where a scale is a whole row's."""

    @abstractmethod
    def gemm2(self, start: int, stop: int) -> None:
        """These columns of `out`, by pair, from `h` and `hs`."""

    def prepare(self) -> tuple[Tensor, Tensor]:
        """GEMM1's rows and their scales; what is not there, `hs` stands in for. And the tiles of sorted pairs."""
        R, H, x = len(self.rows), self.experts.hidden, self.rows.x
        source, groups = None, 0
        if isinstance(x, Tensor) and self.kind == BLOCK_SCALES:
            source, groups = x.contiguous(), R * blocks(H)
            x = QuantizedRows(*self._scratch(((R, H), FP8), ((R, blocks(H)), torch.float32)))
        elif isinstance(x, Tensor) and self.kind != UNQUANTIZED:
            used_R = used_rows(self.experts.kind, self.slots_RK)
            x = quantize_rows(x, self.experts.kind, self.experts.a13, used_R, self.take)
        values = (x if isinstance(x, Tensor) else x.values_RH).contiguous()
        scales = self.hs if isinstance(x, Tensor) or x.scales_RS is None else x.scales_RS.contiguous()
        quantizing = Quantizing((values if source is None else source, values, scales), groups, H)
        if isinstance(self.rows, ExpertRows):
            tables_of(self.launch, self.rows, self.table, self.taken, self.tile, quantizing)
        else:
            sort_pairs(self.launch, self.take, self.slots_RK, self.lists, self.taken, self.tile, quantizing)
        return values, scales

    def requantize(self) -> None:
        """h from bf16 to codes with a scale for each row, or one for all."""
        P, i = self.pairs, self.experts.width
        wide = power_of_2(i)
        codes, maxima = self._scratch(((P, i), FP8), ((P,), torch.float32))
        launch(_row_maxima, (P, 1, 1), (self.h, self.stops, maxima), (), (i, self.experts.num_experts, wide))
        if self.experts.kind == "fp8_tensor_dynamic":
            maxima.copy_(maxima.amax().expand(P))
        launch(_requantize, (P, 1, 1), (self.h, maxima, codes, self.hs), (), (i, wide, FP8_MAX, TINY))
        self.h = codes

    def weighted_sum(
        self, weights_RK: Tensor, start: int, stop: int, y_RC: Tensor | None, routes: Routes | None
    ) -> None:
        """To `y_RC`, or without it by `routes`."""
        (R, K), columns = self.slots_RK.shape, stop - start
        block = min(SUM_BLOCK, power_of_2(columns))
        placed = self.places is not None
        target, route, wide, every, programs = y_RC, (0, 1, 0, columns), False, False, R
        if routes is not None:
            at = routes.at + (start - routes.start) * routes.dtype.itemsize
            target, route = routes.addresses_W, (at, routes.each, routes.first, routes.stop - routes.start)
            wide, every = routes.dtype == torch.float32, routes.every
            programs = len(routes.addresses_W) * routes.each
        tensors = (self.out, self.slots_RK, weights_RK, self.places if placed else self.slots_RK, target)
        constants = (self.experts.hidden, columns, K, self.split_k, placed, routes is not None, every, wide, block)
        grid = programs, cdiv(columns, block), 1
        self.launch(_weighted_sum, grid, tensors, (R, start, *route), constants, (SUM_WARPS, 1))

    def _scratch(self, *wanted: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
        """Scratch of these shapes and dtypes."""
        return [self.take(shape, dtype) for shape, dtype in wanted]

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        tensors: tuple[Any, ...],
        integers: tuple[int, ...],
        constants: tuple[Any, ...],
        warps_and_stages: tuple[int, int],
    ) -> None:
        """Kernels whose last constant is PDL."""
        options: dict[str, Any] = dict(zip(("num_warps", "num_stages"), warps_and_stages, strict=True))
        if self.pdl:
            options["launch_pdl"] = True
        launch(kernel, grid, tensors, integers, (*constants, self.pdl), **options)

    @property
    def lists(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.table, self.starts, self.stops, self.order

    @property
    def per_tensor(self) -> bool:
        return self.experts.kind.startswith("fp8_tensor")

    def or_nothing(self, scales: Tensor | None) -> Tensor:
        return self.hs if scales is None else scales


def blocks(size: int) -> int:
    """Scale blocks of so many columns."""
    return cdiv(size, BLOCK)
