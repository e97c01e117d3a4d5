"""The least time a rank's share can take: the larger of arithmetic over peak rate and weight bytes over bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moe_dist.bench.peaks import Peaks, peaks_of
from moe_dist.engine.plan import shared_placement
from moe_dist.model.placement import Placement
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import ExpertWeights


class Beside(NamedTuple):
    """What a rank computes beside its routed experts: arithmetic, and bytes of weights, scales not counted."""

    flops: float = 0.0
    weight_bytes: int = 0


NOTHING = Beside()


def of_shared(spec: MoESpec, parallel: ParallelSpec, tokens: int, own: Sequence[int]) -> list[Beside]:
    """By rank its part of the shared expert, in one layer: a slice of it for all `tokens`, or the whole of it for
    those that the rank has (`own`). Padding is not counted. Without a token no weight is read."""
    if spec.shared_experts == "none":
        return [NOTHING] * parallel.world
    shared, placement = spec.shared_spec(), shared_placement(spec, parallel)
    rows = own if spec.shared_experts == "replicated" else [tokens] * parallel.world
    return [
        Beside(rank_flops(shared, placement, rank, count), rank_weight_bytes(shared, placement, rank, int(count > 0)))
        for rank, count in enumerate(rows)
    ]


def rank_flops(spec: MoESpec, placement: Placement, rank: int, rows: int) -> float:
    """Multiply-adds count two; `rows` are (token, expert) pairs."""
    width = placement.width_of(rank)
    return 2.0 * rows * spec.hidden * (spec.w13_rows(width) + width)


def rank_weight_bytes(spec: MoESpec, placement: Placement, rank: int, active_experts: int) -> int:
    """Bytes of the experts that have rows, scales not counted."""
    return ExpertWeights.bytes_of(spec, active_experts, placement.width_of(rank), scales=False)


def floor_us(
    spec: MoESpec,
    placement: Placement,
    rows_per_rank: list[int],
    active_per_rank: list[int],
    device: str,
    beside: Sequence[Beside] = (),
) -> float | None:
    """The largest rank's floor in microseconds, exchange not counted; None for a device without measured peaks.
    `beside`: by rank what comes on top (`of_shared`)."""
    peaks = peaks_of(device)
    if peaks is None:
        return None
    return max(
        rank_floor_us(spec, placement, rank, rows, active, peaks, beside[rank] if beside else NOTHING)
        for rank, (rows, active) in enumerate(zip(rows_per_rank, active_per_rank, strict=True))
    )


def balanced_floor_us(
    spec: MoESpec,
    placement: Placement,
    rows_per_rank: list[int],
    active_per_rank: list[int],
    device: str,
    beside: Sequence[Beside] = (),
) -> float | None:
    """What `floor_us` would be if pairs and experts that have any were spread perfectly over the groups of experts:
    the mean of their arithmetic and the mean of their traffic, on the widest slices. No rearrangement of these experts
    can have a lower floor, since the largest of several numbers is at least their mean (Graham, Bounds on
    Multiprocessing Timing Anomalies, 1969). Copies count where they have pairs. With one group it is the floor."""
    peaks, tp, ep = peaks_of(device), placement.tp, placement.ep
    if peaks is None:
        return None
    rate = peaks.fp8_flops if spec.quantized else peaks.bf16_flops
    flops, traffic = [0.0] * tp, [0.0] * tp
    for rank, (rows, active) in enumerate(zip(rows_per_rank, active_per_rank, strict=True)):
        more = beside[rank] if beside else NOTHING
        flops[rank % tp] += (rank_flops(spec, placement, rank, rows) + more.flops) / ep
        traffic[rank % tp] += (rank_weight_bytes(spec, placement, rank, active) + more.weight_bytes) / ep
    return 1e6 * max(max(flops) / rate, max(traffic) / peaks.bandwidth)


def rank_floor_us(
    spec: MoESpec, placement: Placement, rank: int, rows: int, active: int, peaks: Peaks, beside: Beside = NOTHING
) -> float:
    """One rank's floor: `rows` pairs on `active` experts, and what it computes beside them."""
    rate = peaks.fp8_flops if spec.quantized else peaks.bf16_flops
    return 1e6 * max(
        (rank_flops(spec, placement, rank, rows) + beside.flops) / rate,
        (rank_weight_bytes(spec, placement, rank, active) + beside.weight_bytes) / peaks.bandwidth,
    )
