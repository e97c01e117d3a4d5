"""Which rows go to which rank, and rows on their way: plain torch on a CPU, Triton on a GPU, equal results on both.

`take` says where results lie on a GPU (step.workspace.Take).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.sizes import row_bytes
from moe_dist.step.workspace import Take


class SendLists(NamedTuple):
    """For each of W target ranks up to `bucket` (B) tokens in their own order; places behind the last are padding.

    order_TW int32: the place of token t in the list of rank w, -1 if w does not get it. token_WB int32, -1 in padding.
    pairs_WPM int32 [W, B + 1, 2·K]: for each place its K slots on rank w (-1 elsewhere and in padding) and the bits of
    its K float32 weights (0 there); the last place holds the number of tokens in the list, first.
    counts_W int32: that number.
    """

    order_TW: Tensor
    token_WB: Tensor
    pairs_WPM: Tensor
    counts_W: Tensor


class Traffic(NamedTuple):
    """Rows under way. `send`: those for the other ranks, in the order of ranks. `receive`: a buffer for what comes from
    all ranks; in its front lie already this rank's rows for itself, which need not travel, and behind them there is
    room for those of the others, in the order of ranks."""

    send: Tensor
    receive: Tensor


class EvenLists(NamedTuple):
    """The same where all places travel and nobody asks how many are real: slots int32 and weights float32 [S, K] of
    S = (W - 1)·B places to send and W·B to receive, as the targets will use them."""

    order_TW: Tensor
    token_WB: Tensor
    slots: Traffic
    weights: Traffic


def take_sends(rows: Tensor, token_WB: Tensor, counts_W: Tensor | None, rank: int, take: Take) -> Traffic:
    """The rows [T, ...] of a SendLists' tokens, FP8 too: [(W - 1)·B, ...] to send and [W·B, ...] to receive. With
    `counts_W` one list begins right behind the other, without it each takes B rows. What rows of padding, and those at
    the end, hold is undefined."""
    if rows.is_cuda:
        from moe_dist.exchange.all_to_all.row_kernels import take_sends as kernel

        return Traffic(*kernel(rows, token_WB, counts_W, rank, take))
    world, bucket = token_WB.shape
    if not len(rows):
        return Traffic(*(rows.new_empty(ranks * bucket, *rows.shape[1:]) for ranks in (world - 1, world)))
    send, receive = _traffic(rows[token_WB.clamp_min(0)], rank)
    if counts_W is not None:
        real = (torch.arange(bucket, device="cpu")[None] < _of_others(counts_W, rank)[:, None]).flatten()
        send = torch.cat([send[real], send[~real]])
    return Traffic(send, receive)


def unpack_pairs(pairs_WPM: Tensor, rows: int, rank: int, take: Take) -> tuple[Tensor, Tensor]:
    """slots_RK int32 and weights_RK float32 from what W ranks sent of their SendLists' `pairs`: as many as each list's
    number says, one list behind the other, `rank`'s own first, `rows` in all."""
    if pairs_WPM.is_cuda:
        from moe_dist.exchange.all_to_all.list_kernels import unpack_pairs as kernel

        return kernel(pairs_WPM, rows, rank, take)
    top_k = pairs_WPM.shape[2] // 2
    pairs_WPM = torch.cat([pairs_WPM[rank, None], _of_others(pairs_WPM, rank)])
    kept_WB = torch.arange(pairs_WPM.shape[1] - 1, device="cpu")[None] < pairs_WPM[:, -1, :1]
    slots_RK, weights_RK = pairs_WPM[:, :-1][kept_WB].split(top_k, 1)
    return slots_RK.contiguous(), weights_RK.contiguous().view(torch.float32)


def sum_rows(
    back_SH: Tensor, own_RH: Tensor, order_TW: Tensor, counts_W: Tensor | None, bucket: int, rank: int
) -> Tensor:
    """y[t] = sum over w of the row at order[t, w] of what rank w computed, added in float32 in the order of w, in the
    dtype of `back`; an order of -1 adds nothing. `own` begins with what this rank computed for itself; `back` holds
    that of the others, one behind another, each as many rows as its count says, or `bucket` without counts. No atomics:
    the same bits in every run."""
    if back_SH.is_cuda:
        from moe_dist.exchange.all_to_all.row_kernels import sum_rows as kernel

        return kernel(back_SH, own_RH, order_TW, counts_W, bucket, rank)
    y_TH = torch.zeros(order_TW.shape[0], back_SH.shape[1], dtype=torch.float32, device="cpu")
    start = 0
    for w, order_T in enumerate(order_TW.unbind(1)):
        token = (order_T >= 0).nonzero()[:, 0]
        rows = own_RH if w == rank else back_SH[start:]
        y_TH[token] += rows[order_T[token]].float()
        start += 0 if w == rank else bucket if counts_W is None else int(counts_W[w])
    return y_TH.to(back_SH.dtype)


def _traffic(lists_WB: Tensor, rank: int) -> Traffic:
    receive = torch.empty_like(lists_WB)
    receive[0] = lists_WB[rank]
    return Traffic(_of_others(lists_WB, rank).flatten(0, 1), receive.flatten(0, 1))


def _of_others(by_rank: Tensor, rank: int) -> Tensor:
    return torch.cat([by_rank[:rank], by_rank[rank + 1 :]])


