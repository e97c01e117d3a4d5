"""Pairs put in the order of their experts: the launches of align.py's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_dist.kernels.triton.align import _count, _place, _prepare, _tables
from moe_dist.kernels.triton.launch import launch as launch_kernel
from moe_dist.model.quantization import FP8_MAX, TINY
from moe_dist.model.sizes import cdiv, power_of_2
from moe_dist.step import ExpertRows, Take, TokenRows

GROUPS_TOGETHER = 16  # groups of 128 that one program quantizes
MOST_PAIRS_TOGETHER = 4096  # beyond, one program for each expert that reads all pairs takes too long
MOST_CHUNKS = 128  # of many pairs; each has a program that adds up the counts of all, and the chip has as many SMs
UNREAD_TILE = 1024  # where nobody reads the table of tiles: as small as can be
COMPARED = 256  # pairs of a chunk with each other, one by each thread

# A kernel, its grid, tensors, integers and constants, and its numbers of warps and stages.
Launch = Callable[[Any, tuple[int, int, int], tuple[Any, ...], tuple[int, ...], tuple[Any, ...], tuple[int, int]], None]
Lists = tuple[Tensor, Tensor, Tensor, Tensor]  # table, starts, stops, order: see pipeline.Pipeline


class Quantizing(NamedTuple):
    """What the same launch quantizes beside its own work: `groups` of 128 columns of the first of `rows` (bf16, codes,
    scales), whose rows have `hidden` columns."""

    rows: tuple[Tensor, Tensor, Tensor]
    groups: int
    hidden: int

    @property
    def programs(self) -> int:
        return cdiv(self.groups, GROUPS_TOGETHER)


def sort_pairs(
    launch: Launch, take: Take, slots_RK: Tensor, lists: Lists, taken: Tensor, tile: int, quantizing: Quantizing
) -> None:
    """Fill `lists` with the pairs of `slots_RK` for tiles of so many, and `taken` with zeros."""
    sort = _sort_few if slots_RK.numel() <= MOST_PAIRS_TOGETHER else _sort_many
    sort(launch, take, slots_RK, lists, taken, tile, quantizing)


def _sort_few(
    launch: Launch, take: Take, slots_RK: Tensor, lists: Lists, taken: Tensor, tile: int, quantizing: Quantizing
) -> None:
    (R, K), (table, starts, *_) = slots_RK.shape, lists
    block = min(4096, power_of_2(max(slots_RK.numel(), 16)))
    launch(
        _prepare,
        (len(starts) + quantizing.programs, 1, 1),
        (slots_RK, *quantizing.rows, *lists, taken),
        (R, len(table)),
        (len(starts), K, tile, block, quantizing.hidden, GROUPS_TOGETHER, FP8_MAX, TINY),
        (8, 1),
    )


def _sort_many(
    launch: Launch, take: Take, slots_RK: Tensor, lists: Lists, taken: Tensor, tile: int, quantizing: Quantizing
) -> None:
    """Chunks of pairs are counted, beside the quantizing, before any of them is placed."""
    (R, K), (table, starts, *_), pairs = slots_RK.shape, lists, slots_RK.numel()
    length = cdiv(pairs, MOST_CHUNKS * COMPARED) * COMPARED
    chunks, wide = cdiv(pairs, length), max(32, power_of_2(len(starts)))
    counts, ranks = take((chunks, wide), torch.int32), take((pairs,), torch.int32)
    launch(
        _count,
        (chunks + quantizing.programs, 1, 1),
        (slots_RK, *quantizing.rows, counts, ranks, taken),
        (R, length, chunks),
        (K, wide, COMPARED, 16, quantizing.hidden, GROUPS_TOGETHER, FP8_MAX, TINY),
        (8, 1),
    )
    launch(
        _place,
        (chunks, 1, 1),
        (slots_RK, counts, ranks, *lists),
        (R, len(table), length, chunks),
        (len(starts), K, wide, max(1, min(MOST_CHUNKS, 4096 // wide)), tile, 512),
        (8, 1),
    )


def tables_of(
    launch: Launch, rows: ExpertRows, table: Tensor, taken: Tensor, tile: int, quantizing: Quantizing
) -> None:
    """`table` for pairs that came sorted, and zeros in `taken`."""
    launch(
        _tables,
        (len(rows.starts_e) + quantizing.programs, 1, 1),
        (*quantizing.rows, rows.starts_e, rows.stops_e, table, taken),
        (len(rows), len(table)),
        (len(rows.starts_e), tile, quantizing.hidden, GROUPS_TOGETHER, FP8_MAX, TINY),
        (8, 1),
    )


def sorted_by_expert(rows: TokenRows, experts: int, take: Take) -> ExpertRows:
    """See kernels.sorted_by_expert."""
    slots_RK, pairs = rows.slots_RK.contiguous(), rows.slots_RK.numel()
    sizes = (pairs // UNREAD_TILE + experts, experts, experts, pairs)
    table, starts, stops, order = (take((size,), torch.int32) for size in sizes)
    taken = take((2,), torch.int32)
    nothing = Quantizing((slots_RK, slots_RK, slots_RK), 0, 128)
    sort_pairs(_launched, take, slots_RK, (table, starts, stops, order), taken, UNREAD_TILE, nothing)
    return ExpertRows(rows.x, rows.slots_RK, rows.weights_RK, starts, stops, order, arrivals=rows.arrivals)


def _launched(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Any, ...],
    integers: tuple[int, ...],
    constants: tuple[Any, ...],
    warps_and_stages: tuple[int, int],
) -> None:
    warps, stages = warps_and_stages
    launch_kernel(kernel, grid, tensors, integers, (*constants, False), num_warps=warps, num_stages=stages)
