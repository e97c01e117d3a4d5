"""One-sided: each rank stores rows into the memory of those that need them, and partial sums come back the same way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_dist.exchange.base import Exchange
from moe_dist.exchange.nvlink.window import MOST_RANKS, Ends, Regions, Visit
from moe_dist.exchange.rows import activations_of, parts_of, payload_row_bytes, row_specs, sorting_specs
from moe_dist.machine.machine import Machine
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import Activations
from moe_dist.model.routing import Routing
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import MoESpec, TokenLayout
from moe_dist.step import Routes, Step, Support, TensorSpec, TokenRows, Whole


class Returning(Whole):
    """Takes sums that a backend has sent back by itself, or keeps them until `combine` sends them."""

    def __init__(
        self, step: Step, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, routes: Routes
    ) -> None:
        super().__init__(step, shape, dtype, device)
        self.routes = routes


class Nvlink(Exchange[Visit, Returning]):
    """For GPUs of one host. A token's row goes once to each rank that holds one of its experts, to a place that nobody
    needs to count, and one partial sum comes back from each. Flags in the peers' memory say that they are there."""

    token_layout: TokenLayout = "sharded"
    capturable = True
    needs_bucket = True
    every_token = False
    makes = ("token", "expert")

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._ends = Ends(self.comm.rank, self.comm.world, int(self.comm.timeout_s * 1e9))
        self._known: dict[int, Regions] = {}
        self._last: Visit | None = None

    @classmethod
    def supports(cls, spec: MoESpec, placement: Placement, machine: Machine) -> Support:
        if machine.device != "cuda":
            return Support(False, "needs GPUs that reach each other through NVLink")
        if placement.world > MOST_RANKS:
            return Support(False, f"serves {MOST_RANKS} ranks of one host, not {placement.world}")
        if spec.hidden % 16:
            return Support(False, f"moves 16 bytes at a time: hidden ({spec.hidden}) must be a multiple of 16")
        return Support(True)

    @classmethod
    def wire_bytes(cls, spec: MoESpec, placement: Placement, tokens: int, payload: str, combine_itemsize: int) -> int:
        """The worst case: every token goes to every other rank that top-k can reach."""
        shard, others = cdiv(tokens, placement.world), placement.world - 1
        reached = min(others, spec.top_k * placement.tp)
        row = payload_row_bytes(spec, payload) - 8 * spec.top_k + spec.hidden * combine_itemsize
        return shard * (row * reached + 8 * spec.top_k * others)

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
        return Regions.of(spec, placement.world, payload, dtype, bucket).nbytes

    def dispatch(self, step: Step, x: Activations, routing: Routing) -> tuple[TokenRows, Visit]:
        bucket = self.check_bucket(routing.tokens, step.bucket)
        with step.stages("dispatch"):
            regions = self._regions(bucket)
            window = self.comm.window(regions.nbytes)
            served_TW = step.workspace.take((routing.tokens, self.comm.world), torch.int8)
            came = [window.view(at, *form) for at, form in zip(regions.row_starts, regions.rows, strict=True)]
            visit = Visit(window, regions, bucket, routing.tokens, served_TW, came[-2])
            if bucket:
                from moe_dist.exchange.nvlink import kernels

                kernels.send_rows(visit, parts_of(x), self.placement, routing, self._ends)
            self._last = visit
            return TokenRows(activations_of(x, came[:-2]), *came[-2:]), visit

    def stored_bytes(self) -> int:
        """A token's slots and weights go to every other rank, its row to those that compute it, whose sums come from
        there; this rank's sums go to the others' tokens."""
        visit, rank, world = self._last, self.comm.rank, self.comm.world
        if visit is None:
            return 0
        others = [other for other in range(world) if other != rank]
        leaving = int(visit.served_TW[:, others].sum())
        computed = (visit.slots_RK >= 0).any(1).view(world, visit.bucket)
        returning = int(computed[others].sum())
        pairs = 8 * self.spec.top_k
        row = payload_row_bytes(self.spec, self.payload) - pairs
        everyone = visit.bucket * pairs * len(others)
        return everyone + leaving * row + returning * self.spec.hidden * self.sums_dtype.itemsize

    def _regions(self, bucket: int) -> Regions:
        found = self._known.get(bucket)
        if found is None:
            given = self.spec, self.comm.world, self.payload, self.sums_dtype, bucket
            found = self._known[bucket] = Regions.of(*given)
        return found

    def sink(self, step: Step, rows: TokenRows, handle: Visit, dtype: torch.dtype) -> Returning:
        at = handle.regions.sums_start + self.comm.rank * handle.bucket * self.spec.hidden * dtype.itemsize
        routes = Routes(handle.window.addresses_W, at, handle.bucket, self.comm.rank, dtype)
        return Returning(step, (len(rows), self.spec.hidden), dtype, self.comm.device, routes)

    def combine(self, step: Step, sink: Returning, handle: Visit) -> Tensor:
        from moe_dist.exchange.nvlink import kernels

        with step.stages("combine"):
            y_TH = torch.empty(handle.tokens, self.spec.hidden, dtype=sink.dtype, device=self.comm.device)
            if handle.bucket:
                if not sink.sent:
                    kernels.send_sums(handle, sink.y, self._ends)
                kernels.add_sums(handle, y_TH, self._ends)
            return y_TH
