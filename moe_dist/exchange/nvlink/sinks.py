"""What takes partial sums on their way back.

Of a small step, a kernel stores all columns where they belong. Of a large one, copy engines move a chunk of columns
while the backend computes the next, so that only the last chunk is waited for. The price: GEMM2 in several launches,
one more pass of the sums through memory, and sums that no token waits for, since copies know no gaps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.comm.symmetric import Aside
from moe_dist.exchange.nvlink.window import Visit
from moe_dist.step import Routes, Sink, Step, Whole


class Returning(Whole):
    """Takes sums that a backend has sent back by itself, or keeps them until `combine` sends them."""

    def __init__(
        self, step: Step, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, routes: Routes
    ) -> None:
        super().__init__(step, shape, dtype, device)
        self.routes = routes

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """[R, H] sums that nobody has sent, and those among which this rank's own lie apart from what comes back."""
        return None if self.sent else self.y, None


class Chunked(Sink):
    """Copies each chunk to its peers while the next one is computed. Chunks lie one behind the other in scratch, so
    none is overwritten while it travels. The next step may do that, since `finish` makes this step's stream wait."""

    def __init__(self, step: Step, shape: tuple[int, int], dtype: torch.dtype, visit: Visit, rank: int) -> None:
        super().__init__(shape, dtype)
        self._visit, self._rank = visit, rank
        self._sums = step.workspace.take((shape[0] * shape[1],), dtype)
        self._aside = Aside(visit.window.local.device)
        self._whole: Tensor | None = None

    def columns(self) -> list[tuple[int, int]]:
        hidden, width = self.shape[1], self._visit.width
        return [(start, min(start + width, hidden)) for start in range(0, hidden, width)]

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

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """As Returning.finish. The current stream waits for the copies."""
        self._aside.join()
        return (None, self._sums) if self._whole is None else (self._whole, None)
