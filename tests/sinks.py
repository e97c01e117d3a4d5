"""A sink that takes partial sums in several ranges of columns, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.step import Sink


class InRanges(Sink):
    """`y` holds what came; `widths` are the ranges' sizes, the last one again until all columns are covered."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, widths: list[int]) -> None:
        super().__init__(shape, dtype)
        self.y = torch.full(shape, torch.nan, dtype=dtype, device=device)
        self.widths, self.put_so_far = widths, []

    def columns(self) -> list[tuple[int, int]]:
        ranges, start, widths = [], 0, list(self.widths)
        while start < self.shape[1]:
            width = widths.pop(0) if len(widths) > 1 else widths[0]
            ranges.append((start, min(start + width, self.shape[1])))
            start += width
        return ranges

    def target(self, start: int, stop: int) -> Tensor:
        return torch.full((self.shape[0], stop - start), torch.nan, dtype=self.dtype, device=self.y.device)

    def take(self, start: int, stop: int, y_RC: Tensor) -> None:
        assert y_RC.shape == (self.shape[0], stop - start)
        assert y_RC.is_contiguous()
        self.y[:, start:stop] = y_RC
        self.put_so_far.append((start, stop))


class Scaled(Sink):
    """`sink` with everything times `factor`, a number or one for each row [R, 1]: what a backend that is off gives."""

    def __init__(self, sink: Sink, factor: float | Tensor) -> None:
        super().__init__(sink.shape, sink.dtype)
        self.sink, self.factor = sink, factor

    def columns(self) -> list[tuple[int, int]]:
        return self.sink.columns()

    def target(self, start: int, stop: int) -> Tensor:
        return self.sink.target(start, stop)

    def take(self, start: int, stop: int, y_RC: Tensor) -> None:
        self.sink.put(start, stop, y_RC.mul_(self.factor))
