"""Exchanges for tokens that every rank has already: nothing to dispatch, the partial sums are added up."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.exchange.base import Exchange
from moe_dist.exchange.rows import sorting_specs
from moe_dist.kernels import slots_on
from moe_dist.machine.machine import Machine
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import Activations
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, TokenLayout
from moe_dist.step import Step, Support, TensorSpec, TokenRows, Whole


class AllReduce(Exchange[None, Whole]):
    """Every rank computes its part of every token; one all-reduce adds the parts."""

    token_layout: TokenLayout = "replicated"
    capturable = True
    needs_bucket = False
    every_token = True
    makes = ("token", "expert")

    @classmethod
    def wire_bytes(cls, spec: MoESpec, placement: Placement, tokens: int, payload: str, combine_itemsize: int) -> int:
        return 2 * tokens * spec.hidden * combine_itemsize * (placement.world - 1) // placement.world

    @classmethod
    def scratch(
        cls, spec: MoESpec, placement: Placement, payload: str, dtype: torch.dtype, bucket: int
    ) -> list[TensorSpec]:
        return [((bucket, spec.top_k), torch.int32), *sorting_specs(spec, placement, bucket)]  # slots

    def dispatch(self, step: Step, x: Activations, routing: Routing) -> tuple[TokenRows, None]:
        with step.stages("dispatch"):
            slots_TK = slots_on(self.placement, self.comm.rank, routing.ids_TK, step.bucket, step.workspace.take)
            return TokenRows(x, slots_TK, routing.weights_TK), None

    def sink(self, step: Step, rows: TokenRows, handle: None, dtype: torch.dtype) -> Whole:
        """The sums are added up where they lie, and are the result."""
        return Whole(step, (len(rows), self.spec.hidden), dtype, self.comm.device, lasting=True)

    def combine(self, step: Step, sink: Whole, handle: None) -> Tensor:
        with step.stages("combine"):
            return self.comm.all_reduce(sink.y)


class Local(AllReduce):
    """One rank alone: no collective at all."""

    @classmethod
    def supports(cls, spec: MoESpec, placement: Placement, machine: Machine) -> Support:
        return Support(placement.world == 1, "" if placement.world == 1 else f"one rank only, not {placement.world}")

    @classmethod
    def wire_bytes(cls, spec: MoESpec, placement: Placement, tokens: int, payload: str, combine_itemsize: int) -> int:
        return 0
