"""Known answers of every collective, asked once for a group of ranks before anything is measured on it: what a layer
is compared with crosses the same collectives."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.comm import Comm
from moe_dist.errors import RankFailure
from moe_dist.runtime.context import RankContext

COUNTS = (1, 33, 3000)  # rows of a rank: libraries have other ways for other sizes
COLUMNS = 16
EXACT = {torch.float32: 1 << 24, torch.bfloat16: 1 << 8}  # integers up to these are exact


def prove_collectives(context: RankContext) -> None:
    """Raise RankFailure on a rank where a collective does not give what it should; collective."""
    comm = context.comm
    if comm.world == 1 or context.memo.get("proven"):
        return
    context.progress("collectives: known answers")
    for count in COUNTS:
        for dtype, most in EXACT.items():
            if most >= 2 * comm.world:
                _prove_sums(comm, count, dtype)
        _prove_gather(comm, count)
        _prove_exchange(comm, count)
    context.memo["proven"] = True


def _prove_sums(comm: Comm, count: int, dtype: torch.dtype) -> None:
    world = comm.world
    parts = [_named(comm, rank, 0, world * count, EXACT[dtype] // world) for rank in range(world)]
    wanted, mine = torch.stack(parts).sum(0), parts[comm.rank].to(dtype)
    _compare(comm, "all_reduce", comm.all_reduce(mine.clone()), wanted)
    here = slice(comm.rank * count, (comm.rank + 1) * count)
    _compare(comm, "reduce_scatter", comm.reduce_scatter(mine), wanted[here])


def _prove_gather(comm: Comm, count: int) -> None:
    parts = [_named(comm, rank, 0, count) for rank in range(comm.world)]
    wanted = torch.cat(parts)
    for found in comm.all_gather([parts[comm.rank].int(), parts[comm.rank].bfloat16()]):
        _compare(comm, "all_gather", found, wanted)


def _prove_exchange(comm: Comm, count: int) -> None:
    """Uneven splits: rank r sends `_share(count, r, d)` rows to rank d, numbered on by where they go."""
    ranks = range(comm.world)
    send, receive = ([_share(count, *pair) for pair in pairs] for pairs in (
        [(comm.rank, other) for other in ranks], [(other, comm.rank) for other in ranks]))  # fmt: skip
    mine = torch.cat([_named(comm, comm.rank, other * count, rows) for other, rows in zip(ranks, send, strict=True)])
    came = [_named(comm, other, comm.rank * count, rows) for other, rows in zip(ranks, receive, strict=True)]
    for found in comm.all_to_all([mine.int(), mine.bfloat16()], send, receive):
        _compare(comm, "all_to_all", found, torch.cat(came))


def _share(count: int, source: int, destination: int) -> int:
    return count // (1 + (source + 2 * destination) % 3)


def _named(comm: Comm, rank: int, first: int, count: int, below: int = 251) -> Tensor:
    """Integers from 1 to `below` that follow from rank, row and column, int64 [count, COLUMNS] for rows from `first`
    on: no two ranks, and no two rows near each other, have the same."""
    rows = torch.arange(first, first + count, dtype=torch.int64, device=comm.device)[:, None]
    columns = torch.arange(COLUMNS, dtype=torch.int64, device=comm.device)
    named: Tensor = 1 + ((rank + 1) * 7919 + (rows + 1) * 104_729 + (columns + 1) * (rows + rank) * 31) % max(below, 1)
    return named


def _compare(comm: Comm, op: str, found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape:
        cause = f"it gave {tuple(found.shape)} where {tuple(wanted.shape)} is right"
    else:
        wrong = found.to(torch.int64) != wanted
        if not bool(wrong.any()):
            return
        row, column = wrong.nonzero()[0].tolist()
        value, right = float(found[row, column]), int(wanted[row, column])
        cause = (
            f"row {row} of {len(wanted)}, the first of {int(wrong.any(1).sum())} such, is wrong: column {column} is"
            f" {value:g} where {right} is right ({found.dtype}, known answers)"
        )
    raise RankFailure(comm.rank, op, comm.sequence, cause)
