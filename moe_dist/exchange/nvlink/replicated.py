"""Tokens that every rank has: nothing to dispatch, and the partial sums are added up through NVLink in two steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_dist.comm.symmetric import Symmetric
from moe_dist.exchange.base import Exchange
from moe_dist.exchange.nvlink.sinks import Returning
from moe_dist.exchange.nvlink.window import FIRST_BYTES, Ends, served_here
from moe_dist.exchange.rows import sorting_specs
from moe_dist.kernels import slots_on
from moe_dist.machine.machine import Machine
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import Activations
from moe_dist.model.routing import Routing
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import MoESpec, TokenLayout
from moe_dist.step import Routes, Step, Support, TensorSpec, TokenRows


@dataclass(frozen=True)
class Reduction:
    """One step: rank r adds up the sums of `share` tokens from r · share on. Every rank stores its own there, in the
    first area of r's window as [source, share, H]. The second area has the totals [share, H], which all others read."""

    window: Symmetric
    tokens: int
    share: int
    hidden: int
    dtype: torch.dtype

    @property
    def sums_at(self) -> int:
        """Where each rank's window has the sums that come in, in bytes."""
        return FIRST_BYTES

    @property
    def totals_at(self) -> int:
        return self.window.starts[1]


class NvlinkReplicated(Exchange[Reduction, Returning]):
    """`nvlink` for replicated tokens: an all-reduce whose first half is the weighted sum's own stores."""

    token_layout: TokenLayout = "replicated"
    capturable = True
    needs_bucket = False
    every_token = True
    makes = ("token", "expert")

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._ends = Ends.of(self.comm)
        self._tokens = 0  # of the last step

    @classmethod
    def supports(cls, spec: MoESpec, placement: Placement, machine: Machine) -> Support:
        return served_here(spec, placement, machine)

    @classmethod
    def wire_bytes(cls, spec: MoESpec, placement: Placement, tokens: int, payload: str, combine_itemsize: int) -> int:
        """Of the first rank, which has a whole share: sums of all others' tokens, and its totals to each of them."""
        share, others = cdiv(tokens, placement.world), placement.world - 1
        return (tokens - min(share, tokens) + share * others) * spec.hidden * combine_itemsize

    @classmethod
    def scratch(
        cls, spec: MoESpec, placement: Placement, payload: str, dtype: torch.dtype, bucket: int
    ) -> list[TensorSpec]:
        slots: TensorSpec = ((bucket, spec.top_k), torch.int32)
        return [slots, *sorting_specs(spec, placement, bucket), ((bucket, spec.hidden), dtype)]

    @classmethod
    def window_bytes(cls, spec: MoESpec, placement: Placement, payload: str, dtype: torch.dtype, bucket: int) -> int:
        return sum(_sizes(spec.hidden, placement.world, dtype, bucket))

    def dispatch(self, step: Step, x: Activations, routing: Routing) -> tuple[TokenRows, Reduction]:
        sizes = _sizes(self.spec.hidden, self.comm.world, self.sums_dtype, routing.tokens)
        share = cdiv(routing.tokens, self.comm.world)
        with step.stages("dispatch"):
            slots_TK = slots_on(self.placement, self.comm.rank, routing.ids_TK, step.bucket, step.workspace.take)
        handle = Reduction(self.comm.window(*sizes), routing.tokens, share, self.spec.hidden, self.sums_dtype)
        self._tokens = routing.tokens
        return TokenRows(x, slots_TK, routing.weights_TK), handle

    def stored_bytes(self) -> int:
        share, rank, world = cdiv(self._tokens, self.comm.world), self.comm.rank, self.comm.world
        own = max(0, min(share, self._tokens - rank * share))
        return (self._tokens - own + own * (world - 1)) * self.spec.hidden * self.sums_dtype.itemsize

    def sink(self, step: Step, rows: TokenRows, handle: Reduction, dtype: torch.dtype) -> Returning:
        at = handle.sums_at + self.comm.rank * handle.share * self.spec.hidden * dtype.itemsize
        next_rank = (self.comm.rank + 1) % self.comm.world
        columns = 0, self.spec.hidden
        routes = Routes(handle.window.by_rank_W, at, handle.share, dtype, next_rank, *columns, every=True)
        return Returning(step, (len(rows), self.spec.hidden), dtype, self.comm.device, routes)

    def combine(self, step: Step, sink: Returning, handle: Reduction) -> Tensor:
        from moe_dist.exchange.nvlink import reduce_kernels

        with step.stages("combine"):
            y_TH = torch.empty(handle.tokens, self.spec.hidden, dtype=sink.dtype, device=self.comm.device)
            if handle.tokens:
                unsent, *_ = sink.finish()
                if unsent is not None:
                    reduce_kernels.send_shares(handle, unsent, self._ends)
                reduce_kernels.add_share(handle, self._ends)
                reduce_kernels.gather_shares(handle, y_TH, self._ends)
            return y_TH


def _sizes(hidden: int, world: int, dtype: torch.dtype, tokens: int) -> tuple[int, int]:
    """Of the window's areas: sums that come in, behind the header, and totals."""
    totals = cdiv(tokens, world) * hidden * dtype.itemsize
    return FIRST_BYTES + world * totals, totals
