"""The debug mode on ranks: a collective that is not the same everywhere is told before it starts, by both sides."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dist.pool import Pool

from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.errors import RankFailure
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import shard
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

WORLD = 3
SECONDS = 5.0  # the timeout of the group is two minutes

Call = Callable[[Comm], Any]


def rows(count: int, columns: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(count, columns, dtype=dtype)


def swap(comm: Comm, send: list[int], receive: list[int], dtype: torch.dtype = torch.float32) -> Any:
    return comm.all_to_all([rows(sum(send), dtype=dtype)], send, receive)


# What most ranks call, what rank 1 calls, and what both sides are told.
MISMATCHES: dict[str, tuple[Call, Call, str]] = {
    "operation": (
        lambda comm: comm.all_reduce(rows(2)),
        lambda comm: comm.reduce_scatter(rows(6)),
        "ranks 0, 2: all_reduce of [2, 4] float32 (sequence number 3); "
        "rank 1: reduce_scatter of [6, 4] float32 (sequence number 3)",
    ),
    "size": (
        lambda comm: comm.all_gather([rows(2), rows(2, 1)]),
        lambda comm: comm.all_gather([rows(3), rows(3, 1)]),
        "ranks 0, 2: all_gather of [2, 4] float32, [2, 1] float32 (sequence number 3); "
        "rank 1: all_gather of [3, 4] float32, [3, 1] float32 (sequence number 3)",
    ),
    "dtype": (
        lambda comm: comm.all_reduce(rows(2)),
        lambda comm: comm.all_reduce(rows(2, dtype=torch.int32)),
        "ranks 0, 2: all_reduce of [2, 4] float32 (sequence number 3); "
        "rank 1: all_reduce of [2, 4] int32 (sequence number 3)",
    ),
    "columns": (
        lambda comm: swap(comm, [1, 1, 1], [1, 1, 1]),
        lambda comm: comm.all_to_all([rows(3, 5)], [1, 1, 1], [1, 1, 1]),
        "ranks 0, 2: all_to_all of rows of [4] float32 (sequence number 3); "
        "rank 1: all_to_all of rows of [5] float32 (sequence number 3)",
    ),
    "rows": (
        lambda comm: swap(comm, [1, 2, 1], [1, 2, 1]),
        lambda comm: swap(comm, [2, 2, 5], [2, 2, 2]),
        "rank 1 sends 5 rows to rank 2, which waits for 2, in all_to_all of rows of [4] float32",
    ),
    "number": (
        lambda comm: comm.barrier(),
        lambda comm: (setattr(comm, "sequence", comm.sequence + 2), comm.barrier()),
        "ranks 0, 2: barrier (sequence number 3); rank 1: barrier (sequence number 5)",
    ),
    "on the CPU": (
        lambda comm: comm.agree_max(1),
        lambda comm: comm.meet(1, None, alike=False),
        "ranks 0, 2: agree_max (sequence number 3); rank 1: meet of 3 numbers (sequence number 3)",
    ),
}


def mismatched(comm: Comm, what: str) -> tuple[int, str, float]:
    comm.guard()
    comm.barrier()
    comm.all_gather([rows(2)])  # alike: nothing is said
    usual, odd, _ = MISMATCHES[what]
    began = time.monotonic()
    try:
        (odd if comm.rank == 1 else usual)(comm)
    except RankFailure as error:
        return error.rank, error.cause, time.monotonic() - began
    finally:
        comm._user.guarded = False
    return -1, "nothing was raised", 0.0


@pytest.mark.parametrize("what", MISMATCHES)
def test_both_sides_of_a_mismatch_are_told_before_it_starts(pool: Pool, what: str) -> None:
    for rank, cause, seconds in pool.run(WORLD, mismatched, what):
        assert rank == 1
        assert MISMATCHES[what][2] in cause
        assert "form a new process group" in cause
        assert seconds < SECONDS


def layer_of(comm: Comm, exchange: str, debug: bool) -> MoELayer:
    spec = MoESpec(hidden=128, intermediate=128, num_experts=6, top_k=2)
    plan = make_plan(
        spec, ParallelSpec(ep=comm.world), exchange=exchange, backend="torch", machine=Machine.detect("cpu")
    )
    return MoELayer(plan, shard(random_weights(spec, 0), plan.placement, comm.rank), comm, debug=debug)


def stepped(comm: Comm, exchange: str) -> tuple[bool, bool, bool]:
    """Whether a layer in the debug mode gives what it gives without, and whether its group is guarded before and after
    its first step."""
    x = Stream("tokens", comm.rank).normal(5 + comm.rank, 128).bfloat16()
    routing = synthetic_routing(layer_of(comm, exchange, False).plan.spec, len(x), "uniform", comm.rank)
    plain, checked = layer_of(comm, exchange, False), layer_of(comm, exchange, True)
    expected, before = plain(x, routing), comm._user.guarded
    found = [checked(x, routing) for _ in range(3)]
    after, comm._user.guarded = comm._user.guarded, False
    return all(torch.equal(each, expected) for each in found), before, after


@pytest.mark.parametrize("exchange", ["ag_rs", "all_to_all"])
def test_a_layer_in_the_debug_mode_guards_its_group_and_gives_the_same(pool: Pool, exchange: str) -> None:
    assert pool.run(WORLD, stepped, exchange) == [(True, False, True)] * WORLD
