"""Which host reaches which through which interface, over real sockets of this machine, and what is to be set then."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace

import pytest

from moe_dist.machine.interfaces import Interface, own_addresses
from moe_dist.machine.network import chosen_by, gloos_choice, settings, wrong_settings
from moe_dist.runtime import pairs
from moe_dist.runtime.pairs import Doors, Place, Way, advise, reach


@pytest.fixture
def two():
    with Doors(0) as one, Doors(1) as other:
        yield one.place, other.place


def test_members_of_one_host_reach_each_other(two):
    ways = reach(*[two[0], two])
    assert {way.interface for way in ways} >= {"lo"}
    assert all(way.ok and way.milliseconds > 0 and way.megabytes_s > 0 for way in ways)
    assert {(way.source, way.target) for way in ways} == {(0, 1)}


def test_loopback_is_no_way_to_another_host(two):
    ways = reach(two[0], [replace(two[1], host="elsewhere")])
    assert all(way.interface not in two[1].loopbacks for way in ways)


def test_a_stranger_gets_nothing(two):
    _, address, port = two[1].doors[0]
    with socket.create_connection((address, port), timeout=5) as stranger:
        stranger.sendall(bytes(pairs.TOKEN) + b"x")
        stranger.settimeout(5)
        received = b""
        try:
            while part := stranger.recv(64):
                received += part
        except ConnectionResetError:
            pass
    assert received == b""


def test_another_host_at_the_same_address_is_noticed(two):
    """Bridges of containers have one address on every host, so a connection may come back to where it began."""
    (way, *_) = reach(two[0], [replace(two[1], token=bytes(pairs.TOKEN))])
    assert way.problem == "another host answers at this address"


def test_a_closed_door(two):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (way,) = reach(two[0], [Place(1, two[1].host, two[1].token, (("lo", "127.0.0.1", port),))])
    assert not way.ok
    assert "refused" in way.problem


def test_one_that_never_answers_is_given_up(two, monkeypatch):
    monkeypatch.setattr(pairs, "ANSWER_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = Place(1, two[1].host, two[1].token, (("lo", "127.0.0.1", silent.getsockname()[1]),))
        begin = time.monotonic()
        (way,) = reach(two[0], [place])
    assert time.monotonic() - begin < 5
    assert "no answer" in way.problem


def test_closing_ends_its_threads():
    before = set(threading.enumerate())
    doors = Doors(0)
    started = [each for each in threading.enumerate() if each not in before and each.name.startswith("moe-dist-door-")]
    assert len(started) == len(doors.place.doors)
    doors.close()
    for each in started:
        each.join(5)
    assert not any(each.is_alive() for each in started)


def ways(*given: tuple[int, int, str, float | None]) -> list[Way]:
    return [
        Way(source, target, name, "10.0.0.1", 0.1 if rate else None, rate, "" if rate else "timed out")
        for source, target, name, rate in given
    ]


PLACES = [
    Place(member, f"node{member}", b"", (("eth0", "10.0.0.1", 1), ("ib0", "10.1.0.1", 2), ("docker0", "172.17.0.1", 3)))
    for member in range(3)
]


class TestAdvice:
    def test_the_fastest_that_all_reach(self):
        found = ways(
            (1, 0, "eth0", 100.0), (2, 0, "eth0", 90.0), (1, 0, "ib0", 900.0), (2, 0, "ib0", 800.0),
            (0, 1, "eth0", 100.0), (2, 1, "eth0", 100.0), (0, 1, "ib0", 900.0), (2, 1, "ib0", None),
            (0, 2, "docker0", None), (1, 2, "docker0", None),
        )  # fmt: skip
        first, second, third = advise(PLACES, found)
        assert first.variables == {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0"}
        assert second.variables["GLOO_SOCKET_IFNAME"] == "eth0"  # not every member reaches its ib0
        assert third.variables == {}
        assert "no interface of node2 is reached by all others" in third.problem

    def test_one_member_alone_has_nothing_to_be_told(self):
        (only,) = advise(PLACES[:1], [])
        assert (only.variables, only.problem) == ({}, "")


HERE = [
    Interface("eth1", ("10.0.0.2",), True, 10000, False),
    Interface("eth10", ("10.1.0.2",), True, 0, False),
    Interface("lo", ("127.0.0.1", "::1"), True, 0, True),
]


class TestInterfaces:
    @pytest.mark.parametrize(
        ("variable", "text", "taken"),
        [
            ("NCCL_SOCKET_IFNAME", "eth1", ["eth1", "eth10"]),
            ("NCCL_SOCKET_IFNAME", "=eth1", ["eth1"]),
            ("NCCL_SOCKET_IFNAME", "^lo", ["eth1", "eth10"]),
            ("NCCL_SOCKET_IFNAME", "ib,lo", ["lo"]),
            ("GLOO_SOCKET_IFNAME", "eth1", ["eth1"]),
            ("GLOO_SOCKET_IFNAME", "eth1,lo", ["eth1", "lo"]),
            ("GLOO_SOCKET_IFNAME", "eth", []),
        ],
    )
    def test_what_a_variable_takes(self, variable, text, taken):
        assert chosen_by(variable, text, HERE) == taken

    def test_one_name_that_another_begins_with(self):
        assert settings("eth1", [each.name for each in HERE])["NCCL_SOCKET_IFNAME"] == "=eth1"
        assert settings("eth10", [each.name for each in HERE])["NCCL_SOCKET_IFNAME"] == "eth10"

    def test_settings_that_take_nothing_here(self):
        assert wrong_settings(HERE, {"GLOO_SOCKET_IFNAME": "ens3"}) == {"GLOO_SOCKET_IFNAME": "ens3"}
        assert wrong_settings(HERE, {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "^docker"}) == {}
        assert wrong_settings(HERE, {}) == {}

    def test_where_gloo_listens(self):
        assert gloos_choice(HERE, ["10.1.0.2"]).name == "eth10"
        assert gloos_choice(HERE, ["192.0.2.77"]) is None
        assert own_addresses("no-such-host.invalid") == []
