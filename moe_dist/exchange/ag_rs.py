"""All-gather the tokens, reduce-scatter the partial sums: static shapes, and on a few GPUs with a large top-k hardly
more bytes than an all-to-all."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.exchange.base import Exchange
from moe_dist.exchange.rows import gather_specs, gather_tokens, payload_row_bytes, sorting_specs
from moe_dist.kernels import slots_on
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import Activations
from moe_dist.model.routing import Routing
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import MoESpec, TokenLayout
from moe_dist.step import Step, TensorSpec, TokenRows, Whole


class AllGatherReduceScatter(Exchange[int, Whole]):
    """Every rank sees every row, padded to the bucket, and picks the slots it holds. The handle is the number of this
    rank's tokens."""

    token_layout: TokenLayout = "sharded"
    capturable = True
    needs_bucket = True
    every_token = True
    makes = ("token", "expert")

    @classmethod
    def wire_bytes(cls, spec: MoESpec, placement: Placement, tokens: int, payload: str, combine_itemsize: int) -> int:
        shard = cdiv(tokens, placement.world)
        row = payload_row_bytes(spec, payload) + spec.hidden * combine_itemsize
        return shard * row * (placement.world - 1)

    @classmethod
    def scratch(
        cls, spec: MoESpec, placement: Placement, payload: str, dtype: torch.dtype, bucket: int
    ) -> list[TensorSpec]:
        rows = placement.world * bucket
        return [
            *gather_specs(spec, placement, payload, bucket),
            ((rows, spec.top_k), torch.int32),  # slots
            *sorting_specs(spec, placement, rows),
            ((rows, spec.hidden), dtype),
        ]

    def dispatch(self, step: Step, x: Activations, routing: Routing) -> tuple[TokenRows, int]:
        bucket = self.check_bucket(routing.tokens, step.bucket)
        with step.stages("dispatch"):
            x_all, all_routing = gather_tokens(step, self.comm, x, routing, bucket)
            slots_RK = slots_on(self.placement, self.comm.rank, all_routing.ids_TK, bucket, step.workspace.take)
            return TokenRows(x_all, slots_RK, all_routing.weights_TK), routing.tokens

    def sink(self, step: Step, rows: TokenRows, handle: int, dtype: torch.dtype) -> Whole:
        alone = self.comm.world == 1  # then the sums are the result
        return Whole(step, (len(rows), self.spec.hidden), dtype, self.comm.device, lasting=alone)

    def combine(self, step: Step, sink: Whole, handle: int) -> Tensor:
        with step.stages("combine"):
            return self.comm.reduce_scatter(sink.y)[:handle]
