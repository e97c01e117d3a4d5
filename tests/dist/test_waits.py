"""Waits beside the collectives end too, with rank, operation and sequence number."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from dist.pool import Pool, group_of

from moe_dist.comm import Comm
from moe_dist.comm import group as comm_module
from moe_dist.errors import RankFailure, UnsupportedError

TIMEOUT_S = 2.0


def makes_no_comm(comm: Comm) -> tuple[int, str, int, str, float]:
    """The group has no backend for a CPU, as NCCL's; rank 1 never makes its Comm."""
    comm_module.backends_of = lambda group: {"cpu": "another"}
    if comm.rank == 1:
        return 0, "", 0, "", 0.0
    began = time.monotonic()
    try:
        Comm.from_group("cpu", group_of(2), timeout_s=TIMEOUT_S)
    except RankFailure as error:
        return error.rank, error.op, error.seq, error.cause, time.monotonic() - began
    return 0, "nothing was raised", 0, "", 0.0


def test_a_rank_that_makes_no_comm_is_waited_for_so_long() -> None:
    with Pool(2) as two:  # of its own: the ranks are out of step afterwards
        rank, op, seq, cause, seconds = two.run(2, makes_no_comm)[0]
    assert (rank, op, seq) == (0, "forming a group for the CPU", 0)
    assert "every rank of the group makes its Comm, within 2 s" in cause
    assert seconds < TIMEOUT_S + 5


def shares_no_memory(comm: Comm, error: str) -> tuple[str, str]:
    """torch's rendezvous ends with an error, as where a rank does not come or where GPUs don't reach each other."""

    def rendezvous(memory: torch.Tensor, group: dist.ProcessGroup) -> None:
        raise {"silent": dist.DistStoreError("wait timeout after 2000ms"), "apart": RuntimeError("no peer access")}[
            error
        ]

    real = symmetric_memory.empty, symmetric_memory.rendezvous, torch.cuda.synchronize
    symmetric_memory.empty, symmetric_memory.rendezvous = torch.empty, rendezvous
    torch.cuda.synchronize = lambda *_: None
    try:
        comm.window(100)
    except (RankFailure, UnsupportedError) as raised:
        return type(raised).__name__, str(raised)
    finally:
        symmetric_memory.empty, symmetric_memory.rendezvous, torch.cuda.synchronize = real
    return "", ""


@pytest.mark.parametrize(
    ("error", "name", "said"),
    [
        (
            "silent",
            "RankFailure",
            "failed in rendezvous of shared memory (sequence number 2): DistStoreError: wait timeout",
        ),
        ("apart", "UnsupportedError", "needs GPUs of one host that reach each other: no peer access"),
    ],
)
def test_shared_memory_that_ranks_wait_for_in_vain_is_no_matter_of_gpus(
    pool: Pool, error: str, name: str, said: str
) -> None:
    for found, text in pool.run(2, shares_no_memory, error):
        assert found == name
        assert said in text
