"""Layers inside of a program that has process groups of its own: meshes, subgroups of any ranks, several at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from dist.pool import Pool
from torch.distributed.device_mesh import init_device_mesh

from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.errors import ConfigError, RankFailure
from moe_dist.machine.machine import Machine
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import shard
from moe_dist.oracle.reference import oracle_layer, relative_error
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

WORLD = 4
SPEC = MoESpec(hidden=128, intermediate=256, num_experts=12, top_k=3)
CLOSE = 6e-2
WRONG = 0.5  # at least so far off are another group's experts or tokens


@pytest.fixture(scope="module")
def four() -> Iterator[Pool]:
    """Four processes whose default group is gloo's."""
    with Pool(WORLD) as pool:
        yield pool


class Stepped:
    """A layer on `group` with weights of its own, whose steps are compared with the oracle."""

    def __init__(self, group: Any, model: int, exchange: str, debug: bool = False, **grid: int) -> None:
        self.comm = Comm.from_group("cpu", group, timeout_s=20)
        self.weights, self.steps = random_weights(SPEC, model), 0
        plan = make_plan(
            SPEC, ParallelSpec(**grid or {"ep": self.comm.world}), exchange=exchange, backend="torch",
            machine=Machine.detect("cpu"),
        )  # fmt: skip
        self.layer = MoELayer(plan, shard(self.weights, plan.placement, self.comm.rank), self.comm, debug=debug)

    def __call__(self) -> float:
        """The error of a step on tokens that no other process has; their number differs between ranks and steps."""
        self.steps += 1
        key = 1000 * dist.get_rank() + self.steps
        tokens = 2 + (dist.get_rank() + self.steps) % 3
        x, routing = (
            Stream("embedded", key).normal(tokens, 128).bfloat16(),
            synthetic_routing(SPEC, tokens, "uniform", key),
        )
        return relative_error(self.layer(x, routing), exact(x, routing, self.weights))


def exact(x: torch.Tensor, routing: Routing, weights: Any) -> torch.Tensor:
    alone = Placement.build(SPEC, ParallelSpec())
    return oracle_layer(x, routing, [weights], SPEC, alone, [(0, len(x))], routing.ids_TK * 0, None)


def world_sum() -> float:
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return float(total)


