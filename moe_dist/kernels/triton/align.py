"""Pairs sorted by expert, stably, into what class Pipeline names `starts`, `stops`, `order` and `table`, beside the
quantizing of the rows: few pairs in one launch (`_prepare`), many in two (`_count`, `_place`)."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from moe_dist.kernels.triton.quantize import quantized


@triton.jit(do_not_specialize=["R", "ENTRIES"])
def _prepare(
    slots, x, q, s, table, starts, stops, order, taken,
    R, ENTRIES,
    E: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr, TOGETHER: tl.constexpr,
    FP8_MAX: tl.constexpr, TINY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first E programs sort the pairs by expert, the others quantize rows by groups of 128."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    if pid < E:
        _align(slots, table, starts, stops, order, taken, pid, R * K, ENTRIES, E, BM, BLOCK)
    else:
        _quantize(x, q, s, pid - E, R, H, TOGETHER, FP8_MAX, TINY)


@triton.jit(do_not_specialize=["R", "CHUNKS"])
def _count(
    slots, x, q, s, counts, ranks, taken,
    R, LENGTH, CHUNKS,
    K: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, H: tl.constexpr,
    TOGETHER: tl.constexpr, FP8_MAX: tl.constexpr, TINY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first CHUNKS programs count LENGTH pairs each, the others quantize rows by groups of 128."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    if pid < CHUNKS:
        if pid == 0:
            tl.store(taken + tl.arange(0, 2), 0)
        _count_chunk(slots, counts, ranks, pid, R * K, LENGTH, WIDE, BLOCK, TILE)
    else:
        _quantize(x, q, s, pid - CHUNKS, R, H, TOGETHER, FP8_MAX, TINY)


@triton.jit(do_not_specialize=["R", "ENTRIES", "CHUNKS"])
def _place(
    slots, counts, ranks, table, starts, stops, order,
    R, ENTRIES, LENGTH, CHUNKS,
    E: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One chunk's pairs into `order`, and a part of `table`. Every program adds up the counts of all chunks, ROWS at a
    time: nobody waits for anybody."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    chunk = tl.program_id(0)
    expert = tl.arange(0, WIDE)
    row = tl.arange(0, ROWS)
    of_all = tl.zeros((ROWS, WIDE), tl.int32)
    of_earlier = tl.zeros((ROWS, WIDE), tl.int32)
    for at in tl.range(0, CHUNKS, ROWS, num_stages=3):
        there = (at + row < CHUNKS)[:, None]
        found = tl.load(counts + (at + row)[:, None] * WIDE + expert[None, :], mask=there, other=0)
        of_all += found
        of_earlier += tl.where((at + row < chunk)[:, None], found, 0)
    count = tl.sum(of_all, 0)
    stop = tl.cumsum(count, 0)
    start = stop - count
    if chunk == 0:
        tl.store(starts + expert, start, mask=expert < E)
        tl.store(stops + expert, stop, mask=expert < E)

    base = (start // BM + expert)[None, :]
    used = base + ((count + BM - 1) // BM)[None, :]
    for at in range(chunk * 16, ENTRIES, CHUNKS * 16):
        entry = at + tl.arange(0, 16)
        inside = (base <= entry[:, None]) & (entry[:, None] < used)
        tl.store(table + entry, tl.max(tl.where(inside, expert[None, :], -1), 1), mask=entry < ENTRIES)

    first = start + tl.sum(of_earlier, 0)
    end = tl.minimum((chunk + 1) * LENGTH, R * K)
    for at in range(chunk * LENGTH, end, BLOCK):
        pair = at + tl.arange(0, BLOCK)
        slot = tl.load(slots + pair, mask=pair < end, other=-1)
        rank = tl.load(ranks + pair, mask=pair < end, other=0)
        tl.store(order + tl.gather(first, tl.maximum(slot, 0), 0) + rank, pair, mask=slot >= 0)


@triton.jit(do_not_specialize=["R", "ENTRIES"])
def _tables(
    x, q, s, starts, stops, table, taken, R, ENTRIES, E: tl.constexpr, BM: tl.constexpr, H: tl.constexpr,
    TOGETHER: tl.constexpr, FP8_MAX: tl.constexpr, TINY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """For pairs that came sorted: the first E programs write the table of tiles, the others quantize rows by groups of
    128."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    if pid < E:
        before = tl.load(starts + pid)
        _expert_tiles(table, taken, pid, before, tl.load(stops + pid) - before, ENTRIES, E, BM)
    else:
        _quantize(x, q, s, pid - E, R, H, TOGETHER, FP8_MAX, TINY)


