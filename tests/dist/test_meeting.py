"""Ranks that a program starts by itself form their group at an address."""

from __future__ import annotations

import os
import socket
from multiprocessing.connection import Connection
from typing import Any

import pytest
from dist.pool import fresh_processes

from moe_dist import Comm, Meeting
from moe_dist.errors import ConfigError, RankFailure

WORLD = 2


def _rank(rank: int, address: str, results: Connection) -> None:
    comm = Comm.join(rank, WORLD, address, "cpu", 30.0)
    results.send((rank, comm.agree_max(10 + rank), str(comm.device)))
    results.close()
    comm.barrier()
    os._exit(0)


def test_ranks_meet_at_an_address() -> None:
    meeting, context = Meeting(WORLD, timeout_s=30.0), fresh_processes()
    here, there = context.Pipe()
    workers = [context.Process(target=_rank, args=(rank, meeting.address, there), daemon=True) for rank in range(WORLD)]
    try:
        for worker in workers:
            worker.start()
        found = []
        for _ in workers:
            assert here.poll(60.0)
            found.append(here.recv())
        assert sorted(found) == [(0, 11, "cpu"), (1, 11, "cpu")]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def test_two_meetings_have_ports_of_their_own() -> None:
    first, second = Meeting(1), Meeting(1)
    assert first.address == f"127.0.0.1:{first.port}" != second.address


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"world": 0}, "world = 0: is the number of ranks"),
        ({"world": True}, "world = True: "),
        ({"world": 2, "host": "192.0.2.1"}, "host = '?192.0.2.1'?: can't be listened on"),
        ({"world": 2, "timeout_s": 0}, "timeout_s = 0: bounds every"),
    ],
)
def test_a_meeting_that_can_not_be(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Meeting(**arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((2, 2, "127.0.0.1:1", "cpu"), "rank = 2: is no rank of 2"),
        ((-1, 2, "127.0.0.1:1", "cpu"), "rank = -1: "),
        ((0, 2, "127.0.0.1", "cpu"), "address = '?127.0.0.1'?: is not that of a Meeting"),
        ((0, 2, "127.0.0.1:99999", "cpu"), "address = "),
        ((0, 2, "127.0.0.1:1", "gpu"), "device = "),
        ((0, 2, "127.0.0.1:1", "cpu", float("nan")), "timeout_s = nan"),
    ],
)
def test_a_rank_that_can_not_join(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Comm.join(*arguments)


def test_an_address_where_nobody_listens_is_a_rank_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # so that it is put back
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(RankFailure, match=r"rank 1 failed in meeting at 127\.0\.0\.1"):
            Comm.join(1, 2, f"127.0.0.1:{free.getsockname()[1]}", "cpu", 1.0)
