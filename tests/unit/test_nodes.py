"""Ranks on several nodes: where they are expected, in which order they are numbered, and what may not cross nodes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from unit.test_bench import case
from unit.test_sweep import Ranks, planned, swept

from moe_dist.comm import network
from moe_dist.engine.on_nodes import check_placed
from moe_dist.engine.plan import Plan
from moe_dist.engine.planning import make_plan
from moe_dist.errors import ConfigError, RankFailure, UnsupportedError
from moe_dist.machine import interfaces
from moe_dist.machine.machine import Machine
from moe_dist.machine.nodes import Nodes, crosses
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.runtime import services
from moe_dist.runtime.context import RaySpec
from moe_dist.runtime.ray_places import in_order, ranks_of_nodes, room_of
from moe_dist.runtime.services import Greeter

SPEC = MoESpec(hidden=256, intermediate=1024, num_experts=8, top_k=2)
H200X4 = Machine.named("h200x4")
TWO = replace(H200X4, devices=8, nodes=Nodes((4, 4), "PACK"))


@pytest.mark.parametrize(
    ("room", "strategy", "world", "ranks"),
    [
        ((4, 8), "STRICT_PACK", 8, (8,)),
        ((4, 8), "PACK", 8, (8,)),
        ((4, 8), "PACK", 9, (8, 1)),
        ((4, 8, 8), "PACK", 20, (8, 8, 4)),
        ((4, 8), "SPREAD", 4, (2, 2)),
        ((2, 8), "SPREAD", 8, (2, 6)),
        ((8, 8, 8), "SPREAD", 2, (1, 1)),
        ((1, 1), "SPREAD", 5, (1, 1, 3)),  # too small, which starting the ranks says
        ((3, 1), None, 4, (3, 1)),
    ],
)
def test_how_ranks_are_expected_to_lie(
    room: tuple[int, ...], strategy: Any, world: int, ranks: tuple[int, ...]
) -> None:
    assert Nodes(room, strategy).of(world) == ranks


def test_a_machine_without_nodes_is_one() -> None:
    assert H200X4.nodes_of(4) == (4,)
    assert TWO.nodes_of(4) == (4,)
    assert TWO.nodes_of(8) == (4, 4)


@pytest.mark.parametrize(
    ("tp", "ranks", "fine"),
    [
        (1, (3, 5), True),
        (2, (4, 4), True),
        (4, (4, 4), True),
        (8, (4, 4), False),
        (2, (3, 5), False),
        (4, (2, 6), False),
    ],
)
def test_tp_lies_inside_of_a_node(tp: int, ranks: tuple[int, ...], fine: bool) -> None:
    """By hand: groups are runs of tp ranks, and node n has the run of ranks that follows those of the nodes before."""
    node = [number for number, count in enumerate(ranks) for _ in range(count)]
    groups = [{node[rank] for rank in range(first, first + tp)} for first in range(0, len(node), tp)]
    assert (max(map(len, groups)) == 1) == fine
    assert (crosses(tp, ranks) == "") == fine


def plan(machine: Machine = TWO, exchange: str = "ag_rs", **grid: int) -> Plan:
    return make_plan(SPEC, ParallelSpec(**grid), exchange=exchange, backend="torch", machine=machine)


def test_a_plan_whose_tp_would_cross_nodes_is_refused() -> None:
    plan(tp=4, ep=2)
    with pytest.raises(UnsupportedError) as refused:
        plan(tp=8)
    said = str(refused.value)
    assert said.startswith(
        "TP8 on these nodes is not supported: the 8 ranks of a TP group must be on one node, and the "
    )
    assert "the nodes have 4 + 4 ranks (supported: a TP size that divides each node's number of ranks" in said


def test_nvlink_is_refused_across_nodes_and_auto_does_not_take_it() -> None:
    plan(exchange="nvlink", ep=4)
    with pytest.raises(
        UnsupportedError, match=r"reaches GPUs of one node, and these ranks are on 2 nodes \(4 \+ 4 ranks\)"
    ):
        plan(exchange="nvlink", ep=8)
    assert plan(exchange="auto", ep=4).exchange == "nvlink"
    assert plan(exchange="auto", ep=8).exchange != "nvlink"


def test_where_ranks_really_are_decides_in_the_end() -> None:
    """Four of eight GPUs were taken: a plan for one node finds its ranks on two."""
    made = plan(exchange="nvlink", ep=4)
    check_placed(made, (4,))
    with pytest.raises(UnsupportedError, match="exchange nvlink under EP4 is not supported: reaches GPUs of one node"):
        check_placed(made, (2, 2))
    with pytest.raises(UnsupportedError, match=r"the nodes have 3 \+ 1 ranks"):
        check_placed(plan(tp=2, ep=2), (3, 1))


def test_a_sweep_refuses_what_crosses_nodes_before_it_is_measured() -> None:
    cases = [case(parallel={"tp": 2}), case(parallel={"ep": 2})]
    ranks = Ranks(nodes=(1, 1))
    outcome, lines, steps = swept(ranks, cases=planned(*cases))
    assert [row.placement for row in outcome.rows] == ["EP2"]
    (refused,) = outcome.refused
    assert refused.case == cases[0].label
    assert "the nodes have 1 + 1 ranks" in refused.reason
    assert len([line for line in lines if "1 + 1 ranks" in line]) == 1
    assert steps[-1].turns_left == 0
    assert ranks.calls.count("started") == 1
    with pytest.raises(UnsupportedError):
        swept(Ranks(nodes=(1, 1)), cases=planned(*cases), go_on=False)


def place(address: str, device: str = "cpu", node: str | None = None) -> dict[str, Any]:
    return {"address": address, "device": device, "node": node or address}


def test_ranks_are_numbered_by_node_and_then_by_gpu() -> None:
    """Ray hands out bundles and GPUs in an order of its own; addresses are numbers, not texts."""
    places = [
        place("10.0.0.10", "cuda:1"), place("10.0.0.9", "cuda:0"), place("10.0.0.10", "cuda:0"),
        place("10.0.0.9", "cuda:10"), place("10.0.0.9", "cuda:2"),
    ]  # fmt: skip
    order = in_order(places)
    assert order == [1, 4, 3, 2, 0]
    assert ranks_of_nodes([places[number] for number in order]) == [[0, 1, 2], [3, 4]]
    same = [place("10.0.0.1", node="b"), place("10.0.0.1", node="a"), place("10.0.0.1", node="b")]
    assert in_order(same) == [1, 0, 2]  # two raylets of one machine
    assert in_order([place("gpu-b"), place("fd00::1"), place("gpu-a"), place("10.0.0.1")]) == [3, 1, 2, 0]


def test_room_is_counted_in_whole_ranks() -> None:
    assert room_of({"CPU": 2.0}, {"CPU": 0.25}) == 8
    assert room_of({"CPU": 2.0, "GPU": 4.0}, {"CPU": 0.25, "GPU": 1}) == 4
    assert room_of({"CPU": 0.9}, {"CPU": 0.3}) == 3  # not 2 for want of one bit
    assert room_of({"CPU": 1.9}, {"CPU": 1}) == 1
    assert room_of({"CPU": 8.0}, {"CPU": 0.25, "GPU": 1}) == 0


@pytest.mark.parametrize("value", ["", "eth 0", "a/b", "=eth0", "eth0,eth1", "x" * 16, 5])
def test_an_interface_is_the_name_of_one(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^ray\.interface"):
        RaySpec(interface=value)
    assert RaySpec(interface="eth0.1").interface == "eth0.1"


class TestInterfaces:
    def test_the_one_of_an_address(self) -> None:
        assert "127.0.0.1" in next(each for each in interfaces.interfaces() if each.name == "lo").addresses
        assert interfaces.interface_of("127.0.0.1") == "lo"
        assert interfaces.interface_of("192.0.2.1") is None  # kept for documentation: nobody's
        assert interfaces.address_of("lo") == "127.0.0.1"

    def test_one_that_is_not_there_is_named_with_those_that_are(self) -> None:
        with pytest.raises(ConfigError) as raised:
            interfaces.address_of("nosuch0")
        assert (raised.value.field, raised.value.value) == ("ray.interface", "nosuch0")
        assert socket.gethostname() in raised.value.rule
        assert "lo" in raised.value.legal  # type: ignore[operator]

    def test_the_address_on_the_way_somewhere(self) -> None:
        assert interfaces.address_towards("127.0.0.1") == "127.0.0.1"
        assert interfaces.address_towards("no.such.host.invalid") is None


class TestNetwork:
    """The variables that gloo and NCCL read; `interface_of` knows two interfaces here."""

    @pytest.fixture(autouse=True)
    def clean(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in (network.GLOO, network.NCCL):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        monkeypatch.setattr(network, "_ours", {})
        monkeypatch.setattr(network, "interface_of", {"10.0.0.1": "eth0", "10.0.1.1": "ib0"}.get)

    @staticmethod
    def both() -> tuple[str | None, str | None]:
        return os.environ.get(network.GLOO), os.environ.get(network.NCCL)

    def test_follows_the_address(self) -> None:
        network.use_network_of("127.0.0.1")
        assert self.both() == ("lo", None)
        assert network.network_said() == ""
        network.use_network_of("10.0.0.1")
        assert self.both() == ("eth0", "=eth0")
        network.use_network_of("10.0.1.1")  # another group of the same process
        assert self.both() == ("ib0", "=ib0")
        assert network.network_said() == " (GLOO_SOCKET_IFNAME=ib0, NCCL_SOCKET_IFNAME==ib0)"
        for nothing in (None, "192.0.2.1"):
            network.use_network_of(nothing)
            assert self.both() == ("ib0", "=ib0")

    def test_what_the_user_has_set_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(network.NCCL, "ib")
        network.use_network_of("10.0.0.1")
        assert self.both() == ("eth0", "ib")
        network.use_network_of("10.0.0.1", named=True)  # by ray.interface
        assert self.both() == ("eth0", "=eth0")


class TestGreeter:
    def ask(self, port: int, times: int, silence_s: float = 60.0) -> dict[str, str]:
        greeter = Greeter({"raylet": f"127.0.0.1:{port}"}, silence_s)
        greeter.close()
        for _ in range(times):
            greeter.ask(2)
        return greeter.causes

    def test_two_refusals_are_enough_and_one_is_not(self, free_port: Callable[[], int]) -> None:
        port = free_port()
        assert self.ask(port, 1) == {}
        assert self.ask(port, 2) == {"raylet": "does not answer: Connection refused"}

    def test_who_listens_and_says_nothing_may_be_busy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(services, "PROBE_TIMEOUT_S", 0.1)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            assert self.ask(port, 2) == {}
            assert self.ask(port, 1, silence_s=0.05)["raylet"].startswith("was silent for ")

    def test_a_machine_that_is_gone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def nobody(*_: object, **__: object) -> None:
            raise TimeoutError

        monkeypatch.setattr(services.socket, "create_connection", nobody)
        assert self.ask(1, 2) == {"raylet": "does not answer: no machine answers at 127.0.0.1"}


@pytest.fixture
def free_port() -> Callable[[], int]:
    def found() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return int(listener.getsockname()[1])

    return found


def test_a_lost_node_is_named_with_its_ranks(monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]) -> None:
    from moe_dist.runtime import other_nodes

    port = free_port()
    nodes = [{"NodeID": "b", "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}]
    monkeypatch.setattr(other_nodes.ray, "nodes", lambda: nodes)

    class Here:
        def get_node_id(self) -> str:
            return "a"

    monkeypatch.setattr(other_nodes.ray, "get_runtime_context", Here)
    places = [place("10.0.0.1", node="a"), *[place("10.0.0.2", node="b")] * 2]
    watched = other_nodes.OtherNodes(places, 30.0)
    watched.close()
    beats = [("measuring", 1.0, 7), ("measuring", 1.0, 6), ("measuring", 1.0, 7)]
    watched.check(beats)
    with pytest.raises(RankFailure) as raised:
        watched.check(beats, suspicious=True)
    failure = raised.value
    assert (failure.rank, failure.op, failure.seq) == (1, "measuring", 6)
    assert (
        failure.cause
        == "its node 10.0.0.2 was lost, with ranks 1, 2: the raylet there does not answer: Connection refused"
    )
