"""One-sided: each rank stores rows into the memory of those that need them, and partial sums come back the same way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_dist.comm.symmetric import Aside
from moe_dist.exchange.base import Exchange
from moe_dist.exchange.nvlink.engines import columns_ahead, rows_are_copied
from moe_dist.exchange.nvlink.replicated import NvlinkReplicated
from moe_dist.exchange.nvlink.sinks import Ahead, Returning
from moe_dist.exchange.nvlink.window import Ends, Regions, Visit, begin, served_here
from moe_dist.exchange.rows import activations_of, parts_of, payload_row_bytes, row_specs, sorting_specs
from moe_dist.machine.machine import Machine
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import Activations, QuantizedRows
from moe_dist.model.routing import Routing
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import MoESpec, TokenLayout
from moe_dist.step import Routes, Step, Support, Take, TensorSpec, TokenRows


class Nvlink(Exchange[Visit, Returning | Ahead]):
    """For GPUs of one host. A token's row goes once to each rank that holds one of its experts, to a place that nobody
    needs to count, and one partial sum comes back from each. Flags in the peers' memory say that they are there."""

    token_layout: TokenLayout = "sharded"
    capturable = True
    needs_bucket = True
    every_token = False
    makes = ("token", "expert")

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._ends = Ends.of(self.comm)
        self._known: dict[int, Regions] = {}
        self._last: Visit | None = None
        self._row_bytes = payload_row_bytes(self.spec, self.payload) - 8 * self.spec.top_k
        self._gapless = 0  # columns of the last step's sums that went by copies

    @classmethod
    def supports(cls, spec: MoESpec, placement: Placement, machine: Machine) -> Support:
        return served_here(spec, placement, machine)

    @classmethod
    def for_layout(cls, token_layout: TokenLayout) -> type[Exchange[Any, Any]]:
        return NvlinkReplicated if token_layout == "replicated" else cls

    @classmethod
    def wire_bytes(cls, spec: MoESpec, placement: Placement, tokens: int, payload: str, combine_itemsize: int) -> int:
        """The worst case: every token goes to every other rank that top-k can reach, or copies go to all, and sums go
        back for all tokens of all others."""
        shard, others = cdiv(tokens, placement.world), placement.world - 1
        pairs, sums = 8 * spec.top_k, spec.hidden * combine_itemsize
        row = payload_row_bytes(spec, payload) - pairs
        reached = min(others, spec.top_k * placement.tp)
        leaving = others if rows_are_copied(placement.world, shard, row) else reached
        return shard * (pairs * others + row * leaving + sums * others)

    @classmethod
    def scratch(
        cls, spec: MoESpec, placement: Placement, payload: str, dtype: torch.dtype, bucket: int
    ) -> list[TensorSpec]:
        rows = placement.world * bucket
        served: TensorSpec = ((bucket, placement.world), torch.int8)
        by_expert = sorting_specs(spec, placement, rows)
        return [*row_specs(spec, payload, bucket), served, *by_expert, ((rows, spec.hidden), dtype)]

    @classmethod
    def window_bytes(cls, spec: MoESpec, placement: Placement, payload: str, dtype: torch.dtype, bucket: int) -> int:
        return sum(Regions.of(spec, placement.world, payload, dtype, bucket).sizes)

    def dispatch(self, step: Step, x: Activations, routing: Routing) -> tuple[TokenRows, Visit]:
        bucket = self.check_bucket(routing.tokens, step.bucket)
        with step.stages("dispatch"):
            regions = self._regions(bucket)
            window = self.comm.window(*regions.sizes)
            served_TW = step.workspace.take((routing.tokens, self.comm.world), torch.int8)
            came = [window.view(at, *form) for at, form in zip(regions.row_starts, regions.rows, strict=True)]
            ahead = columns_ahead(self.spec, self.placement, bucket, self.sums_dtype.itemsize)
            copies = Aside(self.comm.device)
            visit = Visit(window, regions, bucket, ahead, routing.tokens, served_TW, came[-2], copies)
            arrivals, quantize = None, self._quantizes(x)
            if bucket:
                from moe_dist.exchange.nvlink import row_kernels

                begin(window, self.comm)
                copied = self._copies(bucket)
                row_kernels.send_rows(visit, parts_of(x), self.placement, routing, self._ends, copied, quantize)
                arrivals = row_kernels.arrivals(visit, self._ends) if copied else None
            self._last, self._gapless = visit, 0
            rows = QuantizedRows(came[0], came[1]) if quantize else activations_of(x, came[:-2])
            return TokenRows(rows, *came[-2:], arrivals=arrivals), visit

    def _quantizes(self, x: Activations) -> bool:
        """Whether these tokens are quantized by the launch that sends them."""
        return self.payload == "fp8" and isinstance(x, Tensor)

    def to_payload(self, step: Step, x: Activations, routing: Routing) -> Activations:
        """Few rows stay as they are: they are quantized as they are sent."""
        from moe_dist.exchange.nvlink.row_kernels import few_rows

        bucket = self.check_bucket(routing.tokens, step.bucket)
        plain = self.spec.quant == "fp8_block" and self.spec.dtype == "bf16" and not self._copies(bucket)
        if plain and isinstance(x, Tensor) and few_rows(bucket, self.spec.hidden):
            return x
        return super().to_payload(step, x, routing)

    def arrived(self, step: Step, rows: TokenRows, handle: Visit) -> TokenRows:
        if rows.arrivals is None:
            return rows
        from moe_dist.exchange.nvlink import row_kernels

        with step.stages("dispatch"):
            row_kernels.await_copies(handle, self._ends)
        return replace(rows, arrivals=None)

    def payload_room(self, step: Step, tokens: int) -> Take:
        """In the window, where this rank's own rows are computed from."""
        bucket = self.check_bucket(tokens, step.bucket)
        if not bucket:
            return super().payload_room(step, tokens)
        regions = self._regions(bucket)
        window, starts = self.comm.window(*regions.sizes), iter(regions.row_starts)
        return lambda shape, dtype: window.view(next(starts), shape, dtype)

    def _copies(self, bucket: int) -> bool:
        return rows_are_copied(self.comm.world, bucket, self._row_bytes)

    def stored_bytes(self) -> int:
        """A token's slots and weights go to every other rank, its row to those that compute it, whose sums come from
        there; this rank's sums go to the others' tokens. Copies go to all others."""
        visit, rank, world = self._last, self.comm.rank, self.comm.world
        if visit is None:
            return 0
        others = [other for other in range(world) if other != rank]
        leaving = visit.tokens * len(others)
        if not self._copies(visit.bucket):
            leaving = int(visit.served_TW[:, others].sum())
        computed = int((visit.slots_RK >= 0).any(1).view(world, visit.bucket)[1:].sum())
        sums = visit.bucket * len(others) * self._gapless + computed * (self.spec.hidden - self._gapless)
        everyone = visit.bucket * 8 * self.spec.top_k * len(others)
        return everyone + leaving * self._row_bytes + sums * self.sums_dtype.itemsize

    def _regions(self, bucket: int) -> Regions:
        found = self._known.get(bucket)
        if found is None:
            given = self.spec, self.comm.world, self.payload, self.sums_dtype, bucket
            found = self._known[bucket] = Regions.of(*given)
        return found

    def sink(self, step: Step, rows: TokenRows, handle: Visit, dtype: torch.dtype) -> Returning | Ahead:
        shape, ahead = (len(rows), self.spec.hidden), handle.ahead.columns
        at = handle.sums_at + (self.comm.rank * self.spec.hidden + ahead) * handle.bucket * dtype.itemsize
        routes = Routes(handle.window.addresses_W, at, handle.bucket, dtype, 1, ahead, self.spec.hidden)
        if ahead:
            return Ahead(step, shape, dtype, handle, self.comm.rank, routes)
        return Returning(step, shape, dtype, self.comm.device, routes)

    def combine(self, step: Step, sink: Returning | Ahead, handle: Visit) -> Tensor:
        from moe_dist.exchange.nvlink import sum_kernels

        with step.stages("combine"):
            y_TH = torch.empty(handle.tokens, self.spec.hidden, dtype=sink.dtype, device=self.comm.device)
            if handle.bucket:
                unsent, own, self._gapless = sink.finish()
                handle.copies.join()
                if unsent is not None:
                    sum_kernels.send_sums(handle, unsent, self._ends)
                sum_kernels.add_sums(handle, own, self._gapless, y_TH, self._ends)
                handle.window.open = False
            return y_TH
