"""The least time a rank's share can take: the larger of arithmetic over peak rate and weight bytes over bandwidth."""

from __future__ import annotations

from moe_dist.bench.peaks import Peaks, peaks_of
from moe_dist.model.placement import Placement
from moe_dist.model.spec import MoESpec
from moe_dist.model.weights import ExpertWeights


def rank_flops(spec: MoESpec, placement: Placement, rank: int, rows: int) -> float:
    """Multiply-adds count two; `rows` are (token, expert) pairs."""
    width = placement.width_of(rank)
    return 2.0 * rows * spec.hidden * (spec.w13_rows(width) + width)


def rank_weight_bytes(spec: MoESpec, placement: Placement, rank: int, active_experts: int) -> int:
    """Bytes of the experts that have rows, scales not counted."""
    return ExpertWeights.bytes_of(spec, active_experts, placement.width_of(rank), scales=False)


def floor_us(
    spec: MoESpec, placement: Placement, rows_per_rank: list[int], active_per_rank: list[int], device: str
) -> float | None:
    """The largest rank's floor in microseconds, exchange not counted; None for a device without measured peaks."""
    peaks = peaks_of(device)
    if peaks is None:
        return None
    return max(
        rank_floor_us(spec, placement, rank, rows, active, peaks)
        for rank, (rows, active) in enumerate(zip(rows_per_rank, active_per_rank, strict=True))
    )


def balanced_floor_us(
    spec: MoESpec, placement: Placement, rows_per_rank: list[int], active_per_rank: list[int], device: str
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
        flops[rank % tp] += rank_flops(spec, placement, rank, rows) / ep
        traffic[rank % tp] += rank_weight_bytes(spec, placement, rank, active) / ep
    return 1e6 * max(max(flops) / rate, max(traffic) / peaks.bandwidth)


def rank_floor_us(spec: MoESpec, placement: Placement, rank: int, rows: int, active: int, peaks: Peaks) -> float:
    """One rank's floor: `rows` pairs on `active` experts."""
    rate = peaks.fp8_flops if spec.quantized else peaks.bf16_flops
    return 1e6 * max(
        rank_flops(spec, placement, rank, rows) / rate,
        rank_weight_bytes(spec, placement, rank, active) / peaks.bandwidth,
    )
