"""When copy engines move what crosses, and how it is cut for them. Nothing here may change between a layer's steps, or
differ between ranks.

They take no multiprocessor, so copies can travel under a GEMM. On a busy GPU a copy may begin 0.2 ms late. Copies know
no gaps: rows and sums that nobody needs travel too.
"""

from __future__ import annotations

from moe_dist.model.sizes import cdiv

CHUNKS = 4  # at most, of a step's sums
# Bytes of sums that leave a rank, from which on they are cut; 0: never, as long as no GPU has shown what it gains. On
# two H200s it gained nothing: at 8,192 tokens a rank (112 MiB) GEMM2 in four parts took 110 µs longer, and the whole
# step 200 of 5,930 (benchmarks/2026-11-28-nvlink-settings.json). Three times as much leaves a rank of four.
CHUNKED_FROM = 0
GRAIN = 256  # columns: a chunk is made of whole tiles of GEMM2
# Bytes of rows that leave a rank, from which on copy engines take them; 0: never, as long as no GPU has shown what it
# gains. In the same run dispatch took 144 µs less and GEMM1 83 more; the step was the same within its scatter, and 1 %
# shorter in a queue.
COPIED_FROM = 0


def chunk_width(world: int, bucket: int, hidden: int, itemsize: int) -> int:
    """Columns of a chunk of sums; the last one has what is left. All of `hidden`: they are not cut."""
    if not 0 < CHUNKED_FROM <= (world - 1) * bucket * hidden * itemsize:
        return hidden
    return min(hidden, cdiv(cdiv(hidden, CHUNKS), GRAIN) * GRAIN)


def rows_are_copied(world: int, bucket: int, row_bytes: int) -> bool:
    return 0 < COPIED_FROM <= (world - 1) * bucket * row_bytes
