"""The balancer against brute force, loads against counting, files of placements."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.balance.balancer import balanced
from moe_dist.balance.loads import expert_loads, rank_loads
from moe_dist.balance.placement_file import placement_text, read_placement
from moe_dist.bench.case import Experiment, parse_placement
from moe_dist.errors import ConfigError
from moe_dist.model.placement import Placement, imbalance
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec, split_bounds
from moe_dist.workloads.skews import synthetic_routing

SPEC = MoESpec(hidden=128, intermediate=256, num_experts=16, top_k=3)


def homes_of(parallel: ParallelSpec, experts: int) -> tuple[tuple[int, ...], ...]:
    spec = MoESpec(hidden=128, intermediate=128 * parallel.tp, num_experts=experts, top_k=1)
    return Placement.build(spec, parallel).homes


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_expert_is_held_and_every_group_has_its_share(data):
    groups = data.draw(st.integers(1, 5))
    loads = data.draw(st.lists(st.integers(0, 50), min_size=groups, max_size=12))
    redundant = data.draw(st.integers(0, len(loads) * (groups - 1)))
    found = balanced(loads, ParallelSpec(ep=groups), redundant)
    homes = homes_of(found, len(loads))
    wanted = [stop - start for start, stop in split_bounds(len(loads) + redundant, groups)]
    assert [len(home) for home in homes] == wanted
    assert {expert for home in homes for expert in home} == set(range(len(loads)))
    assert all(len(set(home)) == len(home) for home in homes)
    assert found == balanced(loads, ParallelSpec(ep=groups), redundant)


@settings(max_examples=60, deadline=None)
@given(loads=st.lists(st.integers(0, 50), min_size=3, max_size=5), redundant=st.integers(0, 4))
def test_copies_leave_the_least_load_per_copy(loads, redundant):
    groups = 3
    found = balanced(loads, ParallelSpec(ep=groups), redundant)
    extra = {expert: len(others) for expert, others in found.replicas}
    largest = max(load / (1 + extra.get(expert, 0)) for expert, load in enumerate(loads))
    ways = itertools.product(range(1, groups + 1), repeat=len(loads))
    possible = [
        max(load / n for load, n in zip(loads, way, strict=True)) for way in ways if sum(way) == len(loads) + redundant
    ]
    assert largest == min(possible)


def test_the_largest_goes_to_the_least():
    found = balanced([8, 1, 7, 2, 6, 3, 5, 4], ParallelSpec(ep=4))
    homes = homes_of(found, 8)
    assert sorted(map(sorted, homes)) == [[0, 1], [2, 3], [4, 5], [6, 7]]  # 9 each
    assert found.replicas == ()


def test_a_single_busy_expert_takes_copies():
    loads = [30, 1, 1, 1, 1, 1, 1, 0]
    without = homes_of(balanced(loads, ParallelSpec(ep=4)), 8)
    assert max(sum(loads[e] for e in home) for home in without) == 30
    with_copies = balanced(loads, ParallelSpec(tp=2, ep=4), 4)
    assert (with_copies.tp, with_copies.ep) == (2, 4)
    assert dict(with_copies.replicas)[0] == (1, 2, 3)  # and the fourth goes to the next one


def test_room_is_made_where_only_groups_that_hold_the_expert_have_any():
    homes = homes_of(balanced([9, 9, 9, 1], ParallelSpec(ep=3), 5), 4)
    assert [len(home) for home in homes] == [3, 3, 3]
    assert sum(3 in home for home in homes) == 1
    assert all({0, 1, 2} - set(home) == set() or 3 in home for home in homes)


@pytest.mark.parametrize(
    ("loads", "groups", "redundant", "field"),
    [
        ([1, 2], 3, 0, "parallel.ep"),
        ([1, -2], 2, 0, "loads"),
        ([1, float("nan")], 2, 0, "loads"),
        ([1, float("inf")], 2, 0, "loads"),
        ([1, 2], 2, -1, "redundant"),
        ([1, 2], 2, 3, "redundant"),
    ],
)
def test_what_can_not_be_balanced_is_refused(loads, groups, redundant, field):
    with pytest.raises(ConfigError) as caught:
        balanced(loads, ParallelSpec(ep=groups), redundant)
    assert caught.value.field == field


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("redundant", [0, 4])
def test_loads_of_ranks_are_counted(sharded, redundant):
    routing = synthetic_routing(SPEC, 50, "zipf:1.2", 3)
    routing.ids_TK[7, 1] = -1
    loads = expert_loads(routing, SPEC.num_experts)
    assert loads == [int((routing.ids_TK == expert).sum()) for expert in range(SPEC.num_experts)]
    parallel = balanced(loads, ParallelSpec(tp=2, ep=2), redundant)
    placement = Placement.build(SPEC, parallel)
    bounds = split_bounds(50, 4) if sharded else None
    found = rank_loads(routing, placement, bounds)
    pairs: list[list[int]] = [[], []]
    for start, stop in bounds or [(0, 50)]:
        rows = torch.arange(stop - start)
        sources = torch.full((stop - start,), bounds.index((start, stop))) if bounds else None
        groups = placement.serving_groups(routing.ids_TK[start:stop], rows, sources)
        for expert, group in zip(routing.ids_TK[start:stop].flatten(), groups.flatten(), strict=True):
            if group >= 0:
                pairs[group].append(int(expert))
    assert found.pairs == [len(pairs[0])] * 2 + [len(pairs[1])] * 2
    assert found.active == [len(set(pairs[0]))] * 2 + [len(set(pairs[1]))] * 2
    assert found.imbalance == imbalance(found.pairs)


@pytest.mark.parametrize("skew", ["zipf:1.2", "hot:3", "hot_rank:4x2"])
def test_imbalance_falls(skew):
    spec = SPEC.with_changes(num_experts=64, top_k=4)
    routing, bounds = synthetic_routing(spec, 512, skew, 0), split_bounds(512, 4)

    def imbalance_of(parallel: ParallelSpec) -> float:
        return rank_loads(routing, Placement.build(spec, parallel), bounds).imbalance

    loads = expert_loads(routing, 64)
    before, moved, copied = (
        imbalance_of(each)
        for each in (
            ParallelSpec(ep=4),
            balanced(loads, ParallelSpec(ep=4)),
            balanced(loads, ParallelSpec(ep=4), 8),
        )
    )
    assert copied < 1.05
    assert moved < 0.9 * before
    assert copied <= moved + 0.02  # which copy serves a pair goes by token: not exactly equal parts


def test_a_file_of_a_placement(tmp_path):
    made = balanced([5, 1, 4, 2], ParallelSpec(ep=2), 1)
    path = tmp_path / "m.json"
    path.write_text(placement_text(made))
    assert read_placement(str(path)) == made
    assert parse_placement(f"map:{path}", 2) == made
    assert parse_placement(f"map:{path}", 4) is None
    spec = SPEC.with_changes(num_experts=4)
    cases = list(Experiment(models=[spec], worlds=(2,), placements=("ep", f"map:{path}")).cases("cpu"))
    assert {case.parallel.label for case in cases} == {"EP2", made.label}


GOOD = {"tp": 1, "ep": 2, "expert_map": [0, 1], "replicas": []}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "does not hold the keys tp, ep, expert_map, replicas"),
        (json.dumps(GOOD | {"more": 1}), "does not hold the keys"),
        ('{"tp": 1, "tp": 2}', "stands there twice"),
        (json.dumps(GOOD | {"ep": 0}), "m.json: ep = 0: is too small (legal: 1 to 4,096)"),
        (json.dumps(GOOD | {"expert_map": [0, "x"]}), "m.json: expert_map.1 = 'x': is no whole number (legal: "),
        (json.dumps(GOOD | {"expert_map": [0, 2]}), "m.json: expert_map.1 = 2: is no group of experts (legal: 0 to 1)"),
        (None, "can't be read: No such file or directory"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, text, rule):
    path = tmp_path / "m.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Experiment(models=[SPEC], worlds=(2,), placements=(f"map:{path}",))
    assert rule in str(caught.value)
    assert str(caught.value).count("(legal: ") == 1
    assert "m.json" in str(caught.value)


def test_loads_of_nothing():
    nothing = Routing(torch.full((3, 2), -1, dtype=torch.int32), torch.zeros(3, 2))
    assert expert_loads(nothing, 4) == [0] * 4
    found = rank_loads(nothing, Placement.build(SPEC, ParallelSpec(ep=2)), None)
    assert (found.pairs, found.active, found.imbalance) == ([0, 0], [0, 0], 1.0)
