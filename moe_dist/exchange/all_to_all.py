"""Each token goes once to each rank that holds one of its experts, and one partial sum comes back from each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moe_dist.exchange.base import Exchange, Handle, activations_of, parts_of, payload_row_bytes
from moe_dist.kernels import packed_sends, row_bytes, send_lists, sum_rows, take_rows, unpack_rows
from moe_dist.placement import Placement
from moe_dist.quantization import Activations
from moe_dist.routing import Routing
from moe_dist.rows import TokenRows
from moe_dist.spec import MoESpec, TokenLayout

EVEN_UP_TO = 64  # tokens a rank; so few that padding is cheaper than asking the host for split sizes. Not tuned yet.


@dataclass(frozen=True)
class _Sent:
    """`order_TW[t, w]`: the place of token t among the rows sent to rank w, -1 if it gets none."""

    order_TW: Tensor
    counts_W: Tensor | None  # None: splits are even
    send: list[int]
    receive: list[int]


class AllToAll(Exchange):
    """Two ways to split, chosen alike on all ranks from the agreed bucket.

    Uneven: ranks tell each other how many rows will come, on the host, and exactly these rows move. Even: every rank
    sends every other `bucket` rows, padded with slot -1; static shapes and no host sync, so it can be captured in a
    CUDA graph, and it is also quicker for few tokens.
    """

    token_layout: ClassVar[TokenLayout] = "sharded"
    capturable = True
    needs_bucket = True
    every_token = False

    @classmethod
    def wire_bytes(cls, spec: MoESpec, placement: Placement, tokens: int, payload: str, combine_itemsize: int) -> int:
        """The worst case: every token goes to every other rank that top-k can reach, or splits are even."""
        shard = -(-tokens // placement.world)
        reached = placement.world if shard <= EVEN_UP_TO else min(placement.world, spec.top_k * placement.tp)
        row = payload_row_bytes(spec, payload) + spec.hidden * combine_itemsize
        return shard * row * min(reached, placement.world - 1)

    def splits_evenly(self, bucket: int) -> bool:
        return self.static or bucket <= EVEN_UP_TO

    def dispatch(self, x: Activations, routing: Routing, bucket: int | None = None) -> tuple[TokenRows, Handle]:
        bucket = self.check_bucket(routing.tokens, bucket)
        x = self.to_payload(x)
        with self.stages("dispatch"):
            parts = parts_of(x)
            if bucket <= EVEN_UP_TO and all(row_bytes(part) % 4 == 0 for part in parts):
                return self._dispatch_packed(x, parts, routing, bucket)
            lists = send_lists(self.placement, routing, self.comm.rank, bucket)
            splits = None if self.splits_evenly(bucket) else self.comm.exchange_counts(lists.counts_W)
            token_S, slots_SK, weights_SK = (part.flatten(0, 1) for part in lists[1:4])
            parts = [take_rows(part, token_S) for part in parts]
            send = receive = [bucket] * self.comm.world
            if splits is not None:  # the device gathers rows while the host waits for the splits
                send, receive = splits()
            *received, slots_RK, weights_RK = self.comm.all_to_all(
                [*parts, slots_SK, weights_SK], send, receive, stride=None if splits is None else bucket
            )
            rows = TokenRows(activations_of(x, received), slots_RK, weights_RK)
            counts_W = None if splits is None else lists.counts_W
            return rows, Handle(routing.tokens, _Sent(lists.order_TW, counts_W, send, receive))

    def _dispatch_packed(
        self, x: Activations, parts: list[Tensor], routing: Routing, bucket: int
    ) -> tuple[TokenRows, Handle]:
        """Few tokens, where launches cost more than bytes: one collective for all that belongs to a row."""
        even = [bucket] * self.comm.world
        wire, order_TW = packed_sends(self.placement, routing, parts, self.comm.rank, bucket)
        (received,) = self.comm.all_to_all([wire], even, even)
        *rows, slots_RK, weights_RK = unpack_rows(received, parts, self.spec.top_k)
        handle = Handle(routing.tokens, _Sent(order_TW, None, even, even))
        return TokenRows(activations_of(x, rows), slots_RK, weights_RK), handle

    def combine(self, y_RH: Tensor, handle: Handle) -> Tensor:
        with self.stages("combine"):
            sent: _Sent = handle.notes
            (back_SH,) = self.comm.all_to_all([y_RH], sent.receive, sent.send)
            return sum_rows(back_SH, sent.order_TW, sent.counts_W, sent.send[0])
