"""The two grouped GEMMs of an FP8 fused MoE in Triton, with the activation between; pipeline.py has the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_dist.errors import ConfigError
from moe_dist.kernels.triton.pipeline import ACTIVATIONS, BLOCK_SCALES, ROW_SCALES, STATIC, Pipeline
from moe_dist.kernels.triton.quantize import divided, quantized
from moe_dist.model.quantization import FP8_MAX, TINY, Activations
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import BLOCK, QuantKind
from moe_dist.model.weights import OAI_ALPHA, OAI_LIMIT, ExpertWeights
from moe_dist.step import Step, TokenRows, Whole, Workspace

# What is a name in a kernel must be a constexpr.
_BLOCK_SCALES, _ROW_SCALES, _STATIC = map(tl.constexpr, (BLOCK_SCALES, ROW_SCALES, STATIC))
_SWIGLU, _GEGLU, _RELU2, _SWIGLUOAI = (
    tl.constexpr(ACTIVATIONS[name]) for name in ("swiglu", "geglu", "relu2", "swigluoai")
)
_ALPHA, _LIMIT = tl.constexpr(OAI_ALPHA), tl.constexpr(OAI_LIMIT)
_NAN = tl.constexpr(tl.PropagateNan.ALL)  # NaN stays NaN, so that the output shows it
FENCE = not triton.knobs.runtime.interpret  # the interpreter has no assembler


@triton.jit
def activated(gate, up, ACTIVATION: tl.constexpr):
    if ACTIVATION == _SWIGLU:
        return gate * tl.sigmoid(gate) * up
    elif ACTIVATION == _GEGLU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2 * inner) * up  # 0.5 (1 + tanh z) = sigmoid(2 z)
    elif ACTIVATION == _SWIGLUOAI:
        gate = tl.minimum(gate, _LIMIT, propagate_nan=_NAN)
        up = tl.clamp(up, -_LIMIT, _LIMIT, propagate_nan=_NAN)
        return gate * tl.sigmoid(gate * _ALPHA) * (up + 1)
    else:
        positive = tl.maximum(gate, 0.0)
        return positive * positive


@triton.jit
def _place(pid, tiles, columns: tl.constexpr, GROUP: tl.constexpr):
    """(tile, column of tiles) of a program: GROUP tiles go through all columns together, so that weights which they
    share and their own rows stay in L2."""
    group = pid // (GROUP * columns)
    first = group * GROUP
    size = tl.minimum(tiles - first, GROUP)
    within = pid % (GROUP * columns)
    return first + within % size, within // size


@triton.jit
def _weight_tile(
    w, descriptor, row, at, n, last_n, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """[BN, BK] of a weight matrix from `row` and column `at` on; zeros beyond its K columns and, read by pointers,
    beyond its rows."""
    if TMA:
        return descriptor.load([row, at])
    else:
        k = tl.arange(0, BK)
        rows = w + row.to(tl.int64) * K + tl.arange(0, BN)[:, None] * K + (at + k)[None, :]
        if WHOLE:
            return tl.load(rows)
        else:
            return tl.load(rows, mask=(n < last_n)[:, None] & (k < K - at)[None, :], other=0.0)


@triton.jit
def _finished(total):
    """`total`, and nothing after it may start before it is there. ptxas would put off adding a first product until a
    second is under way, and with both in registers spill them: what is slowest in GEMM1 with tiles of 128 then.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [total], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def _added(total, a, b, scale, SWAP: tl.constexpr, SCALED: tl.constexpr):
    """total + a · bᵀ, the product times its rows' scales; transposed if SWAP."""
    if SWAP:
        product = tl.dot(b, tl.trans(a))
        return total + product * scale[None, :] if SCALED else total + product
    else:
        product = tl.dot(a, tl.trans(b))
        return total + product * scale[:, None] if SCALED else total + product


