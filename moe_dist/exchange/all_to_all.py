"""Each token goes once to each rank that holds one of its experts, and one partial sum comes back from each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from moe_dist.exchange.base import Exchange, Handle, activations_of, parts_of, payload_row_bytes
from moe_dist.kernels import (
    Traffic,
    even_lists,
    packed_sends,
    send_lists,
    sum_rows,
    take_sends,
    unpack_pairs,
    unpack_rows,
)
from moe_dist.placement import Placement
from moe_dist.quantization import Activations
from moe_dist.routing import Routing, route
from moe_dist.rows import TokenRows
from moe_dist.sizes import row_bytes
from moe_dist.spec import MoESpec, TokenLayout
from moe_dist.streams import Stream

# Tokens a rank. Packing spares a collective and costs a copy of all rows.
EVEN_UP_TO = 1024
PACKED_UP_TO = 256
# Bytes. On a GPU a host that learns exact splits stands still until the device has told it, and what it launches next
# comes late: 0.06 to 0.43 ms a step, 0.25 in the mean, by the uniform eager rows recorded on two H200s at 6f94570 with
# exact and at 68ce4c0 with even splits. 117 MB of padding took 0.43 ms longer than that (8,192 tokens, limited:2x1,
# flashinfer_cutlass: even in benchmarks/2026-11-23-h200x2.json, exact in -limited.json), so about this much is worth
# the wait. On a CPU there is nothing to wait for.
PADDING_UP_TO = 45_000_000
DRAWN = 4096  # tokens, fewer where experts or ranks are so many that this would take seconds
MOST_DRAWN = 1 << 25  # numbers


@dataclass(frozen=True)
class _Sent:
    """`order_TW[t, w]`: the place of token t among the rows for rank w, -1 if it gets none."""

    order_TW: Tensor
    counts_W: Tensor | None  # None: splits are even
    own: int  # rows for this rank itself, the first of those computed; they don't travel
    send: list[int]
    receive: list[int]


class AllToAll(Exchange):
    """Two ways to split, chosen alike on all ranks from the agreed bucket and the model's routing rule.

    Exact: ranks tell each other how many rows will come, and exactly these rows move. Even: every rank sends every
    other `bucket` rows, padded with slot -1; static shapes and no host sync, so it can be captured in a CUDA graph, and
    outside of one it is quicker while the padding is small.

    Rows for the rank itself are gathered straight to where they are computed, and their sums added from there: NCCL
    would copy them once more, there and back.
    """

    token_layout: ClassVar[TokenLayout] = "sharded"
    capturable = True
    needs_bucket = True
    every_token = False

    @classmethod
    def wire_bytes(cls, spec: MoESpec, placement: Placement, tokens: int, payload: str, combine_itemsize: int) -> int:
        """The worst case: every token goes to every other rank that top-k can reach, or splits are even; lists with a
        length behind them, which only exact splits have."""
        shard, others = -(-tokens // placement.world), placement.world - 1
        even = pads(shard, padding_bytes(spec, placement, payload))
        reached = others if even else min(others, spec.top_k * placement.tp)
        return shard * _row_bytes(spec, payload, combine_itemsize) * reached + (shard + 1) * 8 * spec.top_k * others

    def splits(self, bucket: int) -> str:
        """Either "even" or "exact"; see above."""
        return "even" if self.static or pads(bucket, self._padding) else "exact"

    @cached_property
    def _padding(self) -> float:
        cuda = self.comm.device.type == "cuda"
        return padding_bytes(self.spec, self.placement, self.payload) if cuda else inf

    def dispatch(self, x: Activations, routing: Routing, bucket: int | None = None) -> tuple[TokenRows, Handle]:
        bucket = self.check_bucket(routing.tokens, bucket)
        x = self.to_payload(x, routing)
        with self.stages("dispatch"):
            parts = parts_of(x)
            if bucket <= PACKED_UP_TO and all(row_bytes(part) % 4 == 0 for part in parts):
                return self._dispatch_packed(x, parts, routing, bucket)
            if self.splits(bucket) == "even":
                return self._dispatch_evenly(x, parts, routing, bucket)
            return self._dispatch_exactly(x, parts, routing, bucket)

    def _dispatch_exactly(
        self, x: Activations, parts: list[Tensor], routing: Routing, bucket: int
    ) -> tuple[TokenRows, Handle]:
        """Rows cross when the host knows how many; slots and weights are small and cross padded, with the numbers."""
        rank = self.comm.rank
        lists = send_lists(self.placement, routing, rank, bucket)
        one_each = [1] * self.comm.world
        (pairs,) = self.comm.all_to_all([lists.pairs_WPM.flatten(1)], one_each, one_each)
        pairs_WPM = pairs.view(lists.pairs_WPM.shape)
        counts = self.comm.to_host(torch.stack([lists.counts_W, pairs_WPM[:, -1, 0]]))
        # Room for the most rows that can come: only so can they be gathered while the host waits for the numbers, and
        # buffers of one size spare the allocator its search.
        taken = [take_sends(part, lists.token_WB, lists.counts_W, rank) for part in parts]
        send, receive = counts()  # while the device gathers rows
        own, send[rank], receive[rank] = send[rank], 0, 0
        leaving, coming = sum(send), sum(receive)
        self.comm.all_to_all(
            [part.send[:leaving] for part in taken],
            send,
            receive,
            into=[part.receive[own : own + coming] for part in taken],
        )
        received = activations_of(x, [part.receive[: own + coming] for part in taken])
        slots_RK, weights_RK = unpack_pairs(pairs_WPM, own + coming, rank)
        sent = _Sent(lists.order_TW, lists.counts_W, own, send, receive)
        return TokenRows(received, slots_RK, weights_RK), Handle(routing.tokens, sent)

    def _dispatch_evenly(
        self, x: Activations, parts: list[Tensor], routing: Routing, bucket: int
    ) -> tuple[TokenRows, Handle]:
        """All that belongs to a row in one group of collectives, each part to where it will be used."""
        lists = even_lists(self.placement, routing, self.comm.rank, bucket)
        taken = [take_sends(part, lists.token_WB, None, self.comm.rank) for part in parts]
        sent = self._swap([*taken, lists.slots, lists.weights], lists.order_TW, bucket)
        received = activations_of(x, [part.receive for part in taken])
        return TokenRows(received, lists.slots.receive, lists.weights.receive), Handle(routing.tokens, sent)

    def _swap(self, traffic: list[Traffic], order_TW: Tensor, bucket: int) -> _Sent:
        even = [bucket] * self.comm.world
        even[self.comm.rank] = 0
        self.comm.all_to_all(
            [part.send for part in traffic], even, even, into=[part.receive[bucket:] for part in traffic]
        )
        return _Sent(order_TW, None, bucket, even, even)

    def _dispatch_packed(
        self, x: Activations, parts: list[Tensor], routing: Routing, bucket: int
    ) -> tuple[TokenRows, Handle]:
        """Few tokens, where launches cost more than bytes: one collective for all that belongs to a row."""
        wire, order_TW = packed_sends(self.placement, routing, parts, self.comm.rank, bucket)
        sent = self._swap([wire], order_TW, bucket)
        *rows, slots_RK, weights_RK = unpack_rows(wire.receive, parts, self.spec.top_k)
        return TokenRows(activations_of(x, rows), slots_RK, weights_RK), Handle(routing.tokens, sent)

    def combine(self, y_RH: Tensor, handle: Handle) -> Tensor:
        with self.stages("combine"):
            sent: _Sent = handle.notes
            (back_SH,) = self.comm.all_to_all([y_RH[sent.own :]], sent.receive, sent.send)
            return sum_rows(back_SH, y_RH, sent.order_TW, sent.counts_W, sent.own, self.comm.rank)


def pads(bucket: int, padding: float) -> bool:
    """Whether even splits are the quicker ones; `padding` as `padding_bytes` says."""
    return bucket <= EVEN_UP_TO or bucket * padding <= PADDING_UP_TO


def padding_bytes(spec: MoESpec, placement: Placement, payload: str) -> float:
    """What even splits are expected to move in vain for one token of a rank: rows there and back."""
    others = placement.world - 1
    return (others - expected_targets(spec, placement)) * _row_bytes(spec, payload, spec.torch_dtype.itemsize)


def _row_bytes(spec: MoESpec, payload: str, combine_itemsize: int) -> int:
    """There and back, without its slots and weights."""
    return payload_row_bytes(spec, payload) - 8 * spec.top_k + spec.hidden * combine_itemsize


@cache
def expected_targets(spec: MoESpec, placement: Placement) -> float:
    """How many other ranks a token goes to in the mean if the router's scores are random, under the model's own rule of
    top-k and groups. Drawn from a fixed seed, so that every rank finds the same."""
    drawn = max(16, min(DRAWN, MOST_DRAWN // max(spec.num_experts, spec.top_k * placement.ep)))
    scores_TE = Stream("expected targets").uniform(drawn, spec.num_experts)
    routing = route(scores_TE, spec, torch.zeros_like(scores_TE[0]) if spec.correction_bias else None)
    rows = torch.arange(drawn, device="cpu")
    source = rows % placement.world
    groups_TK = placement.serving_groups(routing.ids_TK, rows, source)
    reached_TG = (groups_TK[..., None] == torch.arange(placement.ep, device="cpu")).any(1)
    targets = placement.tp * int(reached_TG.sum()) - int(reached_TG[rows, source // placement.tp].sum())
    return targets / drawn
