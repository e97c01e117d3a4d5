"""Each token goes once to each rank that holds one of its experts, and one partial sum comes back from each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_dist.exchange.all_to_all import splits as splitting
from moe_dist.exchange.all_to_all.lists import (
    Traffic,
    even_lists,
    packed_sends,
    send_lists,
    sum_rows,
    take_sends,
    unpack_pairs,
    unpack_rows,
)
from moe_dist.exchange.base import Exchange
from moe_dist.exchange.rows import activations_of, pair_specs, parts_of, room_for, row_specs, sorting_specs
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import Activations
from moe_dist.model.routing import Routing
from moe_dist.model.sizes import cdiv, row_bytes
from moe_dist.model.spec import MoESpec, TokenLayout
from moe_dist.step import Step, TensorSpec, TokenRows, Whole

PACKED_UP_TO = 256  # tokens a rank: packing spares collectives and costs a copy of all rows


@dataclass(frozen=True)
class Sent:
    """What went where. `order_TW[t, w]`: the place of token t among the rows for rank w, -1 if it gets none."""

    order_TW: Tensor
    counts_W: Tensor | None  # None: splits are even
    own: int  # rows for this rank itself, the first of those computed; they don't travel
    send: list[int]
    receive: list[int]


class AllToAll(Exchange[Sent, Whole]):
    """Two ways to split, chosen alike on all ranks from the agreed bucket and the model's routing rule.

    Exact: ranks tell each other how many rows will come, and exactly these rows move. Even: every rank sends every
    other `bucket` rows, padded with slot -1; static shapes and no host sync, so it can be captured in a CUDA graph, and
    outside of one it is quicker while the padding is small (splits.py).

    `padding_up_to`: outside of a graph, how many bytes of padding a step may move in vain before exact splits are worth
    their wait. One number on all ranks.

    Rows for the rank itself are gathered straight to where they are computed, and their sums added from there: NCCL
    would copy them once more, there and back.
    """

    padding_up_to: float = splitting.PADDING_UP_TO  # bytes

    token_layout: TokenLayout = "sharded"
    capturable = True
    needs_bucket = True
    every_token = False
    makes = ("token", "expert")

    @classmethod
    def wire_bytes(cls, spec: MoESpec, placement: Placement, tokens: int, payload: str, combine_itemsize: int) -> int:
        """The worst case: every token goes to every other rank that top-k can reach, or splits are even; lists with a
        length behind them, which only exact splits have."""
        shard, others = cdiv(tokens, placement.world), placement.world - 1
        even = shard * splitting.padding_bytes(spec, placement, payload) <= cls.padding_up_to
        reached = others if even else min(others, spec.top_k * placement.tp)
        rows = shard * splitting.there_and_back_bytes(spec, payload, combine_itemsize) * reached
        return rows + (shard + 1) * 8 * spec.top_k * others

    @classmethod
    def scratch(
        cls, spec: MoESpec, placement: Placement, payload: str, dtype: torch.dtype, bucket: int
    ) -> list[TensorSpec]:
        world, others = placement.world, placement.world - 1
        sent, received = row_specs(spec, payload, others * bucket), row_specs(spec, payload, world * bucket)
        places = [((bucket, world), torch.int32), ((world, bucket), torch.int32)]
        own = row_specs(spec, payload, bucket)  # quantized
        pairs = [*pair_specs(spec, others * bucket), *pair_specs(spec, world * bucket)]
        lists: list[TensorSpec] = [
            ((world, bucket + 1, 2 * spec.top_k), torch.int32),
            ((world,), torch.int32),
        ]  # exact ones
        packed = received if bucket <= PACKED_UP_TO else []  # as they come, and taken apart
        sums: list[TensorSpec] = [((world * bucket, spec.hidden), dtype), ((others * bucket, spec.hidden), dtype)]
        by_expert = sorting_specs(spec, placement, world * bucket)
        return [*own, *places, *pairs, *lists, *sent, *received, *packed, *by_expert, *sums]

    def splits(self, bucket: int, captured: bool) -> str:
        """Either "even" or "exact"; see above."""
        return "even" if captured or bucket * self._padding <= self.padding_up_to else "exact"

    @cached_property
    def _padding(self) -> float:
        return splitting.padding_bytes(self.spec, self.placement, self.payload)

    def dispatch(self, step: Step, x: Activations, routing: Routing) -> tuple[TokenRows, Sent]:
        bucket = self.check_bucket(routing.tokens, step.bucket)
        with step.stages("dispatch"):
            if self.splits(bucket, step.captured) == "exact":
                return self._dispatch_exactly(step, x, routing, bucket)
            if bucket <= PACKED_UP_TO and all(row_bytes(part) % 4 == 0 for part in parts_of(x)):
                return self._dispatch_packed(step, x, routing, bucket)
            return self._dispatch_evenly(step, x, routing, bucket)

    def _dispatch_exactly(self, step: Step, x: Activations, routing: Routing, bucket: int) -> tuple[TokenRows, Sent]:
        """Rows cross when the host knows how many; slots and weights are small and cross padded, with the numbers."""
        rank, take = self.comm.rank, step.workspace.take
        lists = send_lists(self.placement, routing, rank, bucket, take)
        one_each = [1] * self.comm.world
        leaving_pairs = lists.pairs_WPM.flatten(1)
        (pairs,) = self.comm.all_to_all([leaving_pairs], one_each, one_each)
        pairs_WPM = pairs.view(lists.pairs_WPM.shape)
        counts = self.comm.to_host(torch.stack([lists.counts_W, pairs_WPM[:, -1, 0]]))
        # Room for the most rows that can come: only so can they be gathered while the host waits for the numbers.
        taken = [take_sends(part, lists.token_WB, lists.counts_W, rank, take) for part in parts_of(x)]
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
        slots_RK, weights_RK = unpack_pairs(pairs_WPM, own + coming, rank, take)
        return TokenRows(received, slots_RK, weights_RK), Sent(lists.order_TW, lists.counts_W, own, send, receive)

    def _dispatch_evenly(self, step: Step, x: Activations, routing: Routing, bucket: int) -> tuple[TokenRows, Sent]:
        """All that belongs to a row in one group of collectives, each part to where it will be used."""
        rank, take = self.comm.rank, step.workspace.take
        lists = even_lists(self.placement, routing, rank, bucket, take)
        taken = [take_sends(part, lists.token_WB, None, rank, take) for part in parts_of(x)]
        sent = self._swap([*taken, lists.slots, lists.weights], lists.order_TW, bucket)
        received = activations_of(x, [part.receive for part in taken])
        return TokenRows(received, lists.slots.receive, lists.weights.receive), sent

    def _dispatch_packed(self, step: Step, x: Activations, routing: Routing, bucket: int) -> tuple[TokenRows, Sent]:
        """The same for few tokens, where launches cost more than bytes: one collective for all of a row."""
        take = step.workspace.take
        wire, order_TW = packed_sends(self.placement, routing, parts_of(x), self.comm.rank, bucket, take)
        sent = self._swap([wire], order_TW, bucket)
        *rows, slots_RK, weights_RK = unpack_rows(wire.receive, parts_of(x), self.spec.top_k, take)
        return TokenRows(activations_of(x, rows), slots_RK, weights_RK), sent

    def _swap(self, traffic: list[Traffic], order_TW: Tensor, bucket: int) -> Sent:
        even = [bucket] * self.comm.world
        even[self.comm.rank] = 0
        self.comm.all_to_all(
            [part.send for part in traffic], even, even, into=[part.receive[bucket:] for part in traffic]
        )
        return Sent(order_TW, None, bucket, even, even)

    def sink(self, step: Step, rows: TokenRows, handle: Sent, dtype: torch.dtype) -> Whole:
        return Whole(step, (len(rows), self.spec.hidden), dtype, self.comm.device)

    def combine(self, step: Step, sink: Whole, handle: Sent) -> Tensor:
        with step.stages("combine"):
            y_RH = sink.y
            leaving, most = y_RH[handle.own :], sum(handle.send)
            (back_SH,) = self.comm.all_to_all(
                [leaving], handle.receive, handle.send, into=room_for(step, [leaving], most)
            )
            return sum_rows(back_SH, y_RH, handle.order_TW, handle.counts_W, handle.own, self.comm.rank)
