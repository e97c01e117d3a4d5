"""All-gather the tokens, reduce-scatter the partial sums: static shapes, and on a few GPUs with a large top-k hardly
more bytes than an all-to-all."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moe_dist.exchange.base import Exchange, Handle, gather_tokens, payload_row_bytes
from moe_dist.kernels import slots_on
from moe_dist.placement import Placement
from moe_dist.quantization import Activations
from moe_dist.routing import Routing
from moe_dist.rows import TokenRows
from moe_dist.spec import MoESpec, TokenLayout


class AllGatherReduceScatter(Exchange):
    """Every rank sees every row, padded to the bucket, and picks the slots it holds."""

    token_layout: ClassVar[TokenLayout] = "sharded"
    capturable = True
    needs_bucket = True
    every_token = True

    @classmethod
    def wire_bytes(cls, spec: MoESpec, placement: Placement, tokens: int, payload: str, combine_itemsize: int) -> int:
        shard = -(-tokens // placement.world)
        row = payload_row_bytes(spec, payload) + spec.hidden * combine_itemsize
        return shard * row * (placement.world - 1)

    def dispatch(self, x: Activations, routing: Routing, bucket: int | None = None) -> tuple[TokenRows, Handle]:
        bucket = self.check_bucket(routing.tokens, bucket)
        x = self.to_payload(x, routing)
        with self.stages("dispatch"):
            x_all, all_routing = gather_tokens(self.comm, x, routing, bucket)
            slots_RK = slots_on(self.placement, self.comm.rank, all_routing.ids_TK, sharded=bucket)
            return TokenRows(x_all, slots_RK, all_routing.weights_TK), Handle(routing.tokens)

    def combine(self, y_RH: Tensor, handle: Handle) -> Tensor:
        with self.stages("combine"):
            return self.comm.reduce_scatter(y_RH)[: handle.tokens]
