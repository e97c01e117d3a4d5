"""Placements against brute force: who holds what, who serves what, and how even that is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.errors import ConfigError
from moe_dist.model.placement import Placement, imbalance
from moe_dist.model.spec import MoESpec, ParallelSpec

GRIDS = [(tp, world // tp) for world in (1, 2, 3, 4, 8) for tp in range(1, world + 1) if world % tp == 0]


def make_spec(num_experts=10, intermediate=1152, **changes):
    return MoESpec(hidden=64, intermediate=intermediate, num_experts=num_experts, top_k=2, **changes)


def build(tp, ep, replicas=(), **changes):
    return Placement.build(make_spec(**changes), ParallelSpec(tp=tp, ep=ep, replicas=replicas))


def held_count(placement):
    """How often each (expert, column) is held, int [E, I]."""
    count = torch.zeros(placement.num_experts, placement.intermediate, dtype=torch.int64)
    for rank in range(placement.world):
        start, stop = placement.slice_of(rank)
        for expert in placement.experts_of(rank):
            count[expert, start:stop] += 1
    return count


# 10 experts and 9 or 10 granules are uneven over almost every grid; 1200 ends in a partial block.
@pytest.mark.parametrize(("tp", "ep"), GRIDS)
@pytest.mark.parametrize("intermediate", [1152, 1200])
@pytest.mark.parametrize("quant", ["fp8_block", "none"])
def test_every_column_of_every_expert_is_held_once(tp, ep, intermediate, quant):
    placement = build(tp, ep, intermediate=intermediate, quant=quant)
    assert (placement.tp, placement.ep, placement.world) == (tp, ep, tp * ep)
    assert not placement.replicated
    assert (held_count(placement) == 1).all()
    for rank in range(placement.world):
        start, stop = placement.slice_of(rank)
        assert placement.width_of(rank) == stop - start > 0
        assert start % (128 if quant == "fp8_block" else 16) == 0


@pytest.mark.parametrize(("tp", "ep"), [(1, 2), (1, 3), (2, 2), (1, 4), (2, 4)])
def test_replicas_are_held_whole_and_after_the_own_experts(tp, ep):
    placement = build(tp, ep, {0: [1], 9: [0]})
    expected = torch.ones(10, dtype=torch.int64)
    expected[[0, 9]] = 2
    assert placement.replicated
    assert (held_count(placement) == expected[:, None]).all()
    plain = build(tp, ep)
    assert placement.experts_of(0) == (*plain.experts_of(0), 9)
    assert placement.experts_of(tp) == (*plain.experts_of(tp), 0)


def test_ranks_are_members_of_groups_tp_fastest():
    placement = build(2, 2, num_experts=5, intermediate=384)
    assert [placement.experts_of(rank) for rank in range(4)] == [(0, 1, 2), (0, 1, 2), (3, 4), (3, 4)]
    assert [placement.slice_of(rank) for rank in range(4)] == [(0, 256), (256, 384)] * 2


def test_empty_shards_only_on_request():
    spec = make_spec(num_experts=2, intermediate=256)
    for tp, ep, field, legal in [(3, 1, "parallel.tp", "1 to 2"), (1, 3, "parallel.ep", "1 to 2")]:
        with pytest.raises(ConfigError) as caught:
            Placement.build(spec, ParallelSpec(tp=tp, ep=ep))
        assert (caught.value.field, caught.value.value, caught.value.legal) == (field, 3, legal)
    allowed = Placement.build(spec, ParallelSpec(tp=3, ep=3, allow_empty_shards=True))
    assert (held_count(allowed) == 1).all()
    assert [allowed.width_of(rank) for rank in range(3)] == [128, 128, 0]
    assert allowed.experts_of(8) == ()


@pytest.mark.parametrize(
    ("replicas", "value"),
    [
        ({10: [1]}, 10),
        ({-1: [1]}, -1),
        ({0: [4]}, 4),
        ({0: [-1]}, -1),
        ({0: [0]}, 0),  # its owner
        ({0: [1, 1]}, 1),  # the same copy twice
        (((0, (1,)), (0, (1,))), 1),
    ],
)
def test_bad_replicas_are_refused(replicas, value):
    with pytest.raises(ConfigError) as caught:
        build(1, 4, replicas)
    assert (caught.value.field, caught.value.value) == ("parallel.replicas", value)


def test_a_map_says_who_owns_each_expert():
    spec = make_spec(num_experts=5)
    mapped = ParallelSpec(tp=2, ep=2, expert_map=(1, 0, 1, 1, 0), replicas={3: [0]})
    placement = Placement.build(spec, mapped)
    assert placement.homes == ((1, 4, 3), (0, 2, 3))
    ids = torch.tensor([[0, 1], [4, -1]], dtype=torch.int32)
    assert placement.serving_groups(ids, torch.arange(2), None).tolist() == [[1, 0], [0, -1]]
    assert placement.slots_served(ids, placement.serving_groups(ids, torch.arange(2), None)).tolist() == [
        [0, 0],
        [1, -1],
    ]
    runs = Placement.build(spec, ParallelSpec(tp=2, ep=2, expert_map=(0, 0, 0, 1, 1)))
    assert runs == Placement.build(spec, ParallelSpec(tp=2, ep=2))
    assert mapped.label.startswith("TP2xEP2+1@")
    assert mapped.label != mapped.with_changes(replicas={1: [1]}).label


@pytest.mark.parametrize(
    ("expert_map", "value", "rule"),
    [
        ((0, 1), ParallelSpec(ep=2, expert_map=(0, 1)).label, "names the groups of 2 experts, and the model has 3"),
        ((0, 1, 2), 2, "no such expert group for expert 2"),
        ((0, -1, 1), -1, "no such expert group for expert 1"),
        ((1, 1, 1), (1, 1, 1), "leaves group 0 without an expert"),
    ],
)
def test_bad_maps_are_refused(expert_map, value, rule):
    with pytest.raises(ConfigError, match=rule) as caught:
        Placement.build(make_spec(num_experts=3), ParallelSpec(ep=2, expert_map=expert_map))
    assert (caught.value.field, caught.value.value) == ("parallel.expert_map", value)


def test_a_group_without_experts_only_on_request():
    mapped = ParallelSpec(ep=2, expert_map=(1, 1, 1), allow_empty_shards=True)
    assert Placement.build(make_spec(num_experts=3), mapped).homes == ((), (0, 1, 2))
    copied = ParallelSpec(ep=2, expert_map=(1, 1, 1), replicas={2: [0]})
    assert Placement.build(make_spec(num_experts=3), copied).homes == ((2,), (0, 1, 2))


@st.composite
def placements(draw):
    experts, tp, ep = draw(st.integers(1, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    expert_map = draw(st.lists(st.integers(0, ep - 1), min_size=experts, max_size=experts) | st.just([]))
    parallel = ParallelSpec(tp=tp, ep=ep, expert_map=expert_map, allow_empty_shards=True)
    spec = MoESpec(hidden=8, intermediate=384, num_experts=experts, top_k=1)
    plain = Placement.build(spec, parallel)
    free = [(e, g) for e in range(experts) for g in range(ep) if e not in plain.homes[g]]
    chosen = draw(st.lists(st.sampled_from(free), unique=True, max_size=8)) if free else []
    replicas = {e: [g for other, g in chosen if other == e] for e, _ in chosen}
    return Placement.build(spec, parallel.with_changes(replicas=replicas)), plain


@settings(max_examples=80, deadline=None)
@given(built=placements(), seed=st.integers(0, 999), sharded=st.booleans())
def test_serving_against_brute_force(built, seed, sharded):
    placement, plain = built
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, placement.num_experts, (9, 3), generator=generator, dtype=torch.int32)
    rows = torch.randint(0, 50, (9,), generator=generator)
    sources = torch.randint(0, placement.world, (9,), generator=generator) if sharded else None
    groups = placement.serving_groups(ids, rows, sources)
    assert groups.shape == ids.shape

    expected_rows = [0] * placement.world
    for t in range(9):
        for k in range(3):
            expert, group = int(ids[t, k]), int(groups[t, k])
            if expert < 0:
                assert group == -1
                continue
            owner = next(g for g, home in enumerate(plain.homes) if expert in home)
            copies = [owner, *(g for g, home in enumerate(placement.homes) if expert in home and g != owner)]
            own = None if sources is None else int(sources[t]) // placement.tp
            assert group == (own if own in copies else copies[(int(rows[t]) + expert) % len(copies)])
            for rank in range(group * placement.tp, (group + 1) * placement.tp):
                expected_rows[rank] += 1
    assert placement.rows_per_rank(groups) == expected_rows

    served = placement.slots_served(ids, groups)
    assert torch.equal(served < 0, ids < 0)
    for rank in range(placement.world):
        slots = placement.local_slots(ids, groups, rank)
        assert slots.dtype == served.dtype == torch.int32
        assert torch.equal(served.where(groups == rank // placement.tp, -1), slots)
        here = groups == rank // placement.tp
        assert torch.equal(slots >= 0, here)
        assert [placement.experts_of(rank)[slot] for slot in slots[here].tolist()] == ids[here].tolist()


def test_copies_share_the_rows_of_tokens_without_source():
    placement = build(1, 4, {0: [1, 3]})
    groups = placement.serving_groups(torch.zeros(30, 1, dtype=torch.int32), torch.arange(30), None)
    assert placement.rows_per_rank(groups) == [10, 10, 0, 10]


def test_a_copy_at_home_is_preferred():
    placement = build(2, 3, {0: [1]})  # ranks 0-1 own expert 0, 2-3 have the copy, 4-5 have none
    sources = torch.arange(6).repeat_interleave(10)
    rows = torch.arange(10).repeat(6)
    groups = placement.serving_groups(torch.zeros(60, 1, dtype=torch.int32), rows, sources)
    assert groups[:20].unique().tolist() == [0]
    assert groups[20:40].unique().tolist() == [1]
    assert torch.bincount(groups[40:].flatten()).tolist() == [10, 10]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([2, 2, 2], 1.0), ([8, 0, 0, 0], 4.0), ([3, 1], 1.5), ([0, 0], 1.0), ([5], 1.0), ([1, 2, 3, 6], 2.0)],
)
def test_imbalance_is_most_over_mean(rows, expected):
    assert imbalance(rows) == pytest.approx(expected)


def test_no_tokens_and_no_rows():
    placement = build(2, 3)
    groups = placement.serving_groups(torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, dtype=torch.int64), None)
    assert groups.shape == (0, 2)
    assert placement.rows_per_rank(groups) == [0] * 6
    assert placement.local_slots(torch.zeros(0, 2, dtype=torch.int32), groups, 5).shape == (0, 2)


@pytest.mark.parametrize("replicas", [{}, {0: [1], 4: [0]}])
@pytest.mark.parametrize("sharded", [None, 5])
def test_slots_on_of_all_tokens_in_one_go(replicas, sharded):
    spec = MoESpec(hidden=128, intermediate=256, num_experts=5, top_k=2)
    placement = Placement.build(spec, ParallelSpec(tp=2, ep=2, replicas=replicas))
    ids = torch.randint(-1, 5, (20, 2), dtype=torch.int32)
    rows = torch.arange(20) if sharded is None else torch.arange(20) % sharded
    sources = None if sharded is None else torch.arange(20) // sharded
    groups = placement.serving_groups(ids, rows, sources)
    for rank in range(4):
        assert torch.equal(placement.slots_on(rank, ids, sharded), placement.local_slots(ids, groups, rank))