@triton.jit(do_not_specialize=["ENTRIES"])
def _gemm1(
    x, xs, w, ws, a13, a2, bias, table, starts, stops, order, h, hs, descriptor,
    ENTRIES,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, PER_TENSOR: tl.constexpr,
    ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr, SWAP: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FP8_MAX: tl.constexpr, TINY: tl.constexpr,
    FENCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h = act(x · w13ᵀ + bias), as codes where its scales are known, for BM pairs of one expert, BN columns of gate and
    up. `bias` is None where there is none, and the kernel then has no such parameter."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    COLUMNS: tl.constexpr = (I + BN - 1) // BN
    tile, column = _place(tl.program_id(0), ENTRIES, COLUMNS, GROUP)
    expert = tl.load(table + tile)
    if expert < 0:
        return
    start = tl.load(starts + expert)
    count = tl.load(stops + expert) - start
    j = (tile - (start // BM + expert)) * BM + tl.arange(0, BM)
    real = j < count
    row = (tl.load(order + start + j, mask=real, other=0) // K).to(tl.int64)

    GATED: tl.constexpr = ACTIVATION != _RELU2
    F: tl.constexpr = 2 * I if GATED else I
    GATE: tl.constexpr = 0 if GATE_FIRST or not GATED else 1  # which half of the rows is gate's
    WHOLE_K: tl.constexpr = H % BK == 0
    WHOLE: tl.constexpr = WHOLE_K and I % BN == 0
    K_BLOCKS: tl.constexpr = (H + 127) // 128
    N_BLOCKS: tl.constexpr = (I + 127) // 128
    n = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    gate_row = expert * F + GATE * I + column * BN
    up_row = expert * F + (1 - GATE) * I + column * BN
    gate_scales = ws + ((expert * (2 if GATED else 1) + GATE) * N_BLOCKS + column * BN // 128) * K_BLOCKS
    up_scales = ws + ((expert * 2 + 1 - GATE) * N_BLOCKS + column * BN // 128) * K_BLOCKS
    rows = x + row[:, None] * H + k[None, :]
    gate = tl.zeros((BN, BM) if SWAP else (BM, BN), dtype=tl.float32)
    up = tl.zeros((BN, BM) if SWAP else (BM, BN), dtype=tl.float32)
    for at in range(0, H, BK):
        if WHOLE_K:
            a = tl.load(rows + at, mask=real[:, None], other=0.0)
        else:
            a = tl.load(rows + at, mask=real[:, None] & (k < H - at)[None, :], other=0.0)
        b = _weight_tile(w, descriptor, gate_row, at, n, I, H, BN, BK, WHOLE, TMA)
        if KIND == _BLOCK_SCALES:
            scale = tl.load(xs + row * K_BLOCKS + at // 128, mask=real, other=0.0)
            gate = _added(gate, a, b, scale * tl.load(gate_scales + at // 128), SWAP, True)
        else:
            gate = _added(gate, a, b, 0.0, SWAP, False)
        if GATED:
            if FENCE:
                gate = _finished(gate)
            b = _weight_tile(w, descriptor, up_row, at, n, I, H, BN, BK, WHOLE, TMA)
            if KIND == _BLOCK_SCALES:
                up = _added(up, a, b, scale * tl.load(up_scales + at // 128), SWAP, True)
            else:
                up = _added(up, a, b, 0.0, SWAP, False)
    if SWAP:
        gate = tl.trans(gate)
        up = tl.trans(up)
    if (KIND == _ROW_SCALES) | (KIND == _STATIC):
        if KIND == _ROW_SCALES:
            of_row = tl.load(xs + row, mask=real, other=0.0)
        else:
            of_row = tl.load(a13) + tl.zeros((BM,), tl.float32)
        gate *= of_row[:, None] * _weight_scale(ws, expert, GATE, n, I, F, 2 if GATED else 1, PER_TENSOR)[None, :]
        if GATED:
            up *= of_row[:, None] * _weight_scale(ws, expert, 1 - GATE, n, I, F, 2, PER_TENSOR)[None, :]
    if bias is not None:
        of_expert = bias + expert * F + n
        if GATED:  # after gate's, registers would spill (tests/unit/test_kernels.py)
            up += tl.load(of_expert + (1 - GATE) * I, mask=n < I, other=0.0)[None, :]
        gate += tl.load(of_expert + GATE * I, mask=n < I, other=0.0)[None, :]
    out = activated(gate, up, ACTIVATION)
    if not WHOLE:
        out = tl.where((n < I)[None, :], out, 0.0)  # columns read beyond the half must not count in the scale
    at_row = (start + j).to(tl.int64)
    if KIND == _BLOCK_SCALES:
        out, scale_h = quantized(out, tl.max(tl.abs(out), 1), FP8_MAX, TINY)
        tl.store(hs + at_row * N_BLOCKS + column, scale_h, mask=real)
    elif KIND == _STATIC:
        out = tl.clamp(divided(out, tl.load(a2 + expert)), -FP8_MAX, FP8_MAX)
    target = h + at_row[:, None] * I + n[None, :]
    tl.store(target, out.to(h.dtype.element_ty), mask=real[:, None] & (n < I)[None, :])


@triton.jit
def _weight_scale(
    ws, expert, half, n, I: tl.constexpr, F: tl.constexpr, HALVES: tl.constexpr, PER_TENSOR: tl.constexpr
):
    if PER_TENSOR:
        return tl.load(ws + expert * HALVES + half + tl.zeros_like(n))
    else:
        return tl.load(ws + expert * F + half * I + n, mask=n < I, other=0.0)


@triton.jit(do_not_specialize=["ENTRIES", "P"])
def _gemm2(
    h, hs, w, ws, a2, bias, table, starts, stops, order, out, descriptor,
    ENTRIES, P, START,
    H: tl.constexpr, I: tl.constexpr, LENGTH: tl.constexpr, KIND: tl.constexpr, PER_TENSOR: tl.constexpr,
    SWAP: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TWICE: tl.constexpr, SPAN: tl.constexpr, BK: tl.constexpr, SPLIT_K: tl.constexpr, FENCE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[part, pair] = h · w2ᵀ over one of SPLIT_K parts of the sum, plus `bias` (None where there is none) in the
    first of them, for BM pairs of one expert, SPLIT of which make one of GEMM1's tiles, and BN of the LENGTH columns
    from START on, or twice as many in two products that share their rows: one product so wide would need two of its
    accumulators. SPAN such tiles follow each other in one loop, so that short ones don't wait for their first loads and
    last stores."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    WIDTH: tl.constexpr = 2 * BN if TWICE else BN
    COLUMNS: tl.constexpr = (LENGTH + WIDTH * SPAN - 1) // (WIDTH * SPAN)
    STEPS: tl.constexpr = ((I + BK - 1) // BK + SPLIT_K - 1) // SPLIT_K  # of one part
    tile, column = _place(tl.program_id(0), ENTRIES * SPLIT, COLUMNS, GROUP)
    expert = tl.load(table + tile // SPLIT)
    if expert < 0:
        return
    start = tl.load(starts + expert)
    count = tl.load(stops + expert) - start
    first_pair = (tile - (start // (BM * SPLIT) + expert) * SPLIT) * BM
    if first_pair >= count:
        return
    j = first_pair + tl.arange(0, BM)
    real = j < count
    at_row = (start + j).to(tl.int64)
    pair = tl.load(order + start + j, mask=real, other=0).to(tl.int64)
    WHOLE_K: tl.constexpr = I % (BK * SPLIT_K) == 0
    WHOLE: tl.constexpr = WHOLE_K and LENGTH % (WIDTH * SPAN) == 0
    END = START + LENGTH
    part = tl.program_id(1)
    out += part.to(tl.int64) * P * H
    K_BLOCKS: tl.constexpr = (I + 127) // 128
    N_BLOCKS: tl.constexpr = (H + 127) // 128
    k = tl.arange(0, BK)
    scales = ws + expert * N_BLOCKS * K_BLOCKS
    rows = h + at_row[:, None] * I + k[None, :]
    left = tl.zeros((BN, BM) if SWAP else (BM, BN), dtype=tl.float32)
    right = tl.zeros((BN, BM) if SWAP else (BM, BN), dtype=tl.float32)
    for step in range(0, STEPS * SPAN):
        at = (part * STEPS + step % STEPS) * BK
        first = START + (column * SPAN + step // STEPS) * WIDTH
        n = first + tl.arange(0, BN)
        if WHOLE_K:
            a = tl.load(rows + at, mask=real[:, None], other=0.0)
        else:
            a = tl.load(rows + at, mask=real[:, None] & (k < I - at)[None, :], other=0.0)
        b = _weight_tile(w, descriptor, expert * H + first, at, n, END, I, BN, BK, WHOLE, TMA)
        if KIND == _BLOCK_SCALES:
            # Beyond the end a tile reads some scale for columns that are not stored, beyond I one for zeros.
            block = tl.minimum(first // 128, N_BLOCKS - 1)
            k_block = tl.minimum(at // 128, K_BLOCKS - 1)
            scale = tl.load(hs + at_row * K_BLOCKS + at // 128, mask=real & (at < I), other=0.0)
            left = _added(left, a, b, scale * tl.load(scales + block * K_BLOCKS + k_block), SWAP, True)
        else:
            left = _added(left, a, b, 0.0, SWAP, False)
        if TWICE:
            if FENCE:
                left = _finished(left)
            b = _weight_tile(w, descriptor, expert * H + first + BN, at, n + BN, END, I, BN, BK, WHOLE, TMA)
            if KIND == _BLOCK_SCALES:
                block = tl.minimum((first + BN) // 128, N_BLOCKS - 1)
                right = _added(right, a, b, scale * tl.load(scales + block * K_BLOCKS + k_block), SWAP, True)
            else:
                right = _added(right, a, b, 0.0, SWAP, False)
        if SPAN > 1:  # noqa: SIM102  # known when it is compiled
            if step % STEPS == STEPS - 1:
                _store_rows(
                    out, left, hs, a2, ws, bias, part, expert, pair, at_row, real, n, END, H, KIND, PER_TENSOR, SWAP
                )
                left = tl.zeros_like(left)
                if TWICE:
                    _store_rows(
                        out, right, hs, a2, ws, bias, part, expert, pair, at_row, real, n + BN, END, H, KIND,
                        PER_TENSOR, SWAP,
                    )  # fmt: skip
                    right = tl.zeros_like(right)
    if SPAN == 1:
        n = START + column * WIDTH + tl.arange(0, BN)
        _store_rows(out, left, hs, a2, ws, bias, part, expert, pair, at_row, real, n, END, H, KIND, PER_TENSOR, SWAP)
        if TWICE:
            _store_rows(
                out, right, hs, a2, ws, bias, part, expert, pair, at_row, real, n + BN, END, H, KIND, PER_TENSOR, SWAP
            )


@triton.jit
def _store_rows(
    out, y, hs, a2, ws, bias, part, expert, pair, at_row, real, n, end, H: tl.constexpr, KIND: tl.constexpr,
    PER_TENSOR: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    if SWAP:
        y = tl.trans(y)
    if (KIND == _ROW_SCALES) | (KIND == _STATIC):
        if KIND == _ROW_SCALES:
            of_row = tl.load(hs + at_row, mask=real, other=0.0)
        else:
            of_row = tl.load(a2 + expert) + tl.zeros_like(at_row).to(tl.float32)
        y *= of_row[:, None] * _weight_scale(ws, expert, 0, n, H, H, 1, PER_TENSOR)[None, :]
    if bias is not None:
        y += tl.load(bias + expert * H + n, mask=(n < end) & (part == 0), other=0.0)[None, :]
    tl.store(out + pair[:, None] * H + n[None, :], y.to(out.dtype.element_ty), mask=real[:, None] & (n < end)[None, :])


@dataclass(frozen=True)
class Config:
    """Tiles and launch options. `bm`: pairs of a tile, which GEMM2 may split in `split2`. `swap`: weights are the left
    operand, which tensor cores want when a tile has few pairs. `bn`: columns of a tile; GEMM1 has as many of gate and
    of up, GEMM2 twice as many with `twice`, and `span` such tiles in one program. `group`: tiles that go through all
    columns together. `split_k`: parts of GEMM2's sum, for so few tiles that they don't fill the chip. `tma`: weights
    come by the tensor memory accelerator. `pdl`: programmatic dependent launch.
    """

    bm: int
    swap: bool
    bn1: int
    bk1: int
    warps1: int
    stages1: int
    bn2: int
    bk2: int
    warps2: int
    stages2: int
    twice: bool = False
    span: int = 1
    split2: int = 1
    split_k: int = 1
    group: int = 8
    tma: bool = False
    pdl: bool = False

    def check(self, quant: QuantKind) -> None:
        """Raises ConfigError for sizes with which the kernels would compute something else, or not be built at all."""
        sizes = {"bm": self.bm, "bn1": self.bn1, "bk1": self.bk1, "bn2": self.bn2, "bk2": self.bk2}
        for name, size in sizes.items():
            if size not in (16, 32, 64, 128, 256):
                raise ConfigError(f"config.{name}", size, "tiles are powers of two", "16 to 256")
        if not 1 <= self.split2 <= self.bm // 16 or self.bm % self.split2:
            raise ConfigError("config.split2", self.split2, f"cuts {self.bm} pairs into tiles of 16 and more")
        for name, count in (("span", self.span), ("split_k", self.split_k), ("group", self.group)):
            if not 1 <= count <= 64:
                raise ConfigError(f"config.{name}", count, "counts something", "1 to 64")
        for gemm, warps, stages in ((1, self.warps1, self.stages1), (2, self.warps2, self.stages2)):
            if warps not in (1, 2, 4, 8, 16):
                raise ConfigError(f"config.warps{gemm}", warps, "warps of a program", (1, 2, 4, 8, 16))
            if not 1 <= stages <= 8:
                raise ConfigError(f"config.stages{gemm}", stages, "tiles under way at once", "1 to 8")
        if quant == "fp8_block":
            for name in ("bn1", "bk1", "bk2"):
                if sizes[name] != BLOCK:
                    raise ConfigError(f"config.{name}", sizes[name], "one scale block of fp8_block", (BLOCK,))
            if self.bn2 > BLOCK:
                raise ConfigError("config.bn2", self.bn2, "at most one scale block of fp8_block", f"16 to {BLOCK}")


def fused_moe(
    x: Activations,
    slots_RK: Tensor,
    weights_RK: Tensor,
    experts: ExpertWeights,
    activation: str,
    config: Config,
    out_dtype: torch.dtype,
) -> Tensor:
    """[R, H] in `out_dtype`, the weighted sum over the experts that are here: TokenRows through ExpertWeights, as a
    step of its own."""
    step, rows = Step(Workspace(slots_RK.device)), TokenRows(x, slots_RK, weights_RK)
    sink = Whole(step, (len(slots_RK), experts.hidden), out_dtype, slots_RK.device, lasting=True)
    TritonPipeline(step, rows, experts, config, {}).run(activation, sink)
    return sink.y


class TritonPipeline(Pipeline):
    def __init__(
        self,
        step: Step,
        rows: TokenRows,
        experts: ExpertWeights,
        config: Config,
        tiles: dict[tuple[int, int, int], Any],
    ) -> None:
        """`tiles` keeps the descriptors of these weights from call to call."""
        super().__init__(step, rows, experts, config.bm, config.pdl, config.split_k)
        self.config, self.tiles = config, tiles

    def gemm1(self, values: Tensor, scales: Tensor, activation: str) -> None:
        experts, config = self.experts, self.config
        self.launch(
            _gemm1,
            (self.entries * cdiv(experts.width, config.bn1), 1, 1),
            (
                *(values, scales, experts.w13_eFH, *map(self.or_nothing, (experts.s13, experts.a13, experts.a2))),
                *(experts.b13_eF, *self.lists, self.h, self.hs),
                self._tiles(1, experts.w13_eFH, config.bn1, config.bk1),
            ),
            (self.entries,),
            (
                *(experts.hidden, experts.width, self.slots_RK.shape[1], self.kind, self.per_tensor),
                *(ACTIVATIONS[activation], experts.gate_first, config.swap, config.group, config.tma),
                *(config.bm, config.bn1, config.bk1, FP8_MAX, TINY, FENCE),
            ),
            (config.warps1, config.stages1),
        )

    def gemm2(self, start: int, stop: int) -> None:
        experts, config = self.experts, self.config
        columns = cdiv(stop - start, config.bn2 * (2 if config.twice else 1) * config.span)
        self.launch(
            _gemm2,
            (self.entries * config.split2 * columns, config.split_k, 1),
            (
                *(self.h, self.hs, experts.w2_eHi, *map(self.or_nothing, (experts.s2, experts.a2))),
                *(experts.b2_eH, *self.lists, self.out, self._tiles(2, experts.w2_eHi, config.bn2, config.bk2)),
            ),
            (self.entries, self.pairs, start),
            (
                *(experts.hidden, experts.width, stop - start, self.kind, self.per_tensor),
                *(config.swap, config.group, config.tma),
                *(config.split2, config.bm // config.split2, config.bn2, config.twice, config.span, config.bk2),
                *(config.split_k, FENCE),
            ),
            (config.warps2, config.stages2),
        )

    def _tiles(self, gemm: int, weights: Tensor, bn: int, bk: int) -> Any:
        """A matrix of all experts' rows for the tensor memory accelerator, if that brings them."""
        if not self.config.tma:
            return self.hs
        if (gemm, bn, bk) not in self.tiles:
            self.tiles[gemm, bn, bk] = TensorDescriptor.from_tensor(weights.view(-1, weights.shape[-1]), [bn, bk])
        return self.tiles[gemm, bn, bk]
