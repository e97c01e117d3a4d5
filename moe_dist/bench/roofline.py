"""The least time a rank's share can take: the larger of arithmetic over peak rate and weight bytes over bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moe_dist.bench.peaks import Peaks, peaks_of
from moe_dist.engine.plan import shared_placement
from moe_dist.model.placement import Placement
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import ExpertWeights


class RankWork(NamedTuple):
    """Of one rank in one layer: arithmetic, in which a multiply-add counts two, and bytes of the experts that have
    rows, scales not counted."""

    flops: float
    weight_bytes: float


def rank_work(spec: MoESpec, placement: Placement, rank: int, rows: int, active: int) -> RankWork:
    """Of `rows` (token, expert) pairs on `active` experts."""
    width = placement.width_of(rank)
    return RankWork(
        2.0 * rows * spec.hidden * (spec.w13_rows(width) + width),
        ExpertWeights.bytes_of(spec, active, width, scales=False),
    )


def group_work(
    spec: MoESpec,
    placement: Placement,
    rows_per_rank: Sequence[int],
    active_per_rank: Sequence[int],
    beside: Sequence[RankWork] = (),
) -> list[RankWork]:
    """Of every rank. `beside`: what each computes on top (`of_shared`)."""
    loads = zip(rows_per_rank, active_per_rank, strict=True)
    routed = [rank_work(spec, placement, rank, *load) for rank, load in enumerate(loads)]
    if not beside:
        return routed
    return [RankWork(*map(sum, zip(*both, strict=True))) for both in zip(routed, beside, strict=True)]


def of_shared(spec: MoESpec, parallel: ParallelSpec, tokens: int, own: Sequence[int]) -> list[RankWork]:
    """Every rank's part of the shared expert, none where there is none: a slice of it for all `tokens`, or the whole of
    it for those that the rank has (`own`). Padding is not counted. Without a token no weight is read."""
    if spec.shared_experts == "none":
        return []
    rows = own if spec.shared_experts == "replicated" else [tokens] * parallel.world
    return group_work(spec.shared_spec(), shared_placement(spec, parallel), rows, [int(count > 0) for count in rows])


def floor_us(spec: MoESpec, works: Sequence[RankWork], device: str) -> float | None:
    """The largest rank's floor in microseconds, exchange not counted; None for a device without measured peaks."""
    peaks = peaks_of(device)
    return None if peaks is None else max(rank_floor_us(spec, work, peaks) for work in works)


def balanced_floor_us(spec: MoESpec, placement: Placement, works: Sequence[RankWork], device: str) -> float | None:
    """What `floor_us` would be if pairs and experts that have any were spread perfectly over the groups of experts:
    the mean of their arithmetic and the mean of their traffic, on the widest slices. No rearrangement of these experts
    can have a lower floor, since the largest of several numbers is at least their mean (Graham, Bounds on
    Multiprocessing Timing Anomalies, 1969). Copies count where they have pairs. With one group it is the floor."""
    means = [  # of each slice
        RankWork(*(sum(each) / placement.ep for each in zip(*works[place :: placement.tp], strict=True)))
        for place in range(placement.tp)
    ]
    return floor_us(spec, [RankWork(*map(max, zip(*means, strict=True)))], device)


def rank_floor_us(spec: MoESpec, work: RankWork, peaks: Peaks) -> float:
    rate = peaks.fp8_flops if spec.quantized else peaks.bf16_flops
    return 1e6 * max(work.flops / rate, work.weight_bytes / peaks.bandwidth)
