"""Where a backend's partial sums go. An exchange may take them a range of columns at a time, and send one range while
the backend computes the next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.step.step import Step


@dataclass(frozen=True)
class Routes:
    """Where a kernel may store sums itself, instead of handing them over. Row r of the R = W · each rows belongs to
    place r % each in the memory that begins at `addresses_W[r // each]` (int64, on the device), a rank's, this one's
    first. From `at` bytes on, a multiple of 16, it has the columns `start` to `stop` in `dtype` for each place; places
    beyond the last row stay as they are. Rows without any slot are not stored, or as zeros with `every`. `first`: the
    one to begin with, another on each rank."""

    addresses_W: Tensor
    at: int
    each: int
    dtype: torch.dtype
    first: int
    start: int
    stop: int
    every: bool = False


class Sink(ABC):
    """Takes [R, H] partial sums in `dtype`, exactly in the ranges of `columns()` and in their order, on every rank
    alike: what is done with a range may be collective, and is ordered behind what was launched before on the current
    stream.

    Where a range has routes (`routes_of`), kernels that can may store it by them and say so with `store`.

    A backend that can compute a range of columns goes through `columns()`, computes each into `target(start, stop)` and
    hands it over with `put`. One that can't fills `whole(step)` and hands that over with `put_all`.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self._stored = 0  # ranges, by routes
        self._came = 0  # ranges

    def columns(self) -> list[tuple[int, int]]:
        """The ranges wanted, which cover all columns once; each begins and ends at a multiple of 128 or at H."""
        return [(0, self.shape[1])]

    def routes_of(self, start: int, stop: int) -> Routes | None:
        """Where kernels may store this range; they hold its columns."""
        return None

    @abstractmethod
    def target(self, start: int, stop: int) -> Tensor:
        """A contiguous [R, stop - start] in `dtype` to fill, the sink's own until it is put; it holds anything."""

    @abstractmethod
    def take(self, start: int, stop: int, y_RC: Tensor) -> None:
        """What `put` does with a range; for subclasses."""

    def put(self, start: int, stop: int, y_RC: Tensor) -> None:
        """These columns are finished. `y_RC` is the target, or another contiguous [R, stop - start] in `dtype`, which
        becomes the sink's: it may be changed."""
        self._count(start, stop)
        self.take(start, stop, y_RC)

    def store(self, start: int, stop: int) -> None:
        """These columns are finished, and a launch has stored them by `routes`."""
        if self.routes_of(start, stop) is None:
            raise RuntimeError(f"this sink has no routes to store columns {start} to {stop} by")
        self._count(start, stop)
        self._stored += 1

    @property
    def sent(self) -> bool:
        """Whether all columns were stored by `routes`."""
        return self._stored == len(self.columns())

    def _count(self, start: int, stop: int) -> None:
        due = self.columns()[self._came :]
        if not due or due[0] != (start, stop):
            raise RuntimeError(f"columns {start} to {stop} were put where {due[0] if due else 'nothing'} was due")
        self._came += 1

    def whole(self, step: Step) -> Tensor:
        """[R, H] to fill with all columns at once, contiguous; it holds anything."""
        return (
            self.target(*self.columns()[0]) if len(self.columns()) == 1 else step.workspace.take(self.shape, self.dtype)
        )

    def put_all(self, y_RH: Tensor) -> None:
        """All columns are finished, in `whole` or in another tensor, which becomes the sink's."""
        if len(self.columns()) == 1:
            self.put(*self.columns()[0], y_RH)
            return
        for start, stop in self.columns():
            self.put(start, stop, self.target(start, stop).copy_(y_RH[:, start:stop]))

    def put_zeros(self) -> None:
        """All columns, for a backend that has nothing to add."""
        for start, stop in self.columns():
            self.put(start, stop, self.target(start, stop).zero_())


class Whole(Sink):
    """Keeps all columns in one tensor, `y`: scratch of the step or, with `lasting`, memory that is the caller's."""

    def __init__(
        self, step: Step, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, *, lasting: bool = False
    ) -> None:
        super().__init__(shape, dtype)
        self._step, self._device, self._lasting = step, device, lasting
        self._y: Tensor | None = None

    @property
    def y(self) -> Tensor:
        """[R, H], the finished partial sums."""
        if self._y is None:
            raise RuntimeError("the backend has handed nothing over")
        return self._y

    def target(self, start: int, stop: int) -> Tensor:
        if self._lasting:
            return torch.empty(self.shape, dtype=self.dtype, device=self._device)
        return self._step.workspace.take(self.shape, self.dtype)

    def take(self, start: int, stop: int, y_RC: Tensor) -> None:
        self._y = y_RC


class Added(Sink):
    """`sink` with `more` [R, H] added to what it is given: a shared expert's part."""

    def __init__(self, sink: Sink, more: Tensor) -> None:
        super().__init__(sink.shape, sink.dtype)
        self._sink, self._more = sink, more

    def columns(self) -> list[tuple[int, int]]:
        return self._sink.columns()

    def target(self, start: int, stop: int) -> Tensor:
        return self._sink.target(start, stop)

    def take(self, start: int, stop: int, y_RC: Tensor) -> None:
        self._sink.put(start, stop, y_RC.add_(self._more[:, start:stop]))
