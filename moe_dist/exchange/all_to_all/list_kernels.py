"""Which token goes to which rank, and in what order: the whole preparation of an all-to-all in one launch.

For few tokens one launch also writes the rows themselves, packed as they will travel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.exchange.served import choices, served_by
from moe_dist.kernels.triton.launch import as_bits, launch
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.sizes import cdiv, power_of_2, row_bytes
from moe_dist.step.workspace import Take


def send_lists(
    placement: Placement, routing: Routing, rank: int, bucket: int, take: Take
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See lists.send_lists."""
    world, top_k = placement.world, routing.ids_TK.shape[1]
    pairs_WPM = take((world, bucket + 1, 2 * top_k), torch.int32)
    counts_W = take((world,), torch.int32)
    return *_listed(placement, routing, rank, bucket, (pairs_WPM,) * 4, counts_W, take), pairs_WPM, counts_W


def even_lists(placement: Placement, routing: Routing, rank: int, bucket: int, take: Take) -> tuple[Tensor, ...]:
    """order_TW, token_WB, slots to send and to receive, weights to send and to receive; see lists.even_lists."""
    world, top_k = placement.world, routing.ids_TK.shape[1]
    lists = [
        take((ranks * bucket, top_k), dtype) for dtype in (torch.int32, torch.float32) for ranks in (world - 1, world)
    ]
    return *_listed(placement, routing, rank, bucket, tuple(lists), None, take), *lists


