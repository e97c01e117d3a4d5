"""Where a backend's partial sums go. An exchange may take them a range of columns at a time, and send one range while
the backend computes the next."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from moe_dist.step.step import Step


class Sink(ABC):
    """Takes [R, H] partial sums in `dtype`.

    A backend that can compute ranges of columns one after another goes through `columns()` in its order, computes each
    into `target(start, stop)` and hands it over with `put`. One that can't does so once, for all columns. What `put`
    does with a range is ordered behind what was launched before on the current stream.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def columns(self) -> list[tuple[int, int]]:
        """The ranges wanted, which cover all columns once; each begins and ends at a multiple of 128 or at H."""
        return [(0, self.shape[1])]

    @abstractmethod
    def target(self, start: int, stop: int) -> Tensor:
        """A contiguous [R, stop - start] in `dtype` to fill; it holds anything."""

    @abstractmethod
    def put(self, start: int, stop: int, y_RC: Tensor) -> None:
        """These columns are finished. `y_RC` is the target, or another contiguous [R, stop - start] in `dtype` that
        nobody changes later."""

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

    def put(self, start: int, stop: int, y_RC: Tensor) -> None:
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

    def put(self, start: int, stop: int, y_RC: Tensor) -> None:
        self._sink.put(start, stop, y_RC.add_(self._more[:, start:stop]))
