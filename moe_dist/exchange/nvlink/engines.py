"""When copy engines move what crosses, and how it is cut for them. Nothing here may change between a layer's steps, or
differ between ranks.

They take no multiprocessor, so copies can travel under a GEMM. On a busy GPU a copy may begin 0.2 ms late. Copies know
no gaps: rows and sums that nobody needs travel too.
"""

from __future__ import annotations

from moe_dist.model.sizes import cdiv

CHUNKS = 4  # at most, of a step's sums
# Bytes of sums that leave a rank, from which on they are cut; 0: never, as long as no GPU has shown what it gains. From
# 64 MiB on it might: these take 0.18 ms at 370 GB/s, as long as a copy may be late.
CHUNKED_FROM = 0
GRAIN = 256  # columns: a chunk is made of whole tiles of GEMM2
# Bytes of rows that leave a rank, from which on copy engines take them; 0: never, as long as no GPU has shown what it
# gains. It might where a rank's own rows keep GEMM1 busy for as long as the others' travel: from two tiles of own
# tokens for an expert on.
COPIED_FROM = 0


def chunk_width(world: int, bucket: int, hidden: int, itemsize: int) -> int:
    """Columns of a chunk of sums; the last one has what is left. All of `hidden`: they are not cut."""
    if not 0 < CHUNKED_FROM <= (world - 1) * bucket * hidden * itemsize:
        return hidden
    return min(hidden, cdiv(cdiv(hidden, CHUNKS), GRAIN) * GRAIN)


def rows_are_copied(world: int, bucket: int, row_bytes: int) -> bool:
    return 0 < COPIED_FROM <= (world - 1) * bucket * row_bytes
