"""For kernels of a whole layer: tokens are handed on as they came, and what comes back is finished."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from moe_dist.exchange.base import Exchange
from moe_dist.exchange.rows import payload_row_bytes
from moe_dist.machine.machine import Machine
from moe_dist.machine.nodes import told
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import Activations, QuantizedRows
from moe_dist.model.routing import Routing
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import MoESpec, TokenLayout
from moe_dist.step import LayerRows, Step, Support, TensorSpec, TokenRows, Whole

PAIR_BYTES = 8  # of a pair beside its row: where it came from, and its weight


class Fused(Exchange[int, Whole]):
    """The backend sends rows and sums by itself, in the launch that computes them: of every (token, expert) pair a row
    in FP8 there, and a sum back. It pads to the bucket by rows without experts, so that all ranks launch alike however
    many tokens each of them has."""

    token_layout: TokenLayout = "sharded"
    capturable = True
    every_token = False
    needs_bucket = True
    makes = ("layer",)
    _last: Routing | None = None

    @classmethod
    def supports(cls, spec: MoESpec, placement: Placement, machine: Machine) -> Support:
        if machine.device != "cuda":
            return Support(False, "needs GPUs that reach each other through NVLink")
        if not in_equal_runs(placement):
            return Support(False, "serves EP over two ranks or more, whole experts in equal runs")
        if len(nodes := machine.nodes_of(placement.world)) > 1:
            where = f"on {len(nodes)} nodes ({told(nodes)} ranks)"
            return Support(False, f"reaches GPUs of one node, and these ranks are {where}")
        return Support(True)

    @classmethod
    def wire_bytes(cls, spec: MoESpec, placement: Placement, tokens: int, payload: str, combine_itemsize: int) -> int:
        """The worst case: all pairs of this rank's tokens belong to others, and it computes for all others' tokens."""
        shard, local = cdiv(tokens, placement.world), len(placement.experts_of(0))
        leaving = min(spec.top_k, spec.num_experts - local) * pair_bytes(spec, payload)
        return shard * (leaving + (placement.world - 1) * min(spec.top_k, local) * spec.hidden * combine_itemsize)

    @classmethod
    def scratch(
        cls, spec: MoESpec, placement: Placement, payload: str, dtype: torch.dtype, bucket: int
    ) -> list[TensorSpec]:
        return []

    @classmethod
    def rows_entering(cls, placement: Placement, bucket: int) -> int:
        """Its own; where others' rows lie is the backend's (`Backend.window_bytes`)."""
        return bucket

    def dispatch(self, step: Step, x: Activations, routing: Routing) -> tuple[LayerRows, int]:
        bucket = self.check_bucket(routing.tokens, step.bucket)
        self._last = routing
        return LayerRows(x, routing.ids_TK, routing.weights_TK, bucket, self.comm), routing.tokens

    def to_payload(self, step: Step, x: Activations, routing: Routing) -> Activations:
        """They are quantized into the kernel's own memory, by the backend."""
        if isinstance(x, QuantizedRows):
            raise RuntimeError("a backend that computes whole layers quantizes by itself")
        return x

    def sink(self, step: Step, rows: TokenRows, handle: int, dtype: torch.dtype) -> Whole:
        """With a row for each of the bucket's. They are the result."""
        bucket = rows.bucket if isinstance(rows, LayerRows) else len(rows)
        return Whole(step, (bucket, self.spec.hidden), dtype, self.comm.device, lasting=True)

    def combine(self, step: Step, sink: Whole, handle: int) -> Tensor:
        return sink.y[:handle]

    def stored_bytes(self) -> int:
        """The rows that leave, and the sums of what came. Collective: only their own ranks know what comes."""
        if self._last is None:
            return 0
        world, rank, spec = self.comm.world, self.comm.rank, self.spec
        ids = self._last.ids_TK[self._last.legal(spec.num_experts)].long()
        pairs_W = torch.bincount(ids // (spec.num_experts // world), minlength=world)
        (pairs_WW,) = self.comm.all_gather([pairs_W[None]])
        leaving, coming = pairs_WW[rank].sum() - pairs_WW[rank, rank], pairs_WW[:, rank].sum() - pairs_WW[rank, rank]
        row, summed = pair_bytes(spec, self.payload), spec.hidden * self.sums_dtype.itemsize
        return int(leaving) * row + int(coming) * summed


def pair_bytes(spec: MoESpec, payload: str) -> int:
    """Of a pair's row on its way."""
    return payload_row_bytes(spec, payload) - 8 * spec.top_k + PAIR_BYTES


def in_equal_runs(placement: Placement) -> bool:
    """Whether the first rank has the first experts, whole, the second one as many of the next, and so on."""
    ranks = range(placement.world)
    held = [list(placement.experts_of(rank)) for rank in ranks]
    equal = placement.tp == 1 and not placement.replicated and len({len(each) for each in held}) == 1
    return placement.world > 1 and equal and list(chain.from_iterable(held)) == list(range(placement.num_experts))
