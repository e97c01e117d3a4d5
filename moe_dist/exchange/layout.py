"""Turning one token layout into the other around an exchange, as timed work of the stage `convert`.

Attention under tensor parallelism leaves tokens replicated, under data parallelism sharded. An exchange that wants the
other layout pays for the change on both ends, and only rows measured with the same layout may be compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic

import torch
from torch import Tensor

from moe_dist.exchange.base import Exchange, H, S
from moe_dist.exchange.rows import (
    activations_of,
    gather_specs,
    gather_tokens,
    pad_rows,
    parts_of,
    payload_row_bytes,
    room_for,
)
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import Activations
from moe_dist.model.routing import Routing
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import MoESpec, split_bounds
from moe_dist.oracle.reference import ScaledBy
from moe_dist.step import Step, TensorSpec, TokenRows


@dataclass(frozen=True)
class Shard(Generic[H]):
    """This rank's run of the tokens that `inner` was given: where it begins, how many they are."""

    inner: H
    start: int
    tokens: int


class ShardedToReplicated(Exchange[Shard[H], S]):
    """Tokens come sharded, `inner` wants them on every rank: gather them before, keep the own ones after."""

    token_layout = "sharded"
    needs_bucket = True

    def __init__(self, inner: Exchange[H, S]) -> None:
        super().__init__(inner.comm, inner.placement, inner.spec, inner.payload, inner.static_scale, inner.form)
        self.inner, self.capturable, self.every_token = inner, inner.capturable, inner.every_token

    @classmethod
    def wire_bytes(cls, spec: MoESpec, placement: Placement, tokens: int, payload: str, combine_itemsize: int) -> int:
        """Of the change alone: rows are gathered before, padded to equal shares."""
        return cdiv(tokens, placement.world) * payload_row_bytes(spec, payload) * (placement.world - 1)

    @classmethod
    def scratch(
        cls, spec: MoESpec, placement: Placement, payload: str, dtype: torch.dtype, bucket: int
    ) -> list[TensorSpec]:
        """Of the change alone."""
        return gather_specs(spec, placement, payload, bucket)

    def dispatch(self, step: Step, x: Activations, routing: Routing) -> tuple[TokenRows, Shard[H]]:
        bucket = self.check_bucket(routing.tokens, step.bucket)
        with step.stages("convert"):
            x, everyone = gather_tokens(step, self.comm, x, routing, bucket)
        rows, handle = self.inner.dispatch(step, x, everyone)
        return rows, Shard(handle, self.comm.rank * bucket, routing.tokens)

    def arrived(self, step: Step, rows: TokenRows, handle: Shard[H]) -> TokenRows:
        return self.inner.arrived(step, rows, handle.inner)

    def sink(self, step: Step, rows: TokenRows, handle: Shard[H], dtype: torch.dtype) -> S:
        return self.inner.sink(step, rows, handle.inner, dtype)

    def combine(self, step: Step, sink: S, handle: Shard[H]) -> Tensor:
        y = self.inner.combine(step, sink, handle.inner)
        return y[handle.start : handle.start + handle.tokens]

    def stored_bytes(self) -> int:
        return self.inner.stored_bytes()

    def splits(self, bucket: int, captured: bool) -> str | None:
        return self.inner.splits(bucket, captured)

    @property
    def scaled_by(self) -> ScaledBy:
        return self.inner.scaled_by

    def quantized_together(self, bounds: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return self.inner.quantized_together(bounds)


@dataclass(frozen=True)
class Share(Generic[H]):
    """Every rank's share of the tokens, and the largest one's size."""

    inner: H
    bounds: list[tuple[int, int]]
    most: int


class ReplicatedToSharded(Exchange[Share[H], S]):
    """Every rank has all tokens, `inner` wants them sharded: keep an even share before, gather the results after. Only
    the share is quantized, so that comes after the cut."""

    token_layout = "replicated"
    needs_bucket = False

    def __init__(self, inner: Exchange[H, S]) -> None:
        super().__init__(inner.comm, inner.placement, inner.spec, inner.payload, inner.static_scale, inner.form)
        self.inner, self.capturable, self.every_token = inner, inner.capturable, inner.every_token

    @classmethod
    def wire_bytes(cls, spec: MoESpec, placement: Placement, tokens: int, payload: str, combine_itemsize: int) -> int:
        """Of the change alone: results are gathered after, padded to equal shares."""
        return cdiv(tokens, placement.world) * spec.hidden * combine_itemsize * (placement.world - 1)

    @classmethod
    def scratch(
        cls, spec: MoESpec, placement: Placement, payload: str, dtype: torch.dtype, bucket: int
    ) -> list[TensorSpec]:
        """Of the change alone."""
        most = cdiv(bucket, placement.world)
        return [((most, spec.hidden), dtype), ((placement.world * most, spec.hidden), dtype)]

    def to_payload(self, step: Step, x: Activations, routing: Routing) -> Activations:
        return x

    def dispatch(self, step: Step, x: Activations, routing: Routing) -> tuple[TokenRows, Share[H]]:
        bounds = split_bounds(routing.tokens, self.comm.world)
        start, stop = bounds[self.comm.rank]
        most = bounds[0][1]  # the first rank's share is the largest
        with step.stages("convert"):
            x, share = activations_of(x, [part[start:stop] for part in parts_of(x)]), routing.rows(start, stop)
        rows, handle = self.inner.dispatch(replace(step, bucket=most), self.inner.to_payload(step, x, share), share)
        return rows, Share(handle, bounds, most)

    def arrived(self, step: Step, rows: TokenRows, handle: Share[H]) -> TokenRows:
        return self.inner.arrived(step, rows, handle.inner)

    def sink(self, step: Step, rows: TokenRows, handle: Share[H], dtype: torch.dtype) -> S:
        return self.inner.sink(step, rows, handle.inner, dtype)

    def combine(self, step: Step, sink: S, handle: Share[H]) -> Tensor:
        bounds, most = handle.bounds, handle.most
        y = self.inner.combine(replace(step, bucket=most), sink, handle.inner)
        tokens, world = bounds[-1][1], self.comm.world
        with step.stages("convert"):
            padded = pad_rows(step, y, most, 0)
            if tokens % world == 0:
                return self.comm.all_gather([padded])[0]
            (gathered,) = self.comm.all_gather([padded], into=room_for(step, [padded], world * most))
            pieces = [gathered[rank * most :][: stop - start] for rank, (start, stop) in enumerate(bounds)]
            return torch.cat(pieces)

    def stored_bytes(self) -> int:
        return self.inner.stored_bytes()

    def splits(self, bucket: int, captured: bool) -> str | None:
        return self.inner.splits(cdiv(bucket, self.comm.world), captured)

    @property
    def scaled_by(self) -> ScaledBy:
        return self.inner.scaled_by

    def identify(self, bounds: list[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
        return self.inner.identify(split_bounds(bounds[-1][1], self.comm.world))

    def quantized_together(self, bounds: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return self.inner.quantized_together(split_bounds(bounds[-1][1], self.comm.world))


def change_of(token_layout: str, exchange: type[Exchange[Any, Any]], world: int) -> type[Exchange[Any, Any]] | None:
    """The change around `exchange` for tokens that lie in `token_layout`, if there must be one."""
    if token_layout == exchange.token_layout or world == 1:
        return None
    return ShardedToReplicated if token_layout == "sharded" else ReplicatedToSharded


def with_layout(exchange: Exchange[Any, Any], token_layout: str) -> Exchange[Any, Any]:
    """`exchange` for callers whose tokens lie in `token_layout`."""
    if token_layout == exchange.token_layout or exchange.comm.world == 1:
        return exchange
    return (ShardedToReplicated if token_layout == "sharded" else ReplicatedToSharded)(exchange)
