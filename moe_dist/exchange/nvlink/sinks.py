"""What takes partial sums on their way back.

Of a small step, a kernel stores all columns where they belong. Of a large one the first columns go ahead, in one range
or two: copy engines move them while the backend computes the others, the last of which a kernel stores. The price:
GEMM2 in so many launches more, one more pass of these columns through memory, and sums that no token waits for, since
copies know no gaps.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from moe_dist.comm.symmetric import Aside
from moe_dist.exchange.nvlink.window import Visit
from moe_dist.step import Routes, Sink, Step, Whole


class Finished(NamedTuple):
    """What is left to do. `unsent`: [R, H] sums that nobody has sent. `own`: where this rank's own sums of the first
    `apart` columns are, which copies have taken: [R, columns] range by range, its own rows first. Its other sums lie in
    its window like everybody's."""

    unsent: Tensor | None = None
    own: Tensor | None = None
    apart: int = 0


class Returning(Whole):
    """Takes sums that a backend has sent back by itself, or keeps them until `combine` sends them."""

    def __init__(
        self, step: Step, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, routes: Routes
    ) -> None:
        super().__init__(step, shape, dtype, device)
        self._routes = routes

    def routes_of(self, start: int, stop: int) -> Routes:
        return self._routes

    def finish(self) -> Finished:
        return Finished() if self.sent else Finished(unsent=self.y)


class Ahead(Sink):
    """Copies each range to its peers while the next one is computed, and the last one too where no kernel has stored it
    by its routes. What is copied lies in scratch and is not overwritten while it travels: `finish` makes this
    step's stream wait."""

    def __init__(
        self, step: Step, shape: tuple[int, int], dtype: torch.dtype, visit: Visit, rank: int, routes: Routes
    ) -> None:
        super().__init__(shape, dtype)
        self._visit, self._rank, self._routes = visit, rank, routes
        self._sums = step.workspace.take((shape[0] * shape[1],), dtype)
        self._aside = Aside(visit.window.local.device)
        self._whole: Tensor | None = None

    def columns(self) -> list[tuple[int, int]]:
        width, number = self._visit.ahead
        return list(pairwise([*range(0, (number + 1) * width, width), self.shape[1]]))

    def routes_of(self, start: int, stop: int) -> Routes | None:
        return self._routes if start == self._visit.ahead.columns else None

    def target(self, start: int, stop: int) -> Tensor:
        rows = self.shape[0]
        return self._sums[rows * start : rows * stop].view(rows, stop - start)

    def take(self, start: int, stop: int, y_RC: Tensor) -> None:
        visit, sums_RC = self._visit, self.target(start, stop)
        if y_RC.data_ptr() != sums_RC.data_ptr():
            sums_RC.copy_(y_RC)
        (world, size), dtype = visit.regions.sums
        at = visit.sums_at + dtype.itemsize * (self._rank * size + start * visit.bucket)
        pairs = []
        for step in range(1, world):  # every rank begins with another one; its own sums stay where they are
            peer = (self._rank + step) % world
            there = visit.window.peer_view(peer, at, (visit.bucket, stop - start), dtype)
            pairs.append((there, sums_RC[step * visit.bucket : (step + 1) * visit.bucket]))
        self._aside.copy(pairs)

    def whole(self, step: Step) -> Tensor:
        return self._sums.view(self.shape)

    def put_all(self, y_RH: Tensor) -> None:
        """Sums that come all at once have nothing to travel under: `combine` sends them in one launch."""
        self._whole = y_RH

    def finish(self) -> Finished:
        """The current stream waits for the copies."""
        if self._whole is None and self._came < len(self.columns()):
            raise RuntimeError(f"the backend has handed over {self._came} of {len(self.columns())} ranges of columns")
        self._aside.join()
        if self._whole is not None:
            return Finished(unsent=self._whole)
        return Finished(own=self._sums, apart=self._visit.ahead.columns if self._stored else self.shape[1])
