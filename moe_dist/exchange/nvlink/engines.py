"""What copy engines move in a step. Nothing here may change between a layer's steps, or differ between ranks.

They take no multiprocessor, so copies can travel under a GEMM. On a busy GPU a copy may begin 0.2 ms late. Copies know
no gaps: rows and sums that nobody needs travel too.
"""

from __future__ import annotations

from typing import NamedTuple

from moe_dist.model.placement import Placement
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import MoESpec

# Bytes of sums that leave a rank, from which on the first half of their columns goes ahead by copies, while GEMM2
# computes the other half; 0: never. On four H200s under EP4 a step of DeepSeek-V3 was 2.8 % shorter at 8,192 tokens a
# rank (336 MiB) and 1.1 % at 2,048 (84 MiB), both alike in each of two turns. With 43 % of the columns it was 2.6 and
# 1.2 %, with 32 % 0.8 % shorter and 0.9 % longer, with 64 % 1.6 and 0.3 % longer: then copies end after GEMM2
# (benchmarks/2026-11-28-variants.json, `ahead`).
AHEAD_FROM = 64 << 20
AHEAD_PART = 0.5  # of the columns: as many as travel while GEMM2 computes the others
# Bytes of sums that leave a rank, from which on two ranges go ahead, each this part of the columns: the second one
# travels while GEMM2 computes the rest. 0: never, as long as no GPU has shown what it gains.
TWICE_FROM = 0
TWICE_PART = 0.35
# Pairs of a row that a rank has in the mean. Sums that go ahead are written to scratch and copied. Weighted sums of
# more pairs are bound by reading them: there the stores into the peers' windows cost no time of their own.
MOST_PAIRS = 2
GRAIN = 256  # columns: whole tiles of GEMM2
# Bytes of rows that leave a rank, from which on copy engines take them; 0: never. On four H200s at 8,192 tokens a rank
# (173 MiB) a step was 3 % shorter, and 1 to 2 % in a queue: dispatch took 420 to 480 µs less, GEMM1 190 to 210 more. On
# two (58 MiB) it was the same within its scatter, and 1 % shorter in a queue (the same file).
COPIED_FROM = 100 << 20


class Ranges(NamedTuple):
    """Of the columns of sums: `number` ranges of `width` go ahead by copies, the others by kernels."""

    width: int = 0
    number: int = 0

    @property
    def columns(self) -> int:
        return self.width * self.number


def columns_ahead(spec: MoESpec, placement: Placement, bucket: int, itemsize: int) -> Ranges:
    leaving = (placement.world - 1) * bucket * spec.hidden * itemsize
    if not 0 < AHEAD_FROM <= leaving or spec.top_k > MOST_PAIRS * placement.ep:
        return Ranges()
    number, part = (2, TWICE_PART) if 0 < TWICE_FROM <= leaving else (1, AHEAD_PART)
    most = (spec.hidden - 1) // number // GRAIN * GRAIN  # some columns are left for the kernels
    width = min(cdiv(int(part * spec.hidden), GRAIN) * GRAIN, most)
    return Ranges(width, number) if width else Ranges()


def rows_are_copied(world: int, bucket: int, row_bytes: int) -> bool:
    return 0 < COPIED_FROM <= (world - 1) * bucket * row_bytes