@triton.jit
def _expert_tiles(table, taken, expert, before, count, ENTRIES, E: tl.constexpr, BM: tl.constexpr):
    """One expert's part of `table`: its number for each tile of its pairs, -1 up to the next expert's part."""
    if expert == 0:
        tl.store(taken + tl.arange(0, 2), 0)
    base = before // BM + expert
    used = base + (count + BM - 1) // BM
    end = (before + count) // BM + expert + 1
    if expert == E - 1:
        end = ENTRIES
    for at in range(base, end, 128):
        entry = at + tl.arange(0, 128)
        tl.store(table + entry, tl.where(entry < used, expert, -1), mask=entry < end)


@triton.jit
def _align(
    slots, table, starts, stops, order, taken, expert, P, ENTRIES, E: tl.constexpr, BM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One expert's part of `order` and of `table`. It counts all that comes before itself: nobody waits for anybody."""
    lane = tl.arange(0, BLOCK)
    lower = tl.zeros((BLOCK,), tl.int32)
    equal = tl.zeros((BLOCK,), tl.int32)
    for at in range(0, P, BLOCK):
        slot = tl.load(slots + at + lane, mask=at + lane < P, other=-1)
        lower += ((slot >= 0) & (slot < expert)).to(tl.int32)
        equal += (slot == expert).to(tl.int32)
    before = tl.sum(lower, 0)
    count = tl.sum(equal, 0)
    tl.store(starts + expert, before)
    tl.store(stops + expert, before + count)
    _expert_tiles(table, taken, expert, before, count, ENTRIES, E, BM)
    if count > 0:
        for at in range(0, P, BLOCK):
            slot = tl.load(slots + at + lane, mask=at + lane < P, other=-1)
            mine = (slot == expert).to(tl.int32)
            tl.store(order + before + tl.cumsum(mine, 0) - 1, at + lane, mask=mine > 0)
            before += tl.sum(mine, 0)


@triton.jit
def _count_chunk(
    slots, counts, ranks, chunk, P, LENGTH, WIDE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """counts[chunk]: the chunk's pairs of each expert. ranks[pair]: how many of them come before it, with its expert.
    A block's pairs are compared with each other, TILE at a time, and ranks begin at the counts of the blocks before."""
    lane, j = tl.arange(0, BLOCK), tl.arange(0, TILE)
    count = tl.zeros((WIDE,), tl.int32)
    end = tl.minimum((chunk + 1) * LENGTH, P)
    for at in range(chunk * LENGTH, end, BLOCK):
        slot = tl.load(slots + at + lane, mask=at + lane < end, other=-1)
        rank = tl.gather(count, tl.maximum(slot, 0), 0)
        ahead = lane
        for tile in range(at, at + BLOCK, TILE):
            other = tl.load(slots + tile + j, mask=tile + j < end)  # beyond `end` none comes before a pair: any value
            equal = (other[:, None] == slot[None, :]) & (j[:, None] < ahead[None, :])
            rank += tl.sum(equal.to(tl.int32), 0)
            ahead -= TILE
        tl.store(ranks + at + lane, rank, mask=at + lane < end)
        count += tl.histogram(slot, WIDE, mask=slot >= 0)
    tl.store(counts + chunk * WIDE + tl.arange(0, WIDE), count)


@triton.jit
def _quantize(
    x, q, s, part, R, H: tl.constexpr, TOGETHER: tl.constexpr, FP8_MAX: tl.constexpr, TINY: tl.constexpr
):  # fmt: skip
    """TOGETHER groups of 128, counted through all rows."""
    GROUPS: tl.constexpr = (H + 127) // 128
    group = part * TOGETHER + tl.arange(0, TOGETHER)
    row = (group // GROUPS).to(tl.int64)[:, None]
    column = (group % GROUPS)[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = (row < R) & (column < H)
    values = tl.load(x + row * H + column, mask=inside, other=0.0).to(tl.float32)
    codes, scale = quantized(values, tl.max(tl.abs(values), 1), FP8_MAX, TINY)
    tl.store(q + row * H + column, codes.to(q.dtype.element_ty), mask=inside)
    tl.store(s + group, scale, mask=group < R * GROUPS)
