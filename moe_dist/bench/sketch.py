"""What is kept of an output, to know a later one by: nine numbers of every row."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.bench.check import worst
from moe_dist.comm import Comm
from moe_dist.workloads.streams import Stream

WIDTH = 8


def sketch(y_TH: Tensor) -> Tensor:
    """float64 [T, 9]: each row's norm, and its products with eight fixed random vectors of ±1/sqrt(8), whose norm is
    that of the row in the mean (Johnson-Lindenstrauss). It is linear but for the norm, and no row is left out. The norm
    is taken in float64, where that of no row of float32 is infinite."""
    y_TH = y_TH.float()
    signs = Stream("sketch of outputs", y_TH.shape[1], device=y_TH.device).uniform(y_TH.shape[1], WIDTH) < 0.5
    vectors = torch.where(signs, -1.0, 1.0) / WIDTH**0.5
    norms = torch.linalg.vector_norm(y_TH, dim=1, keepdim=True, dtype=torch.float64)
    return torch.cat([norms, (y_TH @ vectors).double()], 1)


def sketch_error(comm: Comm, found: Tensor, wanted: Tensor) -> float:
    """About what the worst row of any rank is off by, relative; see check.worst. Collective."""
    if found.shape != wanted.shape:
        found = torch.full_like(wanted, float("inf"))
    difference = (found[:, 1:] - wanted[:, 1:]).norm(dim=1)
    # A row that became NaN or infinite shows in its norm too, and equal rows have equal norms.
    difference = torch.maximum(difference, (found[:, 0] - wanted[:, 0]).abs())
    return worst(comm, difference, wanted[:, 0])
