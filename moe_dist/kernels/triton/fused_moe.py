"""The whole FP8 fused MoE of one rank: align, quantize, two grouped GEMMs with the activation between, weighted sum.

Pairs are (token, expert) choices, numbered as in the flattened slots: pair p belongs to row p // K. `order` lists the
pairs that are here by expert; expert e has `starts[e]` to `stops[e]` of it. GEMM1's output has its rows in that order,
GEMM2 writes each row back to its pair, and the last kernel adds a token's pairs up in the order of K: no atomics, equal
bits in every run.

`table` names the expert of each tile of BM rows: expert e's tiles begin at entry starts[e] // BM + e, which leaves room
for every partial tile whatever the counts, so that experts need not wait for each other's; entries between are -1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_dist.errors import ConfigError
from moe_dist.kernels.triton.launch import launch
from moe_dist.kernels.triton.quantize import divided, quantize_rows, quantized, scale_from
from moe_dist.quantization import FP8, FP8_MAX, TINY, Activations, QuantizedRows
from moe_dist.spec import BLOCK, QuantKind
from moe_dist.stages import NO_STAGES, Stages
from moe_dist.weights import ExpertWeights

UNQUANTIZED, BLOCK_SCALES, ROW_SCALES, STATIC = 0, 1, 2, 3  # how a GEMM's input rows are scaled
GROUPS_TOGETHER = 16  # groups of 128 that one program quantizes
MOST_PAIRS_TOGETHER = 4096  # beyond, programs that sort and programs that quantize get into each other's way
FENCE = not triton.knobs.runtime.interpret  # the interpreter has no assembler
ACTIVATIONS = {"swiglu": 0, "geglu": 1, "relu2": 2}


@triton.jit(do_not_specialize=["R", "ENTRIES"])
def _prepare(
    slots, x, q, s, table, starts, stops, order,
    R, ENTRIES,
    E: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr,
    TOGETHER: tl.constexpr, FP8_MAX: tl.constexpr, TINY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first E · PARTS programs sort the pairs by expert, the others quantize rows by groups of 128."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    if pid < E * PARTS:
        _align(slots, table, starts, stops, order, pid // PARTS, pid % PARTS, R * K, ENTRIES, E, PARTS, BM, BLOCK)
    else:
        GROUPS: tl.constexpr = (H + 127) // 128
        CHUNKS: tl.constexpr = (GROUPS + TOGETHER - 1) // TOGETHER
        row = ((pid - E * PARTS) // CHUNKS).to(tl.int64)
        group = (pid - E * PARTS) % CHUNKS * TOGETHER + tl.arange(0, TOGETHER)
        column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
        values = tl.load(x + row * H + column, mask=column < H, other=0.0).to(tl.float32)
        codes, scale = quantized(values, tl.max(tl.abs(values), 1), FP8_MAX, TINY)
        tl.store(q + row * H + column, codes.to(q.dtype.element_ty), mask=column < H)
        tl.store(s + row * GROUPS + group, scale, mask=group < GROUPS)


@triton.jit
def _align(
    slots, table, starts, stops, order, expert, part, P, ENTRIES, E: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One expert's part of `order`, from one of PARTS runs of the pairs, and its part of `table`. It counts all that
    comes before itself: nobody waits for anybody."""
    lane = tl.arange(0, BLOCK)
    first = part * tl.cdiv(P, BLOCK * PARTS) * BLOCK
    last = tl.minimum(first + tl.cdiv(P, BLOCK * PARTS) * BLOCK, P)
    lower = tl.zeros((BLOCK,), tl.int32)
    equal = tl.zeros((BLOCK,), tl.int32)
    earlier = tl.zeros((BLOCK,), tl.int32)
    for at in range(0, P, BLOCK):
        slot = tl.load(slots + at + lane, mask=at + lane < P, other=-1)
        lower += ((slot >= 0) & (slot < expert)).to(tl.int32)
        mine = (slot == expert).to(tl.int32)
        equal += mine
        if PARTS > 1:
            earlier += tl.where(at < first, mine, 0)
    before = tl.sum(lower, 0)
    count = tl.sum(equal, 0)
    if part == 0:
        tl.store(starts + expert, before)
        tl.store(stops + expert, before + count)
        base = before // BM + expert
        used = base + (count + BM - 1) // BM
        end = (before + count) // BM + expert + 1
        if expert == E - 1:
            end = ENTRIES
        for at in range(base, end, 128):
            entry = at + tl.arange(0, 128)
            tl.store(table + entry, tl.where(entry < used, expert, -1), mask=entry < end)
    taken = before + tl.sum(earlier, 0)
    if count > 0:
        for at in range(first, last, BLOCK):
            slot = tl.load(slots + at + lane, mask=at + lane < P, other=-1)
            mine = (slot == expert).to(tl.int32)
            place = taken + tl.cumsum(mine, 0) - 1
            tl.store(order + place, at + lane, mask=mine > 0)
            taken += tl.sum(mine, 0)


