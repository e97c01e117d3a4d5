"""Turning one token layout into the other around an exchange, as timed work of the stage `convert`.

Attention under tensor parallelism leaves tokens replicated, under data parallelism sharded. An exchange that wants the
other layout pays for the change on both ends, and only rows measured with the same layout may be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.exchange.base import Exchange, Handle, activations_of, gather_tokens, pad_rows, parts_of
from moe_dist.quantization import Activations
from moe_dist.routing import Routing
from moe_dist.rows import TokenRows
from moe_dist.spec import split_bounds


class _Converted:
    """What both directions share."""

    def __init__(self, inner: Exchange) -> None:
        self.inner = inner
        self.comm, self.stages = inner.comm, inner.stages
        self.scaled_by = inner.scaled_by

    @property
    def static(self) -> bool:
        return self.inner.static

    @static.setter
    def static(self, value: bool) -> None:
        self.inner.static = value


class ShardedToReplicated(_Converted):
    """Tokens come sharded, `inner` wants them on every rank: gather them before, keep the own ones after."""

    needs_bucket = True

    def dispatch(self, x: Activations, routing: Routing, bucket: int | None = None) -> tuple[TokenRows, Handle]:
        bucket = self.inner.check_bucket(routing.tokens, bucket)
        x = self.inner.to_payload(x, routing)
        with self.stages("convert"):
            x, everyone = gather_tokens(self.comm, x, routing, bucket)
        rows, handle = self.inner.dispatch(x, everyone, bucket)
        return rows, Handle(routing.tokens, (handle, bucket))

    def combine(self, y_RH: Tensor, handle: Handle) -> Tensor:
        inner_handle, bucket = handle.notes
        y = self.inner.combine(y_RH, inner_handle)
        start = self.comm.rank * bucket
        return y[start : start + handle.tokens]

    def splits(self, bucket: int) -> str | None:
        return self.inner.splits(bucket)

    def identify(self, bounds: list[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
        """As for every exchange of sharded tokens."""
        return Exchange.identify(self.inner, bounds)

    def quantized_together(self, bounds: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return self.inner.quantized_together(bounds)


class ReplicatedToSharded(_Converted):
    """Every rank has all tokens, `inner` wants them sharded: keep an even share before, gather the results after."""

    needs_bucket = False

    def dispatch(self, x: Activations, routing: Routing, bucket: int | None = None) -> tuple[TokenRows, Handle]:
        bounds = split_bounds(routing.tokens, self.comm.world)
        start, stop = bounds[self.comm.rank]
        share = bounds[0][1]  # the first rank's share is the largest
        with self.stages("convert"):
            x = activations_of(x, [part[start:stop] for part in parts_of(x)])
        rows, handle = self.inner.dispatch(x, routing.rows(start, stop), share)
        return rows, Handle(routing.tokens, (handle, share, bounds))

    def combine(self, y_RH: Tensor, handle: Handle) -> Tensor:
        inner_handle, share, bounds = handle.notes
        y = self.inner.combine(y_RH, inner_handle)
        with self.stages("convert"):
            (gathered,) = self.comm.all_gather([pad_rows(y, share, 0)])
            if handle.tokens % self.comm.world == 0:
                return gathered
            pieces = [gathered[rank * share :][: stop - start] for rank, (start, stop) in enumerate(bounds)]
            return torch.cat(pieces)

    def splits(self, bucket: int) -> str | None:
        return self.inner.splits(-(-bucket // self.comm.world))

    def identify(self, bounds: list[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
        return self.inner.identify(split_bounds(bounds[-1][1], self.comm.world))

    def quantized_together(self, bounds: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return self.inner.quantized_together(split_bounds(bounds[-1][1], self.comm.world))


AnyExchange = Exchange | ShardedToReplicated | ReplicatedToSharded


def with_layout(exchange: Exchange, token_layout: str) -> AnyExchange:
    """`exchange` for callers whose tokens lie in `token_layout`."""
    if token_layout == exchange.token_layout or exchange.comm.world == 1:
        return exchange
    return ShardedToReplicated(exchange) if token_layout == "sharded" else ReplicatedToSharded(exchange)