def send_lists(placement: Placement, routing: Routing, rank: int, bucket: int, take: Take) -> SendLists:
    """What `rank` sends to whom: each token once to every rank that serves one of its pairs."""
    if routing.ids_TK.is_cuda:
        from moe_dist.exchange.all_to_all.list_kernels import send_lists as kernel

        return SendLists(*kernel(placement, routing, rank, bucket, take))
    order_TW, token_WB, slots_WBK, weights_WBK, counts_W = _send_lists_torch(placement, routing, rank, bucket)
    pairs_WBM = torch.cat([slots_WBK, weights_WBK.view(torch.int32)], 2)
    lengths_W1M = pairs_WBM.new_zeros(len(pairs_WBM), 1, pairs_WBM.shape[2])
    lengths_W1M[:, 0, 0] = counts_W
    return SendLists(order_TW, token_WB, torch.cat([pairs_WBM, lengths_W1M], 1), counts_W)


def even_lists(placement: Placement, routing: Routing, rank: int, bucket: int, take: Take) -> EvenLists:
    """What `rank` sends to whom where all lists are as long as the bucket."""
    if routing.ids_TK.is_cuda:
        from moe_dist.exchange.all_to_all.list_kernels import even_lists as kernel

        order_TW, token_WB, *lists = kernel(placement, routing, rank, bucket, take)
        return EvenLists(order_TW, token_WB, Traffic(*lists[:2]), Traffic(*lists[2:]))
    order_TW, token_WB, *lists, _ = _send_lists_torch(placement, routing, rank, bucket)
    return EvenLists(order_TW, token_WB, *(_traffic(of_rank, rank) for of_rank in lists))


def packed_sends(
    placement: Placement, routing: Routing, parts: list[Tensor], rank: int, bucket: int, take: Take
) -> tuple[Traffic, Tensor]:
    """The rows that `even_lists` names, as they travel when there are few: int32 words [S, row], a row being its parts,
    its K slots and its K weights one behind another; and order_TW. Rows of padding have slots of -1 and weights of 0;
    what else they hold is undefined. `parts` are [T, ...] with rows of whole words.
    """
    if routing.ids_TK.is_cuda:
        from moe_dist.exchange.all_to_all.list_kernels import packed_sends as kernel

        send, receive, order_TW = kernel(placement, routing, parts, rank, bucket, take)
        return Traffic(send, receive), order_TW
    lists = even_lists(placement, routing, rank, bucket, take)
    taken = [take_sends(part.flatten(1).view(torch.int32), lists.token_WB, None, rank, take) for part in parts]
    bits = Traffic(*(weights.view(torch.int32) for weights in lists.weights))
    send, receive = (torch.cat(columns, 1) for columns in zip(*taken, lists.slots, bits, strict=True))
    return Traffic(send, receive), lists.order_TW


def unpack_rows(wire_SW: Tensor, parts: list[Tensor], top_k: int, take: Take) -> list[Tensor]:
    """The rows of `packed_sends` as tensors of their own: parts like `parts`, slots_SK, weights_SK."""
    if wire_SW.is_cuda:
        from moe_dist.exchange.all_to_all.list_kernels import unpack_rows as kernel

        return kernel(wire_SW, parts, top_k, take)
    widths = [*(row_bytes(part) // 4 for part in parts), top_k, top_k]
    pieces = [piece.clone(memory_format=torch.contiguous_format) for piece in torch.split(wire_SW, widths, 1)]
    *taken, slots_SK, weights = pieces
    rows = [piece.view(part.dtype).view(len(piece), *part.shape[1:]) for piece, part in zip(taken, parts, strict=True)]
    return [*rows, slots_SK, weights.view(torch.float32)]


def _send_lists_torch(
    placement: Placement, routing: Routing, rank: int, bucket: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """order_TW, token_WB, slots_WBK, weights_WBK, counts_W."""
    tokens, top_k = routing.ids_TK.shape
    world = placement.world
    row_T = torch.arange(tokens, device="cpu")
    groups_TK = placement.serving_groups(routing.ids_TK, row_T, torch.full_like(row_T, rank))
    slots_TK = placement.slots_served(routing.ids_TK, groups_TK)
    here_WTK = groups_TK[None] == (torch.arange(world, device="cpu") // placement.tp)[:, None, None]
    wanted_WT = here_WTK.any(-1)
    order_WT = (wanted_WT.cumsum(1) - 1).masked_fill(~wanted_WT, -1)
    token_WB = torch.full((world, bucket), -1, dtype=torch.int32, device="cpu")
    slots_WBK = torch.full((world, bucket, top_k), -1, dtype=torch.int32, device="cpu")
    weights_WBK = torch.zeros(world, bucket, top_k, dtype=torch.float32, device="cpu")
    target, token = wanted_WT.nonzero(as_tuple=True)
    place = (target, order_WT[target, token])
    token_WB[place] = token.to(torch.int32)
    slots_WBK[place] = slots_TK[token].masked_fill(~here_WTK[target, token], -1)
    weights_WBK[place] = routing.weights_TK[token].masked_fill(~here_WTK[target, token], 0.0)
    counts_W = wanted_WT.sum(1).to(torch.int32)
    return order_WT.T.to(torch.int32).contiguous(), token_WB, slots_WBK, weights_WBK, counts_W
