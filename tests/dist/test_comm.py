"""Comm against brute force, and what it says when a rank does not come."""

from __future__ import annotations

import os
import random
import threading
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dist.pool import Pool, fresh_processes
from torch import Tensor

from moe_dist.comm import Comm
from moe_dist.errors import ConfigError, RankFailure

WORLDS = [1, 2, 3, 4, 8]
DTYPES = [torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.float8_e4m3fn]


def part(rank: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """What rank `rank` brings, known to every rank; whole numbers, so sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(1000 * rank + 10 * rows + columns)
    return torch.randint(0, 8, (rows, columns), generator=generator).to(torch.float32).to(dtype)


def same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and bytes_of(found) == bytes_of(expected)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def gather_everything(comm: Comm, rows: int) -> list[str]:
    parts = [part(comm.rank, rows, 3 + i, dtype) for i, dtype in enumerate(DTYPES)]
    strided = part(comm.rank, 4, rows, torch.float32).T  # not contiguous
    gathered = comm.all_gather([*parts, strided])
    wrong = []
    for i, dtype in enumerate(DTYPES):
        if not same(gathered[i], torch.cat([part(rank, rows, 3 + i, dtype) for rank in range(comm.world)])):
            wrong.append(str(dtype))
    if not same(gathered[-1], torch.cat([part(rank, 4, rows, torch.float32).T for rank in range(comm.world)])):
        wrong.append("strided")
    return wrong


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("world", WORLDS)
def test_all_gather(pool: Pool, world: int, rows: int) -> None:
    assert pool.run(world, gather_everything, rows) == [[]] * world


def sum_everything(comm: Comm, rows: int) -> list[str]:
    wrong = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64):
        inputs = [part(rank, comm.world * rows, 6, dtype) for rank in range(comm.world)]
        total = torch.stack(inputs).float().sum(0).to(dtype)
        own = inputs[comm.rank]
        if not same(comm.reduce_scatter(own), total[comm.rank * rows : (comm.rank + 1) * rows]):
            wrong.append(f"reduce_scatter {dtype}")
        strided = own.T.contiguous().T
        if not same(comm.reduce_scatter(strided), total[comm.rank * rows : (comm.rank + 1) * rows]):
            wrong.append(f"reduce_scatter of a strided {dtype}")
        summed = own.clone()
        if not same(comm.all_reduce(summed), total) or not same(summed, total):
            wrong.append(f"all_reduce {dtype}")
    return wrong


@pytest.mark.parametrize("rows", [0, 1, 4])
@pytest.mark.parametrize("world", WORLDS)
def test_sums(pool: Pool, world: int, rows: int) -> None:
    assert pool.run(world, sum_everything, rows) == [[]] * world


def swap_everything(comm: Comm, seed: int) -> list[str]:
    """counts[a][b] rows go from a to b; zeros are common, sometimes a rank sends or gets nothing at all."""
    choose = random.Random(f"{seed} {comm.world}")
    counts = [[choose.choice([0, 0, 1, 5]) for _ in range(comm.world)] for _ in range(comm.world)]
    if seed % 3 == 0:
        counts[0] = [0] * comm.world
    if seed % 3 == 1:
        for row in counts:
            row[-1] = 0
    if comm.world == 1:
        counts = [[4]]

    def sent(source: int, i: int) -> Tensor:
        return part(source, sum(counts[source]), 2 + i, DTYPES[i])

    send = counts[comm.rank]
    receive = [row[comm.rank] for row in counts]
    wrong = [] if comm.to_host(torch.tensor([send, receive]))() == [send, receive] else ["to_host"]
    got = comm.all_to_all([sent(comm.rank, i) for i in range(len(DTYPES))], send, receive)
    into = [torch.zeros_like(rows) for rows in got]
    comm.all_to_all([sent(comm.rank, i) for i in range(len(DTYPES))], send, receive, into=into)
    for i, dtype in enumerate(DTYPES):
        pieces = []
        for source in range(comm.world):
            start = sum(counts[source][: comm.rank])
            pieces.append(sent(source, i)[start : start + counts[source][comm.rank]])
        for name, rows in (("new", got[i]), ("into", into[i])):
            if not same(rows, torch.cat(pieces)):
                wrong.append(f"{name} {dtype} {counts}")
    comm.all_to_all([sent(comm.rank, 0)], send, receive, into=[into[0].fill_(0)])
    return wrong if same(into[0], got[0]) else [*wrong, f"one part into {counts}"]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("world", WORLDS)
def test_all_to_all(pool: Pool, world: int, seed: int) -> None:
    assert pool.run(world, swap_everything, seed) == [[]] * world


def agree(comm: Comm) -> list[int]:
    return [comm.agree_max(value) for value in (comm.rank, -comm.rank - 1, 7, 1 << 40)]


@pytest.mark.parametrize("world", WORLDS)
def test_agree_max(pool: Pool, world: int) -> None:
    assert pool.run(world, agree) == [[world - 1, -1, 7, 1 << 40]] * world


def count(comm: Comm) -> list[tuple[str, int, int]]:
    """(operation, collectives counted, bytes counted) for one call of each."""
    world, counted = comm.world, []
    fp8 = torch.zeros(5, 3).to(torch.float8_e4m3fn)
    even = [2] * world
    for name, call in {
        "all_gather": lambda: comm.all_gather([torch.zeros(5, 3), fp8]),
        "reduce_scatter": lambda: comm.reduce_scatter(torch.zeros(4 * world, 3, dtype=torch.bfloat16)),
        "all_reduce": lambda: comm.all_reduce(torch.zeros(world, 3)),
        "all_to_all": lambda: comm.all_to_all([torch.zeros(2 * world, 3), torch.zeros(2 * world, 1)], even, even),
        "agree_max": lambda: comm.agree_max(1),
        "barrier": comm.barrier,
    }.items():
        before = comm.sequence, comm.bytes_sent
        call()
        counted.append((name, comm.sequence - before[0], comm.bytes_sent - before[1]))
    return counted


@pytest.mark.parametrize("world", WORLDS)
def test_every_collective_counts_once_and_books_what_leaves_the_rank(pool: Pool, world: int) -> None:
    others = world - 1
    expected = {
        "all_gather": others * (5 * 3 * 4 + 5 * 3),
        "reduce_scatter": others * 4 * 3 * 2,
        "all_reduce": 2 * others * 3 * 4,
        "all_to_all": others * 2 * (3 + 1) * 4,
        "agree_max": 0,
        "barrier": 0,
    }
    for counted in pool.run(world, count):
        assert counted == [(name, int(world > 1), size) for name, size in expected.items()]


def book_uneven(comm: Comm) -> int:
    """Rank r sends r + 1 rows of 3 floats to everyone, itself included."""
    send, receive = [comm.rank + 1] * comm.world, [rank + 1 for rank in range(comm.world)]
    comm.all_to_all([torch.zeros(sum(send), 3)], send, receive)
    return comm.bytes_sent


def test_rows_for_oneself_are_not_sent(pool: Pool) -> None:
    assert pool.run(4, book_uneven) == [3 * 12 * (rank + 1) for rank in range(4)]


def test_from_group_needs_a_group() -> None:
    with pytest.raises(ConfigError, match="not initialized"):
        Comm.from_group("cpu")


TIMEOUT_S = 3.0
OPERATIONS = {
    "all_gather": lambda comm: comm.all_gather([torch.zeros(2, 3)]),
    "reduce_scatter": lambda comm: comm.reduce_scatter(torch.zeros(4, 3)),
    "all_reduce": lambda comm: comm.all_reduce(torch.zeros(4)),
    "all_to_all": lambda comm: comm.all_to_all([torch.zeros(4, 3)], [2, 2], [2, 2]),
    "agree_max": lambda comm: comm.agree_max(1),
    "barrier": lambda comm: comm.barrier(),
    "meet": lambda comm: comm.meet(1, None, alike=False),
}


def _wait_in_vain(rank: int, port: int, results: Connection) -> None:
    """Rank 0 enters every operation, each in a group of its own and all at once; rank 1 only lives on."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    comm = Comm.join(rank, 2, store, torch.device("cpu"), 60.0)
    longer = timedelta(seconds=60)  # of the groups: the timeout of a Comm holds
    groups = {name: dist.new_group([0, 1], timeout=longer) for name in OPERATIONS}
    comms = {name: Comm.from_group("cpu", group, TIMEOUT_S) for name, group in groups.items()}
    for own in comms.values():
        own.barrier()  # sequence number 1, and proof that the group works
    comm.barrier()
    if rank == 1:
        time.sleep(60)
    found: dict[str, Any] = {}

    def enter(name: str) -> None:
        start = time.monotonic()
        comms[name].take_over()
        try:
            OPERATIONS[name](comms[name])
            found[name] = "nothing was raised"
        except RankFailure as error:
            found[name] = (error.rank, error.op, error.seq, error.cause, time.monotonic() - start)
        except BaseException as error:
            found[name] = repr(error)

    threads = [threading.Thread(target=enter, args=(name,)) for name in OPERATIONS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.send(found)
    os._exit(0)


def _groups_that_end(rank: int, port: int, results: Connection) -> None:
    """The default group is destroyed under a Comm, and another one formed in which the ranks have changed places."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    comms = [Comm.join(rank, 2, store, torch.device("cpu"), 10.0)]
    comms.append(Comm.from_group("cpu", dist.new_group([0, 1])))
    for comm in comms:
        comm.barrier()
    dist.destroy_process_group()
    found = [_said(comm) for comm in comms]
    dist.init_process_group("gloo", store=dist.PrefixStore("second", store), rank=1 - rank, world_size=2)
    found += [_said(comm) for comm in comms]
    assert Comm.from_group("cpu").agree_max(rank) == 1
    if rank == 0:
        results.send(found)
    os._exit(0)


def _said(comm: Comm) -> str:
    try:
        return str(comm.agree_max(1))
    except RankFailure as error:
        return str(error)


def _join_alone(_: int, port: int, results: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=TIMEOUT_S))
    try:
        Comm.join(0, 2, store, torch.device("cpu"), TIMEOUT_S)
        results.send("nothing was raised")
    except RankFailure as error:
        results.send((error.rank, error.op, error.cause))
    os._exit(0)


def result_of_rank_0(function: Any, ranks: int, timeout_s: float) -> Any:
    """What rank 0 of fresh processes sends back; all of them are gone afterwards."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = fresh_processes()
    here, there = context.Pipe()
    workers = [context.Process(target=function, args=(rank, store.port, there), daemon=True) for rank in range(ranks)]
    try:
        for worker in workers:
            worker.start()
        assert here.poll(timeout_s), f"rank 0 did not answer within {timeout_s} s"
        return here.recv()
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def test_a_rank_that_never_comes_is_a_rank_failure_in_time() -> None:
    found = result_of_rank_0(_wait_in_vain, 2, 60.0)
    assert found.keys() == OPERATIONS.keys()
    for name, outcome in found.items():
        assert not isinstance(outcome, str), f"{name}: {outcome}"
        rank, op, seq, cause, seconds = outcome
        assert (rank, op, seq) == (0, name, 2)
        assert cause
        assert "\n" not in cause
        assert 0.8 * TIMEOUT_S <= seconds <= TIMEOUT_S + 5, name


def test_a_comm_does_not_outlive_its_group() -> None:
    for said in result_of_rank_0(_groups_that_end, 2, 60.0):
        assert said.startswith("rank 0 failed in agree_max (sequence number ")
        assert "the process group of this Comm was destroyed" in said


def test_a_rendezvous_that_nobody_joins_is_a_rank_failure() -> None:
    rank, op, cause = result_of_rank_0(_join_alone, 1, 60.0)
    assert rank == 0
    assert "rendezvous" in op
    assert "2 ranks" in op
    assert cause
