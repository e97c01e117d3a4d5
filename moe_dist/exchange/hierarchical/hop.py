"""One hop of rows among a few ranks of the group: who gets which rows, and the way back of their sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.comm import Comm
from moe_dist.step import Take


@dataclass(frozen=True)
class Members:
    """The ranks of a hop, in order; `own` is this rank's index among them. Only they send each other anything: a
    collective of all ranks with no rows for the rest, so that an error has this group's ranks and numbers."""

    ranks: tuple[int, ...]
    own: int

    @property
    def others(self) -> list[int]:
        """Indices of the other members."""
        return [index for index in range(len(self.ranks)) if index != self.own]

    def splits(self, world: int, rows: Sequence[int]) -> list[int]:
        """`rows[m]` for member m, its own left out, as a split over all ranks."""
        found = [0] * world
        for index in self.others:
            found[self.ranks[index]] = rows[index]
        return found


@dataclass(frozen=True)
class Crossed:
    """What went where. `lists`: for each member the rows that it got, int64, in their order; `receive[m]`: how many
    came from member m. Rows that stay here are the first of those that are here now. `rows`: how many there were
    before."""

    members: Members
    lists: list[Tensor]
    receive: list[int]
    rows: int


def cross(
    comm: Comm, members: Members, wanted_RM: Tensor, parts: Sequence[Tensor], take: Take
) -> tuple[list[Tensor], Crossed]:
    """Each row [R, ...] of `parts` to every member that wants it, bool [R, M]: the rows that are here afterwards, this
    rank's own first, then those of the other members in order. Collective, also without rows."""
    counts_M = wanted_RM.sum(0)
    told_M1, alone = counts_M[:, None], len(members.ranks) == 1
    if not alone:
        one_each = members.splits(comm.world, [1] * len(members.ranks))
        (told,) = comm.all_to_all([told_M1[members.others]], one_each, one_each)
        told_M1 = told_M1.clone()
        told_M1[members.others] = told
    send, receive = comm.to_host(torch.stack([counts_M, told_M1[:, 0]]))()
    first_RM = wanted_RM.logical_not().to(torch.uint8).argsort(dim=0, stable=True)  # without asking how many there are
    lists = [first_RM[:count, index] for index, count in enumerate(send)]
    stays, coming = send[members.own], sum(receive) - receive[members.own]
    here = [take((stays + coming, *part.shape[1:]), part.dtype) for part in parts]
    for target, part in zip(here, parts, strict=True):
        _bytes(target)[:stays] = _bytes(part)[lists[members.own]]
    if not alone:
        leaving = torch.cat([lists[index] for index in members.others])
        rows = [_picked(part, leaving, take) for part in parts]
        splits = members.splits(comm.world, send), members.splits(comm.world, receive)
        comm.all_to_all(rows, *splits, into=[target[stays:] for target in here])
    return here, Crossed(members, lists, receive, len(wanted_RM))


def return_sums(comm: Comm, crossed: Crossed, y_RH: Tensor, take: Take) -> Tensor:
    """The sums of the rows that `cross` has left here go back to where the rows came from, and are added there in
    float32, in the order of members: float32 [rows before, H]. No atomics: the same bits in every run."""
    members = crossed.members
    stays, back = len(crossed.lists[members.own]), y_RH
    if len(members.ranks) > 1:
        sent = [len(rows) for rows in crossed.lists]
        came = sum(sent) - stays
        splits = members.splits(comm.world, crossed.receive), members.splits(comm.world, sent)
        (back,) = comm.all_to_all([y_RH[stays:]], *splits, into=[take((came, y_RH.shape[1]), y_RH.dtype)])
    total_RH = torch.zeros(crossed.rows, y_RH.shape[1], dtype=torch.float32, device=y_RH.device)
    start = 0
    for index, rows in enumerate(crossed.lists):
        if index == members.own:
            total_RH[rows] += y_RH[:stays].float()
        else:
            total_RH[rows] += back[start : start + len(rows)].float()
            start += len(rows)
    return total_RH


def _picked(part: Tensor, rows: Tensor, take: Take) -> Tensor:
    found = take((len(rows), *part.shape[1:]), part.dtype)
    _bytes(found)[:] = _bytes(part)[rows]
    return found


def _bytes(part: Tensor) -> Tensor:
    """FP8 can't be indexed on every device; its bytes can."""
    return part.view(torch.uint8) if part.dtype.itemsize == 1 else part