def in_a_mesh(_: Comm, exchange: str) -> tuple[list[float], float, str]:
    """Data parallel 2 by expert parallel 2: a model for each of the two, and the program's own collectives between."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    try:
        Comm.from_group("cpu", mesh["ep"])
        said = ""
    except ConfigError as error:
        said = str(error)
    layer = Stepped(mesh["ep"].get_group(), dist.get_rank() // 2, exchange)
    errors = []
    for _ in range(3):
        errors.append(layer())
        mine = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(mine, group=mesh["dp"].get_group())
        assert float(mine) == 2 + 2 * (dist.get_rank() % 2)
    layer.comm.leave()
    return errors, world_sum(), said


@pytest.mark.parametrize("exchange", ["ag_rs", "all_to_all"])
def test_data_by_expert_parallel_in_a_device_mesh(four: Pool, exchange: str) -> None:
    for errors, total, said in four.run(WORLD, in_a_mesh, exchange):
        assert max(errors) < CLOSE
        assert total == 6.0, "the program's groups outlive a Comm"
        assert "DeviceMesh" in said
        assert "get_group()" in said


def across_a_mesh(_: Comm) -> list[float]:
    """Both dimensions of a mesh at once: along one a layer of whole experts, along the other one of slices."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    along, across = (mesh[name].get_group() for name in ("columns", "rows"))
    layers = [Stepped(along, 1 + dist.get_rank() // 2, "all_to_all"), Stepped(across, 3, "ag_rs", tp=2)]
    return [layer() for _ in range(3) for layer in layers]


def test_each_process_steps_in_two_groups_in_turn(four: Pool) -> None:
    for errors in four.run(WORLD, across_a_mesh):
        assert max(errors) < CLOSE


def of_different_sizes(_: Comm) -> dict[str, Any]:
    """Groups of all four, of ranks 1 and 3, and of 0, 1 and 3; rank 2 is in the first one only."""
    groups = {"all": None, "odd": dist.new_group([1, 3]), "three": dist.new_group([3, 0, 1])}
    layers: dict[str, Stepped] = {}
    refused = []
    for model, (name, group) in enumerate(groups.items()):
        try:
            layers[name] = Stepped(group, model, ("ag_rs", "all_to_all", "all_to_all")[model])
        except ConfigError as error:
            refused.append(str(error))
    errors = {name: [] for name in layers}
    for step in range(3):
        for name, layer in layers.items():
            errors[name] += [layer() for _ in range(1 + (name == "odd"))]  # groups don't step equally often
        assert world_sum() == 6.0, step
    for layer in layers.values():
        layer.comm.leave()
    return {"errors": errors, "refused": refused, "places": {n: (l.comm.rank, l.comm.world) for n, l in layers.items()}}


def test_groups_of_any_ranks_and_sizes_do_not_cross(four: Pool) -> None:
    found = four.run(WORLD, of_different_sizes)
    for rank, answer in enumerate(found):
        for errors in answer["errors"].values():
            assert max(errors) < CLOSE
        assert len(answer["refused"]) == {0: 1, 1: 0, 2: 2, 3: 0}[rank]
        assert all("this process is not in it" in said for said in answer["refused"])
    assert [answer["places"].get("odd") for answer in found] == [None, (0, 2), None, (1, 2)]
    assert [answer["places"].get("three") for answer in found] == [(0, 3), (1, 3), None, (2, 3)]


def debugged_in_one_group(_: Comm) -> tuple[list[float], list[bool]]:
    """Of a layer on two ranks in the debug mode and one on all four without; whose collectives are looked at then."""
    pairs = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    layers = [Stepped(pairs[dist.get_rank() in (1, 2)], 1, "all_to_all", debug=True), Stepped(None, 2, "ag_rs")]
    errors = [layer() for _ in range(3) for layer in layers]
    return errors, [layer.comm._user.guarded for layer in layers]


def test_the_debug_mode_of_one_group_is_not_that_of_another(four: Pool) -> None:
    for errors, guarded in four.run(WORLD, debugged_in_one_group):
        assert max(errors) < CLOSE
        assert guarded == [True, False]


def with_another_groups_weights(_: Comm) -> list[float]:
    """The same with the weights of the other pair: what the comparison with the oracle must see."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    layer = Stepped(groups[dist.get_rank() % 2], dist.get_rank() % 2, "all_to_all")
    layer.weights = random_weights(SPEC, 1 - dist.get_rank() % 2)
    return [layer()]


def test_another_groups_experts_would_be_seen(four: Pool) -> None:
    assert all(error > WRONG for (error,) in four.run(WORLD, with_another_groups_weights))


def trouble_in_one_group(_: Comm, what: str) -> tuple[str, float, list[float]]:
    """Ranks 1 and 3 disagree, or 3 does not come; the group of all four goes on."""
    pair, together = dist.new_group([1, 3]), Stepped(None, 0, "ag_rs")
    said, began = "", time.monotonic()
    if dist.get_rank() % 2:
        layer = Stepped(pair, 1, "ag_rs")
        if what == "disagree":
            layer.layer.agreement.facts["plan.exchange"] = f"that of {dist.get_rank()}"
        else:
            layer.comm._timeout_s, layer.comm._teller._timeout = 1.0, layer.comm._teller._timeout / 20
        try:
            if what == "disagree" or dist.get_rank() == 1:
                layer()
        except (ConfigError, RankFailure) as error:
            said = str(error)
    seconds = time.monotonic() - began
    return said, seconds, [together() for _ in range(2)]


@pytest.mark.parametrize("what", ["disagree", "absent"])
def test_trouble_stays_in_its_group_and_names_global_ranks(four: Pool, what: str) -> None:
    found = four.run(WORLD, trouble_in_one_group, what)
    for rank, (said, seconds, errors) in enumerate(found):
        assert max(errors) < CLOSE
        assert seconds < 10
        if what == "disagree" and rank % 2:
            assert "(rank 0: that of 1; rank 1: that of 3)" in said
        elif what == "absent" and rank == 1:
            assert said.startswith("rank 0 failed in meet (sequence number 1)")
        else:
            assert not said
            continue
        assert "ranks of a group: 0 and 1 are 1 and 3 of all" in said


# Memory that ranks share: torch's symmetric memory, faked, since it needs GPUs.


def zeros(_: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def windows(_: Comm) -> list[dict[str, Any]]:
    """Each Comm's window is met for in its own group, with as many peers, and grows without the others'."""
    groups = [dist.new_group([1, 3]), dist.new_group([0, 2])]
    own, met = groups[1 - dist.get_rank() % 2], []

    def rendezvous(memory: torch.Tensor, group: dist.ProcessGroup) -> SimpleNamespace:
        met.append(group)
        pointers = [(dist.get_process_group_ranks(group)[peer] + 1) << 40 for peer in range(dist.get_world_size(group))]
        return SimpleNamespace(buffer_ptrs=pointers, rank=dist.get_rank(group), get_buffer=zeros)

    real = symmetric_memory.empty, symmetric_memory.rendezvous, torch.cuda.synchronize
    symmetric_memory.empty, symmetric_memory.rendezvous = torch.empty, rendezvous
    torch.cuda.synchronize = lambda *_: None
    try:
        found = []
        for group in (own, None, own, None):
            comm = Comm.from_group("cpu", group)
            first, second = comm.window(100), comm.window(50)
            assert first is second, "one that is large enough is kept"
            assert met.pop() is (dist.group.WORLD if group is None else group)
            assert not met
            found.append({"owners": [(each >> 40) - 1 for each in first.by_rank_W.tolist()], "in turn": [
                (each >> 40) - 1 for each in first.addresses_W.tolist()]})  # fmt: skip
        return found
    finally:
        symmetric_memory.empty, symmetric_memory.rendezvous, torch.cuda.synchronize = real


def test_shared_memory_is_met_for_in_the_group_of_its_comm(four: Pool) -> None:
    for rank, found in enumerate(four.run(WORLD, windows)):
        pair = [rank % 2, rank % 2 + 2]
        for number, each in enumerate(found):
            ranks = [0, 1, 2, 3] if number % 2 else pair
            place = ranks.index(rank)
            assert each == {"owners": ranks, "in turn": ranks[place:] + ranks[:place]}
