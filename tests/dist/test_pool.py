"""The pool that every distributed test stands on."""

from __future__ import annotations

import os
import time

import pytest
import torch
from dist.pool import Pool

from moe_dist.comm import Comm
from moe_dist.errors import ConfigError


def whoami(comm: Comm, offset: int) -> tuple[int, int, float]:
    return comm.rank + offset, comm.world, float(comm.all_reduce(torch.tensor([1.0 + comm.rank]))[0])


def misbehave(comm: Comm, how: str) -> None:
    if comm.rank != 1:
        comm.barrier()  # never completes: rank 1 does not come
    if how == "raise":
        raise ConfigError("field", comm.rank, "on purpose")
    if how == "die":
        os._exit(3)
    time.sleep(60)


def test_results_come_in_rank_order(pool: Pool) -> None:
    for world in (1, 2, 3, 8, 2):
        total = world * (world + 1) / 2
        assert pool.run(world, whoami, 10) == [(10 + rank, world, total) for rank in range(world)]


def test_failures_name_the_rank_and_the_pool_recovers() -> None:
    with Pool(size=2, timeout_s=2.0) as small:
        with pytest.raises(ConfigError) as raised:
            small.run(2, misbehave, "raise", timeout_s=20.0)
        note = "\n".join(raised.value.__notes__)
        assert "raised on rank 1 of 2" in note
        assert "in misbehave" in note
        # Rank 0 is freed by gloo once rank 1's end is gone, or it is reported as silent; either way the pool is new.
        assert [rank for rank, *_ in small.run(2, whoami, 0)] == [0, 1]
        with pytest.raises(EOFError) as raised_eof:
            small.run(2, misbehave, "die", timeout_s=20.0)
        assert "rank 1 of 2" in raised_eof.value.__notes__[0]
        with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 did not answer within 1 s"):
            small.run(2, misbehave, "sleep", timeout_s=1.0)
