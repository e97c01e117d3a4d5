"""Sums over ranks for the check. They are gathered and added here: an all-reduce that does wrong must not make the
expectation that it is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_dist.comm import Comm
from moe_dist.model.sizes import row_bytes

GATHERED = 64 << 20  # bytes of all ranks' rows that are held at once


def summed(comm: Comm, part: Tensor) -> Tensor:
    """The sum over ranks of [n, ...], added in rank order: the same bits on every rank; collective."""
    rows = max(1, GATHERED // (comm.world * max(1, row_bytes(part))))
    total = torch.zeros_like(part)
    for start in range(0, len(part), rows):
        chunk = part[start : start + rows]
        (everyone,) = comm.all_gather([chunk])
        for of_rank in everyone.split(len(chunk)):
            total[start : start + rows] += of_rank
    return total


def joined(comm: Comm, mine: Tensor, bounds: Sequence[tuple[int, int]]) -> Tensor:
    """Every rank's rows, those of rank r being `bounds[r]` of what comes back; collective."""
    counts = [stop - start for start, stop in bounds]
    padded = mine.new_zeros(max(counts), *mine.shape[1:])
    padded[: len(mine)] = mine
    (everyone,) = comm.all_gather([padded])
    parts = everyone.view(len(counts), *padded.shape)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def told(comm: Comm, *values: Tensor | float) -> Tensor:
    """Each rank's few numbers, float64 [world, values] on the CPU; collective."""
    mine = torch.tensor([[float(value) for value in values]], dtype=torch.float64, device=comm.device)
    return comm.all_gather([mine])[0].cpu()