def _listed(
    placement: Placement,
    routing: Routing,
    rank: int,
    bucket: int,
    lists: tuple[Tensor, ...],
    counts_W: Tensor | None,
    take: Take,
) -> tuple[Tensor, Tensor]:
    """order_TW and token_WB. Fills `counts_W` and a SendLists' pairs, or without it the four tensors of even lists."""
    tokens, world = routing.tokens, placement.world
    inputs, sizes, constants = choices(placement, routing, rank)
    order_TW = take((tokens, world), torch.int32)
    token_WB = take((world, bucket), torch.int32)
    look = max(16, min(1024, 8192 // constants[-1], power_of_2(max(tokens, 1))))
    block = min(256, look)
    parts = max(1, cdiv(bucket, block))
    launch(
        _send_lists,
        (parts, world, 1),
        (*inputs, order_TW, token_WB, *lists, token_WB if counts_W is None else counts_W),
        (tokens, bucket, *sizes),
        (*constants, counts_W is not None, parts > 1, look, block),
        num_warps=8,
    )
    return order_TW, token_WB


@triton.jit(do_not_specialize=["rank", "own_group"])
def _send_lists(
    ids, weights, slot_table, group_table, copy_counts, orders, tokens_out, slots_out, slots_own, weights_out,
    weights_own, counts, T, BUCKET, rank, own_group, EXPERTS, COPIES, K: tl.constexpr, TP: tl.constexpr,
    REPLICATED: tl.constexpr, PLACES: tl.constexpr, COUNTED: tl.constexpr, PARTS: tl.constexpr, LOOK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each target rank and each BLOCK of its places and of the tokens. Where there are several, each
    counts by itself what the target takes of all tokens, and of those before its own, in reads that nothing waits for:
    30 us for 8,192 tokens on an H200, where one program for each target that walked them in turn took 74 to 82."""
    part, target = tl.program_id(0), tl.program_id(1)
    world = tl.num_programs(1)
    group = target // TP
    first = part * BLOCK
    before, total = 0, 0
    if PARTS:
        for start in range(0, T, LOOK):
            token = start + tl.arange(0, LOOK)
            _, _, here = served_by(ids, slot_table, group_table, copy_counts, token, T, group, own_group, EXPERTS,
                                    COPIES, K, REPLICATED, PLACES)  # fmt: skip
            wanted = tl.max(here.to(tl.int32), 1)
            total += tl.sum(wanted, 0)
            before += tl.sum(tl.where(token < first, wanted, 0), 0)
    token = first + tl.arange(0, BLOCK)
    at, expert, here = served_by(ids, slot_table, group_table, copy_counts, token, T, group, own_group, EXPERTS,
                                  COPIES, K, REPLICATED, PLACES)  # fmt: skip
    wanted = tl.max(here.to(tl.int32), 1)
    if not PARTS:
        total = tl.sum(wanted, 0)
    order = before + tl.cumsum(wanted, 0) - 1
    takes = wanted > 0
    place = tl.arange(0, PLACES)[None, :]
    PITCH: tl.constexpr = 2 * K if COUNTED else K  # words from a place's slots to the next one's
    if COUNTED:
        slots_out += target.to(tl.int64) * (BUCKET + 1) * PITCH
        bits_out = slots_out + K
        if part == 0:
            tl.store(counts + target, total)
            tl.store(slots_out + BUCKET * PITCH, total)
    elif target == rank:
        slots_out = slots_own
        bits_out = as_bits(weights_own)
    else:
        to_list = (target - (target > rank).to(tl.int32)).to(tl.int64) * BUCKET * K
        slots_out += to_list
        bits_out = as_bits(weights_out) + to_list
    tl.store(orders + token * world + target, tl.where(takes, order, -1), mask=token < T)
    tl.store(tokens_out + target * BUCKET + order, token, mask=takes)
    slot = tl.load(slot_table + group * EXPERTS + expert, mask=here, other=-1)
    weight = tl.load(weights + at, mask=here, other=0.0)
    to = order[:, None] * PITCH + place
    stored = takes[:, None] & (place < K)
    tl.store(slots_out + to, slot, mask=stored)
    tl.store(bits_out + to, weight.to(tl.int32, bitcast=True), mask=stored)
    row = first + tl.arange(0, BLOCK)
    padding = (row >= total) & (row < BUCKET)
    tl.store(tokens_out + target * BUCKET + row, tl.zeros((BLOCK,), tl.int32) - 1, mask=padding)
    to = row[:, None] * PITCH + place
    stored = padding[:, None] & (place < K)
    tl.store(slots_out + to, tl.zeros((BLOCK, PLACES), tl.int32) - 1, mask=stored)
    tl.store(bits_out + to, tl.zeros((BLOCK, PLACES), tl.int32), mask=stored)


def unpack_pairs(pairs_WPM: Tensor, rows: int, rank: int, take: Take) -> tuple[Tensor, Tensor]:
    """See lists.unpack_pairs."""
    world, places, words = pairs_WPM.shape
    top_k, bucket = words // 2, places - 1
    most = world * bucket  # one size for all steps
    slots_RK = take((most, top_k), torch.int32)[:rows]
    weights_RK = take((most, top_k), torch.float32)[:rows]
    if rows:
        padded = power_of_2(top_k)
        block = max(1, min(1024 // padded, power_of_2(bucket)))
        grid = (cdiv(bucket, block), world, 1)
        constants = (top_k, padded, power_of_2(world), block)
        launch(_unpack_pairs, grid, (pairs_WPM, slots_RK, weights_RK), (bucket, rank), constants)
    return slots_RK, weights_RK


@triton.jit(do_not_specialize=["rank"])
def _unpack_pairs(
    pairs, slots, weights, BUCKET, rank, K: tl.constexpr, PLACES: tl.constexpr, SOURCES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    source = tl.program_id(1)
    pitch = (BUCKET + 1) * 2 * K
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, PLACES)[None, :]
    lower = tl.arange(0, SOURCES)
    earlier = (source != rank) & ((lower < source) | (lower == rank)) & (lower < tl.num_programs(1))
    before = tl.load(pairs + lower.to(tl.int64) * pitch + BUCKET * 2 * K, mask=earlier, other=0)
    start = tl.sum(before, 0)
    count = tl.load(pairs + source.to(tl.int64) * pitch + BUCKET * 2 * K)
    inside = (row < count)[:, None] & (place < K)
    at = pairs + source.to(tl.int64) * pitch + row[:, None] * 2 * K + place
    out = (start + row)[:, None].to(tl.int64) * K + place
    tl.store(slots + out, tl.load(at, mask=inside), mask=inside)
    tl.store(weights + out, tl.load(at + K, mask=inside).to(tl.float32, bitcast=True), mask=inside)


def packed_sends(
    placement: Placement, routing: Routing, parts: list[Tensor], rank: int, bucket: int, take: Take
) -> tuple[Tensor, Tensor, Tensor]:
    """The wire to send and to receive, and order_TW; see lists.packed_sends."""
    (tokens, top_k), world = routing.ids_TK.shape, placement.world
    inputs, sizes, constants = choices(placement, routing, rank)
    value_words, scale_words, *_ = (*(row_bytes(part) // 4 for part in parts), 0)
    row_words = value_words + scale_words + 2 * top_k
    send = take(((world - 1) * bucket, row_words), torch.int32)
    receive = take((world * bucket, row_words), torch.int32)
    order_TW = take((tokens, world), torch.int32)
    block = min(2048, power_of_2(value_words))
    launch(
        _packed_sends,
        (bucket, world, cdiv(value_words, block)),
        (*inputs, parts[0].contiguous(), parts[-1].contiguous(), send, receive, order_TW),
        (tokens, *sizes, value_words, scale_words, row_words),
        (*constants, power_of_2(max(tokens, 16)), power_of_2(max(scale_words, 1)), block),
    )
    return send, receive, order_TW


@triton.jit(do_not_specialize=["T", "rank", "own_group"])
def _packed_sends(
    ids, weights, slot_table, group_table, copy_counts, values, scales, send, receive, orders,
    T, rank, own_group, EXPERTS, COPIES, VALUE_WORDS, SCALE_WORDS, ROW_WORDS, K: tl.constexpr, TP: tl.constexpr,
    REPLICATED: tl.constexpr, PLACES: tl.constexpr, TOKENS: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each part of each row. Each looks through all tokens for its own, which for few is quicker than a
    launch that does so for all."""
    target, world = tl.program_id(1), tl.num_programs(1)
    place, part = tl.program_id(0), tl.program_id(2)
    group = target // TP
    token = tl.arange(0, TOKENS)
    _, _, here = served_by(ids, slot_table, group_table, copy_counts, token, T, group, own_group, EXPERTS, COPIES, K,
                            REPLICATED, PLACES)  # fmt: skip
    wanted = tl.max(here.to(tl.int32), 1)
    order = tl.cumsum(wanted, 0) - 1
    takes = wanted > 0
    if (place == 0) & (part == 0):
        tl.store(orders + token * world + target, tl.where(takes, order, -1), mask=token < T)
    mine = tl.max(tl.where(takes & (order == place), token, -1), 0)  # -1: padding
    if target == rank:
        row = receive + place.to(tl.int64) * ROW_WORDS
    else:
        row = send + ((target - (target > rank).to(tl.int32)) * tl.num_programs(0) + place).to(tl.int64) * ROW_WORDS
    values, scales = as_bits(values), as_bits(scales)
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside = column < tl.where(mine >= 0, VALUE_WORDS, 0)
    source = tl.maximum(mine, 0).to(tl.int64)
    tl.store(row + column, tl.load(values + source * VALUE_WORDS + column, mask=inside), mask=inside)
    if part == 0:
        beside = tl.arange(0, SCALES)
        scaled = beside < tl.where(mine >= 0, SCALE_WORDS, 0)
        scale = tl.load(scales + source * SCALE_WORDS + beside, mask=scaled)
        tl.store(row + VALUE_WORDS + beside, scale, mask=scaled)
        pair = tl.arange(0, PLACES)
        real = pair < tl.where(mine >= 0, K, 0)
        chosen = tl.maximum(tl.load(ids + source * K + pair, mask=real, other=0), 0)
        this = token[:, None] == mine  # `here` of this row
        kept = tl.max((this & here).to(tl.int32), 0) > 0
        slot = tl.load(slot_table + group * EXPERTS + chosen, mask=real & kept, other=-1)
        weight = tl.load(weights + source * K + pair, mask=real & kept, other=0.0)
        tail = row + VALUE_WORDS + SCALE_WORDS + pair
        tl.store(tail, slot, mask=pair < K)
        tl.store(tail + K, weight.to(tl.int32, bitcast=True), mask=pair < K)


def unpack_rows(wire_SW: Tensor, parts: list[Tensor], top_k: int, take: Take) -> list[Tensor]:
    """See lists.unpack_rows."""
    rows, row_words = wire_SW.shape
    outs = [take((rows, *part.shape[1:]), part.dtype) for part in parts]
    outs += [take((rows, top_k), torch.int32), take((rows, top_k), torch.float32)]
    if rows:
        long, short, *_ = (*(row_bytes(part) // 4 for part in parts), 0)
        block = min(2048, power_of_2(long))
        launch(
            _unpack_rows,
            (rows, cdiv(long, block), 1),
            (wire_SW, outs[0], outs[1], outs[-2], outs[-1]),
            (row_words, long, short, top_k),
            (power_of_2(max(short, top_k)), block),
        )
    return outs


@triton.jit
def _unpack_rows(wire, long, short, slots, weights, ROW_WORDS, LONG, A, K, SHORT: tl.constexpr, BLOCK: tl.constexpr):
    long, short, weights = as_bits(long), as_bits(short), as_bits(weights)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source = wire + row * ROW_WORDS
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside = column < LONG
    tl.store(long + row * LONG + column, tl.load(source + column, mask=inside), mask=inside)
    if part == 0:
        word = tl.arange(0, SHORT)
        tail = source + LONG + word
        tl.store(short + row * A + word, tl.load(tail, mask=word < A), mask=word < A)
        tl.store(slots + row * K + word, tl.load(tail + A, mask=word < K), mask=word < K)
        tl.store(weights + row * K + word, tl.load(tail + A + K, mask=word < K), mask=word < K)