@triton.jit
def _activated(gate, up, ACTIVATION: tl.constexpr):
    if ACTIVATION == 0:
        return gate * tl.sigmoid(gate) * up
    elif ACTIVATION == 1:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2 * inner) * up  # 0.5 (1 + tanh z) = sigmoid(2 z)
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
    x, xs, w, ws, a13, a2, table, starts, stops, order, h, hs, descriptor,
    ENTRIES,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, PER_TENSOR: tl.constexpr,
    ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr, SWAP: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FP8_MAX: tl.constexpr, TINY: tl.constexpr,
    FENCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h = act(x · w13ᵀ), as codes where its scales are known, for BM pairs of one expert, BN columns of gate and up."""
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

    GATED: tl.constexpr = ACTIVATION != 2
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
        if KIND == 1:
            scale = tl.load(xs + row * K_BLOCKS + at // 128, mask=real, other=0.0)
            gate = _added(gate, a, b, scale * tl.load(gate_scales + at // 128), SWAP, True)
        else:
            gate = _added(gate, a, b, 0.0, SWAP, False)
        if GATED:
            if FENCE:
                gate = _finished(gate)
            b = _weight_tile(w, descriptor, up_row, at, n, I, H, BN, BK, WHOLE, TMA)
            if KIND == 1:
                up = _added(up, a, b, scale * tl.load(up_scales + at // 128), SWAP, True)
            else:
                up = _added(up, a, b, 0.0, SWAP, False)
    if SWAP:
        gate = tl.trans(gate)
        up = tl.trans(up)
    if KIND >= 2:
        of_row = tl.load(xs + row, mask=real, other=0.0) if KIND == 2 else tl.load(a13) + tl.zeros((BM,), tl.float32)
        gate *= of_row[:, None] * _weight_scale(ws, expert, GATE, n, I, F, 2 if GATED else 1, PER_TENSOR)[None, :]
        if GATED:
            up *= of_row[:, None] * _weight_scale(ws, expert, 1 - GATE, n, I, F, 2, PER_TENSOR)[None, :]
    out = _activated(gate, up, ACTIVATION)
    if not WHOLE:
        out = tl.where((n < I)[None, :], out, 0.0)  # columns read beyond the half must not count in the scale
    at_row = (start + j).to(tl.int64)
    if KIND == 1:
        out, scale_h = quantized(out, tl.max(tl.abs(out), 1), FP8_MAX, TINY)
        tl.store(hs + at_row * N_BLOCKS + column, scale_h, mask=real)
    elif KIND == 3:
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
    h, hs, w, ws, a2, table, starts, stops, order, out, descriptor,
    ENTRIES, P,
    H: tl.constexpr, I: tl.constexpr, KIND: tl.constexpr, PER_TENSOR: tl.constexpr, SWAP: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TWICE: tl.constexpr, SPAN: tl.constexpr, BK: tl.constexpr, SPLIT_K: tl.constexpr, FENCE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[part, pair] = h · w2ᵀ over one of SPLIT_K parts of the sum, for BM pairs of one expert, SPLIT of which make
    one of GEMM1's tiles, and BN columns of H, or twice as many in two products that share their rows: one product so
    wide would need two of its accumulators. SPAN such tiles follow each other in one loop, so that short ones don't
    wait for their first loads and last stores."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    WIDTH: tl.constexpr = 2 * BN if TWICE else BN
    COLUMNS: tl.constexpr = (H + WIDTH * SPAN - 1) // (WIDTH * SPAN)
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
    WHOLE: tl.constexpr = WHOLE_K and H % (WIDTH * SPAN) == 0
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
        first = (column * SPAN + step // STEPS) * WIDTH
        n = first + tl.arange(0, BN)
        if WHOLE_K:
            a = tl.load(rows + at, mask=real[:, None], other=0.0)
        else:
            a = tl.load(rows + at, mask=real[:, None] & (k < I - at)[None, :], other=0.0)
        b = _weight_tile(w, descriptor, expert * H + first, at, n, H, I, BN, BK, WHOLE, TMA)
        if KIND == 1:
            # Beyond H a tile reads some scale for columns that are not stored, beyond I one for zeros.
            block = tl.minimum(first // 128, N_BLOCKS - 1)
            k_block = tl.minimum(at // 128, K_BLOCKS - 1)
            scale = tl.load(hs + at_row * K_BLOCKS + at // 128, mask=real & (at < I), other=0.0)
            left = _added(left, a, b, scale * tl.load(scales + block * K_BLOCKS + k_block), SWAP, True)
        else:
            left = _added(left, a, b, 0.0, SWAP, False)
        if TWICE:
            if FENCE:
                left = _finished(left)
            b = _weight_tile(w, descriptor, expert * H + first + BN, at, n + BN, H, I, BN, BK, WHOLE, TMA)
            if KIND == 1:
                block = tl.minimum((first + BN) // 128, N_BLOCKS - 1)
                right = _added(right, a, b, scale * tl.load(scales + block * K_BLOCKS + k_block), SWAP, True)
            else:
                right = _added(right, a, b, 0.0, SWAP, False)
        if SPAN > 1:  # noqa: SIM102  # known when it is compiled
            if step % STEPS == STEPS - 1:
                _store_rows(out, left, hs, a2, ws, expert, pair, at_row, real, n, H, KIND, PER_TENSOR, SWAP)
                left = tl.zeros_like(left)
                if TWICE:
                    _store_rows(out, right, hs, a2, ws, expert, pair, at_row, real, n + BN, H, KIND, PER_TENSOR, SWAP)
                    right = tl.zeros_like(right)
    if SPAN == 1:
        n = column * WIDTH + tl.arange(0, BN)
        _store_rows(out, left, hs, a2, ws, expert, pair, at_row, real, n, H, KIND, PER_TENSOR, SWAP)
        if TWICE:
            _store_rows(out, right, hs, a2, ws, expert, pair, at_row, real, n + BN, H, KIND, PER_TENSOR, SWAP)


@triton.jit
def _store_rows(
    out, y, hs, a2, ws, expert, pair, at_row, real, n, H: tl.constexpr, KIND: tl.constexpr, PER_TENSOR: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    if SWAP:
        y = tl.trans(y)
    if KIND >= 2:
        if KIND == 2:
            of_row = tl.load(hs + at_row, mask=real, other=0.0)
        else:
            of_row = tl.load(a2 + expert) + tl.zeros_like(at_row).to(tl.float32)
        y *= of_row[:, None] * _weight_scale(ws, expert, 0, n, H, H, 1, PER_TENSOR)[None, :]
    tl.store(out + pair[:, None] * H + n[None, :], y.to(out.dtype.element_ty), mask=real[:, None] & (n < H)[None, :])


@triton.jit
def _weighted_sum(
    out, slots, weights, y, H: tl.constexpr, K: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y[row] = the sum of weight · out over the row's pairs that are here, in float32, in the order of K."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    part = tl.num_programs(0).to(tl.int64) * K * H
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for place in tl.static_range(K):
        pair = row * K + place
        slot = tl.load(slots + pair)
        weight = tl.load(weights + pair)
        at = out + pair * H + column
        value = tl.load(at, mask=inside & (slot >= 0), other=0.0).to(tl.float32)
        for number in tl.static_range(1, SPLIT_K):
            value += tl.load(at + number * part, mask=inside & (slot >= 0), other=0.0).to(tl.float32)
        total += weight * value
    tl.store(y + row * H + column, total.to(y.dtype.element_ty), mask=inside)


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
        """Raises ConfigError for sizes with which the kernels would compute something else."""
        sizes = {"bm": self.bm, "bn1": self.bn1, "bk1": self.bk1, "bn2": self.bn2, "bk2": self.bk2}
        for name, size in sizes.items():
            if size < 16 or size & (size - 1):
                raise ConfigError(f"config.{name}", size, "tiles are powers of two", "16 and more")
        if self.split2 < 1 or self.bm % self.split2 or self.bm // self.split2 < 16:
            raise ConfigError("config.split2", self.split2, f"cuts {self.bm} pairs into tiles of 16 and more")
        for name, count in (("span", self.span), ("split_k", self.split_k), ("group", self.group)):
            if count < 1:
                raise ConfigError(f"config.{name}", count, "counts something", "1 and more")
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
    stages: Stages = NO_STAGES,
    tiles: dict[tuple[int, int, int], Any] | None = None,
) -> Tensor:
    """[R, H] in `out_dtype`, the weighted sum over the experts that are here: TokenRows through ExpertWeights. `tiles`
    keeps the descriptors of these weights from call to call."""
    step = _Step(slots_RK.contiguous(), experts, config, {} if tiles is None else tiles)
    with stages("quantize"):
        values, scales = step.prepare(x)
    with stages("gemm1"):
        step.gemm1(values, scales, activation)
    if step.kind == ROW_SCALES:
        with stages("quantize"):
            step.requantize()
    with stages("gemm2"):
        step.gemm2()
    with stages("combine"):
        return step.weighted_sum(weights_RK.contiguous(), out_dtype)


class _Step:
    """One call's tensors and its launches, in their order."""

    def __init__(
        self, slots_RK: Tensor, experts: ExpertWeights, config: Config, tiles: dict[tuple[int, int, int], Any]
    ) -> None:
        self.slots_RK, self.experts, self.config, self.tiles = slots_RK, experts, config, tiles
        self.kind = {"none": UNQUANTIZED, "fp8_block": BLOCK_SCALES, "fp8_tensor_static": STATIC}.get(
            experts.kind, ROW_SCALES
        )
        self.pairs = slots_RK.numel()
        self.entries = self.pairs // config.bm + experts.num_experts
        P, E, i = self.pairs, experts.num_experts, experts.width
        # A scale for a whole row of h needs another pass over it: until then it waits in bf16.
        codes = FP8 if self.kind in (BLOCK_SCALES, STATIC) else torch.bfloat16
        self.table, self.starts, self.stops, self.order, self.h, self.hs, self.out = _cut(
            slots_RK.device,
            *(((size,), torch.int32) for size in (self.entries, E, E, P)),
            ((P, i), codes),
            ((P, _blocks(i) if self.kind == BLOCK_SCALES else 1), torch.float32),
            ((config.split_k, P, experts.hidden), torch.bfloat16),
        )

    def prepare(self, x: Activations) -> tuple[Tensor, Tensor]:
        """GEMM1's rows and their scales; what is not there, `hs` stands in for."""
        (R, K), E, H = self.slots_RK.shape, self.experts.num_experts, self.experts.hidden
        together, chunks = self.pairs <= MOST_PAIRS_TOGETHER, 0
        if isinstance(x, Tensor) and self.kind != UNQUANTIZED:
            if self.kind == BLOCK_SCALES and together:
                chunks = R * -(-_blocks(H) // GROUPS_TOGETHER)
                wanted = ((R, H), FP8), ((R, _blocks(H)), torch.float32)
                source, x = x.contiguous(), QuantizedRows(*_cut(x.device, *wanted))
            else:
                x = quantize_rows(x, self.experts.kind, self.experts.a13)
        values = (x if isinstance(x, Tensor) else x.values_RH).contiguous()
        scales = self.hs if isinstance(x, Tensor) or x.scales_RS is None else x.scales_RS.contiguous()
        parts = 1 if together else max(1, min(8, 256 // E))  # programs enough for the chip
        block = min(4096, triton.next_power_of_2(max(self.pairs, 16)))
        self._launch(
            _prepare,
            (E * parts + chunks, 1, 1),
            (self.slots_RK, source if chunks else values, values, scales, *self._lists),
            (R, self.entries),
            (E, K, parts, self.config.bm, block, H, GROUPS_TOGETHER, FP8_MAX, TINY),
            (8, 1),
        )
        return values, scales

    def gemm1(self, values: Tensor, scales: Tensor, activation: str) -> None:
        experts, config = self.experts, self.config
        self._launch(
            _gemm1,
            (self.entries * -(-experts.width // config.bn1), 1, 1),
            (
                *(values, scales, experts.w13_eFH, *map(self._or_nothing, (experts.s13, experts.a13, experts.a2))),
                *(*self._lists, self.h, self.hs, self._tiles(1, experts.w13_eFH, config.bn1, config.bk1)),
            ),
            (self.entries,),
            (
                *(experts.hidden, experts.width, self.slots_RK.shape[1], self.kind, self._per_tensor),
                *(ACTIVATIONS[activation], experts.gate_first, config.swap, config.group, config.tma),
                *(config.bm, config.bn1, config.bk1, FP8_MAX, TINY, FENCE),
            ),
            (config.warps1, config.stages1),
        )

    def requantize(self) -> None:
        """h from bf16 to codes with a scale for each row, or one for all."""
        P, i = self.pairs, self.experts.width
        wide = triton.next_power_of_2(i)
        codes, maxima = _cut(self.h.device, ((P, i), FP8), ((P,), torch.float32))
        launch(_row_maxima, (P, 1, 1), (self.h, self.stops, maxima), (), (i, self.experts.num_experts, wide))
        if self.experts.kind == "fp8_tensor_dynamic":
            maxima.copy_(maxima.amax().expand(P))
        launch(_requantize, (P, 1, 1), (self.h, maxima, codes, self.hs), (), (i, wide, FP8_MAX, TINY))
        self.h = codes

    def gemm2(self) -> None:
        experts, config = self.experts, self.config
        columns = -(-experts.hidden // (config.bn2 * (2 if config.twice else 1) * config.span))
        self._launch(
            _gemm2,
            (self.entries * config.split2 * columns, config.split_k, 1),
            (
                *(self.h, self.hs, experts.w2_eHi, *map(self._or_nothing, (experts.s2, experts.a2))),
                *(*self._lists, self.out, self._tiles(2, experts.w2_eHi, config.bn2, config.bk2)),
            ),
            (self.entries, self.pairs),
            (
                *(experts.hidden, experts.width, self.kind, self._per_tensor, config.swap, config.group, config.tma),
                *(config.split2, config.bm // config.split2, config.bn2, config.twice, config.span, config.bk2),
                *(config.split_k, FENCE),
            ),
            (config.warps2, config.stages2),
        )

    def weighted_sum(self, weights_RK: Tensor, out_dtype: torch.dtype) -> Tensor:
        (R, K), H = self.slots_RK.shape, self.experts.hidden
        y = torch.empty(R, H, dtype=out_dtype, device=weights_RK.device)
        block = min(1024, triton.next_power_of_2(H))
        tensors, constants = (self.out, self.slots_RK, weights_RK, y), (H, K, self.config.split_k, block)
        self._launch(_weighted_sum, (R, -(-H // block), 1), tensors, (), constants, (4, 1))
        return y

    def _launch(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        tensors: tuple[Any, ...],
        integers: tuple[int, ...],
        constants: tuple[Any, ...],
        warps_and_stages: tuple[int, int],
    ) -> None:
        """Kernels whose last constant is PDL."""
        pdl = self.config.pdl
        options = dict(zip(("num_warps", "num_stages"), warps_and_stages, strict=True))
        launch(kernel, grid, tensors, integers, (*constants, pdl), **options, **({"launch_pdl": True} if pdl else {}))

    @property
    def _lists(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.table, self.starts, self.stops, self.order

    @property
    def _per_tensor(self) -> bool:
        return self.experts.kind.startswith("fp8_tensor")

    def _or_nothing(self, scales: Tensor | None) -> Tensor:
        return self.hs if scales is None else scales

    def _tiles(self, gemm: int, weights: Tensor, bn: int, bk: int) -> Any:
        """A matrix of all experts' rows for the tensor memory accelerator, if that brings them."""
        if not self.config.tma:
            return self.hs
        if (gemm, bn, bk) not in self.tiles:
            self.tiles[gemm, bn, bk] = TensorDescriptor.from_tensor(weights.view(-1, weights.shape[-1]), [bn, bk])
        return self.tiles[gemm, bn, bk]


def _cut(device: torch.device, *wanted: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
    """Tensors of these shapes and dtypes from one allocation."""
    used = [math.prod(shape) * dtype.itemsize for shape, dtype in wanted]
    sizes = [-(-size // 256) * 256 for size in used]
    pieces = torch.empty(sum(sizes), dtype=torch.uint8, device=device).split(sizes)
    return [
        piece[:size].view(dtype).view(shape) for piece, size, (shape, dtype) in zip(pieces, used, wanted, strict=True)
    ]


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
