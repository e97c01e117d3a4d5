"""Collectives that move tensors on the ranks' device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.bounded import Bounded
from moe_dist.comm.guard import form_of, form_of_rows
from moe_dist.comm.wires import copied, gather_into, plain, row_bytes_of, scatter_sum_into, wire
from moe_dist.model.sizes import row_bytes


class Collectives(Bounded):
    """`bytes_sent` adds up what this rank must send to others by the leanest algorithm of each collective: (W-1) times
    its part for an all-gather, (W-1)/W of the input for a reduce-scatter, twice that for an all-reduce, the rows for
    other ranks for an all-to-all."""

    bytes_sent = 0

    def all_gather(self, parts: Sequence[Tensor], *, into: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Each [n, ...], the same shape on every rank, to [world·n, ...] in rank order: new tensors, or the contiguous
        ones of that shape and the part's dtype in `into`."""
        if self.world == 1:
            return list(parts)
        wires = self._wires(parts)
        if into is not None and len(wires) == len(parts):
            outs, into = [wire(target) for target in into], None
        else:
            outs = [wire.new_empty(self.world * wire.shape[0], *wire.shape[1:]) for wire in wires]

        def gather() -> None:
            with self._together(len(outs), named=True):
                for out, wire in zip(outs, wires, strict=True):
                    self._wait(gather_into(out, wire, group=self._group, async_op=self._waits))

        self._run("all_gather", gather, lambda: form_of(parts))
        self.bytes_sent += sum(wire.nbytes for wire in wires) * (self.world - 1)
        return copied(self._unwired(outs, parts), into)

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        """[world·n, ...] on every rank to this rank's [n, ...] of the sum."""
        if self.world == 1:
            return rows
        rows = rows.contiguous()
        out = self._run(
            "reduce_scatter", lambda: (self._summed if self._waits else self._scattered)(rows), lambda: form_of([rows])
        )
        self.bytes_sent += rows.nbytes * (self.world - 1) // self.world
        return out

    def all_reduce(self, rows: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            self._run(
                "all_reduce",
                lambda: self._wait(dist.all_reduce(rows, group=self._group, async_op=self._waits)),
                lambda: form_of([rows]),
            )
            self.bytes_sent += 2 * rows.nbytes * (self.world - 1) // self.world
        return rows

    def all_to_all(
        self,
        parts: Sequence[Tensor],
        send: Sequence[int],
        receive: Sequence[int],
        *,
        into: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Each part's rows by destination to [sum(receive), ...] by source: new tensors, or the contiguous ones of that
        shape and the part's dtype in `into`."""
        if self.world == 1:
            return copied(parts, into)
        wires = self._wires(parts)
        if into is not None and len(wires) == len(parts):
            outs, into = [wire(target) for target in into], None
        else:
            outs = [wire.new_empty(sum(receive), *wire.shape[1:]) for wire in wires]

        def exchange() -> None:
            with self._together(len(outs), named=False):
                for out, wire in zip(outs, wires, strict=True):
                    self._wait(
                        dist.all_to_all_single(
                            out, wire, list(receive), list(send), group=self._group, async_op=self._waits
                        )
                    )

        self._run("all_to_all", exchange, lambda: form_of_rows(parts, send, receive))
        self.bytes_sent += sum(map(row_bytes, wires)) * (sum(send) - send[self.rank])
        return copied(self._unwired(outs, parts), into)

    def align(self) -> None:
        """Make the device streams of all ranks wait for each other; the host does not wait."""
        if self.world > 1 and self.device.type == "cuda":
            tiny = torch.zeros(1, dtype=torch.float32, device=self.device)
            self._run("align", lambda: dist.all_reduce(tiny, group=self._group))

    def _wires(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that cross for these. On gloo, where each collective costs milliseconds, one of packed bytes."""
        if self.device.type == "cuda" or len(parts) == 1:
            return [wire(part) for part in parts]
        return [torch.cat([row_bytes_of(part) for part in parts], 1)]

    def _unwired(self, outs: list[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
        """What came across for `parts`, in their dtypes and shapes but for the number of rows."""
        if len(outs) == len(parts):
            return [out.view(part.dtype) for out, part in zip(outs, parts, strict=True)]
        pieces = torch.split(outs[0], [row_bytes(part) for part in parts], 1)
        return [
            plain(piece).view(part.dtype).view(len(piece), *part.shape[1:])
            for piece, part in zip(pieces, parts, strict=True)
        ]

    def _together(self, count: int, named: bool) -> AbstractContextManager[Any]:
        """Collectives inside become one NCCL launch; each alone costs its own latency. gloo has no such thing.

        torch has this without an underscore only for point-to-point operations. `named`: torch has a grouped form of
        this very collective (all-gather), which must not be given the device as well: buffers then stay referenced by a
        second, forgotten piece of work (seen: a hundred steps' worth).
        """
        if self.device.type != "cuda" or count == 1:
            return nullcontext()
        return dist._coalescing_manager(group=self._group, device=None if named else self.device)  # type: ignore[attr-defined]

    def _scattered(self, rows: Tensor) -> Tensor:
        out = rows.new_empty(rows.shape[0] // self.world, *rows.shape[1:])
        self._wait(scatter_sum_into(out, rows, group=self._group, async_op=self._waits))
        return out

    def _summed(self, rows: Tensor) -> Tensor:
        """The same by gloo, whose own reduce-scatter can't be waited for with a limit, and sends twice as much: each
        rank's part by all-to-all, added here in rank order, 16-bit numbers in float32."""
        parts = torch.empty_like(rows)
        self._wait(dist.all_to_all_single(parts, rows, group=self._group, async_op=True))
        first, *others = parts.chunk(self.world) if len(parts) else [parts]
        total = first.float() if rows.dtype in (torch.bfloat16, torch.float16) else first
        for part in others:
            total += part
        return total.to(rows.dtype)
