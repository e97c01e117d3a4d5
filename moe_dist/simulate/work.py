"""What the busiest rank of a step does, in bytes and in microseconds at the device's peak rates."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from moe_dist.bench.peaks import Peaks
from moe_dist.bench.roofline import rank_work
from moe_dist.exchange.rows import payload_row_bytes
from moe_dist.model.placement import Placement
from moe_dist.model.spec import MoESpec


@dataclass(frozen=True)
class Work:
    """Of one step: the format, and numbers that a cost model knows a range of. `flops` and `weight_bytes` are those of
    the roofline, `moved_bytes` what rows take in device memory, `sent_bytes` what a rank sends."""

    quant: str
    quantized: bool
    gated: bool
    world: int
    hidden: int
    width: int
    pairs: int
    active: int
    flops: float
    weight_bytes: float
    moved_bytes: float
    sent_bytes: float

    def at_peak_us(self, peaks: Peaks) -> tuple[float, float, float]:
        """Arithmetic, weights and rows, each alone at the device's measured peak rate."""
        rate = peaks.fp8_flops if self.quantized else peaks.bf16_flops
        return (
            1e6 * self.flops / rate,
            1e6 * self.weight_bytes / peaks.bandwidth,
            1e6 * self.moved_bytes / peaks.bandwidth,
        )


def work_of(spec: MoESpec, placement: Placement, pairs: int, active: int, sent_bytes: float) -> Work:
    """`pairs` and `active` experts of the busiest rank, which has the widest slice. A pair's row is read, its
    activation is written and read, and its output is written and read in 16 bits."""
    of_rank = rank_work(spec, placement, 0, pairs, active)
    width, size = placement.width_of(0), 1 if spec.quantized else spec.torch_dtype.itemsize
    return Work(
        quant=spec.quant_label,
        quantized=spec.quantized,
        gated=spec.gated,
        world=placement.world,
        hidden=spec.hidden,
        width=width,
        pairs=pairs,
        active=active,
        flops=of_rank.flops,
        weight_bytes=of_rank.weight_bytes,
        moved_bytes=pairs * (size * (spec.hidden + 2 * width) + 4 * spec.hidden),
        sent_bytes=sent_bytes,
    )


def row_bytes(spec: MoESpec, payload: str, combine_itemsize: int) -> int:
    """A token's row to another rank and a partial sum back."""
    return payload_row_bytes(spec, payload) + spec.hidden * combine_itemsize


def padded_bytes(placement: Placement, tokens_per_rank: int, row: int) -> float:
    """Sent by a rank that sends every other one a row for each of its tokens."""
    return float(tokens_per_rank * row * (placement.world - 1))


def even_bytes(spec: MoESpec, placement: Placement, tokens_per_rank: int, row: int) -> float:
    """Sent by a rank that sends a row only to ranks that hold one of its token's experts: expected for experts drawn
    evenly without replacement, of which a group of n experts has none with odds C(E-n, K) / C(E, K)."""
    E, K = spec.num_experts, spec.top_k
    reached = sum(1 - comb(E - len(home), K) / comb(E, K) for home in placement.homes) * placement.tp
    return tokens_per_rank * row * reached * (placement.world - 1) / placement.world
