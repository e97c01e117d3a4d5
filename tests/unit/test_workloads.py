"""Workloads by name: what each routing and each split of the tokens is known by, whatever its seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from torch import Tensor

from moe_dist.bench.case import Experiment
from moe_dist.bench.draws import draws
from moe_dist.errors import ConfigError
from moe_dist.model.placement import imbalance
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, WorkloadSpec, split_bounds
from moe_dist.workloads.skew_names import ROUTINGS, canonical_skew, check_skew
from moe_dist.workloads.skews import spread, synthetic_routing
from moe_dist.workloads.token_splits import most_tokens, token_bounds

seeds = st.integers(-(1 << 63), (1 << 63) - 1)
E, K = 32, 4
SPEC = MoESpec(hidden=64, intermediate=64, num_experts=E, top_k=K)
NEW = ("hot_rank:4x2.5", "burst:6", "rotating:zipf:1.2", "rotating:hot:5", "rotating:hot_rank:4x3", "spread:4:zipf:1.2",
       "spread:3:hot:5", "spread:4:hot_rank:4x3", "spread:4:burst:6")  # fmt: skip


def spec_of(experts: int, top_k: int) -> MoESpec:
    return SPEC.with_changes(num_experts=experts, top_k=top_k)


def loads(routing: Routing, experts: int = E) -> Tensor:
    """Pairs of each expert."""
    return torch.bincount(routing.ids_TK[routing.ids_TK >= 0].long(), minlength=experts)


def by_run(counts: Tensor, runs: int) -> list[int]:
    """Pairs of each run of experts, as expert parallelism over so many ranks has them."""
    return [int(counts[start:stop].sum()) for start, stop in split_bounds(len(counts), runs)]


@pytest.mark.parametrize("skew", NEW)
@examples(6)
@given(
    seed=seeds,
    tokens=st.integers(0, 40),
    step=st.integers(0, ROUTINGS - 1),
    sizes=st.sampled_from([(32, 4), (12, 1), (16, 4)]),
)
def test_each_routing_is_well_formed_and_repeatable(skew, seed, tokens, step, sizes):
    spec = spec_of(*sizes)
    found = synthetic_routing(spec, tokens, skew, seed, step=step)
    again = synthetic_routing(spec, tokens, canonical_skew(skew), seed, step=step)
    assert torch.equal(found.ids_TK, again.ids_TK)
    assert torch.equal(found.weights_TK, again.weights_TK)
    assert (found.ids_TK.dtype, found.weights_TK.dtype) == (torch.int32, torch.float32)
    assert found.ids_TK.shape == (tokens, spec.top_k)
    assert all(
        len(set(row)) == spec.top_k and 0 <= min(row) <= max(row) < spec.num_experts for row in found.ids_TK.tolist()
    )
    assert torch.allclose(found.weights_TK.sum(1), torch.ones(tokens))


@examples(25)
@given(
    seed=seeds,
    tokens=st.integers(1, 300),
    runs=st.sampled_from([2, 4, 8, 16]),
    part=st.floats(0, 1),
    top_k=st.sampled_from([1, 4, 7]),
)
def test_the_hot_rank_has_its_share_to_the_pair(seed, tokens, runs, part, top_k):
    most = runs * min(top_k, E // runs) / top_k
    times = f"{1 + part * (most - 1):.3f}"
    if float(times) > most:
        return
    counts = by_run(loads(synthetic_routing(spec_of(E, top_k), tokens, f"hot_rank:{runs}x{times}", seed)), runs)
    wanted = float(times) * tokens * top_k / runs
    assert min(abs(count - wanted) for count in counts) <= 0.5 + 1e-6 * wanted


def test_the_hot_rank_differs_between_seeds_and_its_tokens_differ():
    ids = [synthetic_routing(SPEC, 400, "hot_rank:4x2.5", seed).ids_TK for seed in range(20)]
    hot = {torch.bincount(each.flatten() // 8).argmax().item() for each in ids}
    assert hot == {0, 1, 2, 3}
    run = int(torch.bincount(ids[0].flatten() // 8).argmax())
    places = (ids[0] // 8 == run).sum(1)  # of a token
    assert len(places.unique()) == K + 1
    within = torch.bincount(ids[0][ids[0] // 8 == run] % 8, minlength=8)
    assert within.max() < 1.5 * within.min()


@examples(20)
@given(seed=seeds, tokens=st.integers(1, 200), hot=st.integers(1, 9))
def test_a_burst_is_a_quarter_of_the_tokens_that_share_experts(seed, tokens, hot):
    ids = synthetic_routing(SPEC, tokens, f"burst:{hot}", seed).ids_TK
    most = min(hot, K)  # of a token's places, on these experts
    found = []
    for start, stop in split_bounds(tokens, 4):
        if stop > start:
            common = torch.bincount(ids[start:stop].flatten().long(), minlength=E).topk(hot).values.sum()
            found.append(int(common) == most * (stop - start))
    assert any(found)
    if tokens >= 100 and hot <= K:
        assert found.count(True) == 1


def test_a_burst_lies_anywhere():
    stretches = set()
    for seed in range(20):
        ids = synthetic_routing(SPEC, 200, "burst:4", seed).ids_TK
        stretches.add(min(range(4), key=lambda part: len(ids[50 * part : 50 * part + 50].unique())))
    assert stretches == {0, 1, 2, 3}


@examples(15)
@given(seed=seeds, skew=st.sampled_from(["zipf:1.2", "zipf:2", "hot:5", "burst:6"]), runs=st.sampled_from([2, 3, 4, 8]))
def test_spread_heat_is_the_same_heat_on_even_runs(seed, skew, runs):
    plain, even = (synthetic_routing(SPEC, 500, name, seed) for name in (skew, f"spread:{runs}:{skew}"))
    before, after = loads(plain), loads(even)
    assert sorted(before.tolist()) == sorted(after.tolist())
    assert torch.equal(plain.weights_TK, even.weights_TK)
    pairs = {
        (old, new) for old, new in zip(plain.ids_TK.flatten().tolist(), even.ids_TK.flatten().tolist(), strict=True)
    }
    assert len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs})  # each expert is renumbered
    found = by_run(after, runs)
    assert max(found) - min(found) <= int(before.max())  # an expert can't be divided
    if skew == "zipf:1.2" and runs <= 3:
        assert imbalance(found) < 1.05


def test_spread_heat_takes_the_hot_rank_away():
    assert imbalance(by_run(loads(synthetic_routing(SPEC, 500, "hot_rank:4x3", 1)), 4)) == pytest.approx(3, abs=0.01)
    assert imbalance(by_run(loads(synthetic_routing(SPEC, 500, "spread:4:hot_rank:4x3", 1)), 4)) < 1.02


def test_no_expert_stays_no_expert():
    ids = torch.tensor([[3, -1], [3, 1]], dtype=torch.int32)
    found = spread(Routing(ids, torch.ones(2, 2)), 4, 2)
    assert found.ids_TK.tolist() == [[0, -1], [0, 2]]


@examples(10)
@given(seed=seeds, layers=st.integers(1, 3))
def test_rotating_heat_moves_from_step_to_step(seed, layers):
    def hottest(skew: str, count: int) -> list[list[set[int]]]:
        steps = draws(SPEC, WorkloadSpec(tokens=400, skew=skew, seed=seed), layers)
        return [[set(loads(each).topk(count).indices.tolist()) for each in step] for step in steps]

    for step, after in zip(found := hottest("rotating:hot:4", 4), found[1:], strict=False):
        assert all(not now & then for now, then in zip(step, after, strict=True))
    assert len(found) == ROUTINGS
    assert len({frozenset(step[0]) for step in hottest("rotating:zipf:3", 1)}) == ROUTINGS
    steps = draws(SPEC, WorkloadSpec(tokens=100, skew="rotating:hot_rank:4x3", seed=seed), layers)
    for layer in range(layers):
        runs = [max(range(4), key=by_run(loads(step[layer]), 4).__getitem__) for step in steps]
        assert [(run - runs[0]) % 4 for run in runs] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_the_first_step_of_rotating_heat_is_that_heat():
    for skew in ("zipf:1.2", "hot:3", "hot_rank:2x1.5"):
        (plain,) = draws(SPEC, WorkloadSpec(tokens=30, skew=skew, seed=5), 2)
        rotating = draws(SPEC, WorkloadSpec(tokens=30, skew=f"rotating:{skew}", seed=5), 2)
        assert [torch.equal(a.ids_TK, b.ids_TK) for a, b in zip(plain, rotating[0], strict=True)] == [True, True]
        assert not torch.equal(rotating[0][0].ids_TK, rotating[4][0].ids_TK)


@pytest.mark.parametrize(
    "skew",
    ["hot_rank", "hot_rank:4", "hot_rank:1x1", "hot_rank:4x0.5", "hot_rank:4xtwo", "burst", "burst:0", "burst:2.5",
     "rotating", "rotating:uniform", "rotating:balanced", "rotating:rotating:zipf:1", "rotating:file:a",
     "rotating:zipf", "spread:4", "spread:zipf:1.2", "spread:1:zipf:1.2", "spread:4:uniform",
     "spread:4:spread:4:hot:2", "spread:4:rotating:hot:2", "spread::hot:2"],
)  # fmt: skip
def test_malformed_names_list_the_legal_ones(skew):
    with pytest.raises(ConfigError, match=r"not a known routing.*hot_rank:RxS.*rotating:SKEW"):
        check_skew(skew)


@pytest.mark.parametrize(
    ("skew", "said"),
    [
        ("hot_rank:4x1", "at most hot_rank:2x1.5, hot_rank:3x1.5, hot_rank:6x1.5)"),  # 6 experts don't divide by 4
        ("hot_rank:2x1.6", "a run of E/R experts takes at most that many of a token's 4"),
        ("rotating:hot_rank:6x2", "legal: at most hot_rank:2x1.5"),
        ("burst:7", "legal: burst:1 to burst:6"),
        ("rotating:hot:7", "legal: hot:1 to hot:6"),
        ("spread:7:hot:2", "legal: spread:2:hot:2 to spread:6:hot:2"),
    ],
)
def test_what_a_model_does_not_allow_is_refused_with_what_it_does(skew, said):
    with pytest.raises(ConfigError) as caught:
        synthetic_routing(spec_of(6, 4), 8, skew, 0)
    assert said in str(caught.value)
    assert caught.value.value == skew
    with pytest.raises(ConfigError, match=rf"^experiment\.skews = '{skew}'"):
        Experiment(models=(spec_of(6, 4),), skews=(skew,))


def test_a_layer_of_one_expert_has_no_hot_rank():
    with pytest.raises(ConfigError, match="legal: none"):
        synthetic_routing(spec_of(1, 1), 8, "hot_rank:2x1", 0)


def test_one_spelling():
    for given_, one in (
        ("hot_rank:04x2.50", "hot_rank:4x2.5"),
        ("burst:06", "burst:6"),
        ("rotating:zipf:1.20", "rotating:zipf:1.2"),
        ("spread:04:hot:05", "spread:4:hot:5"),
        ("spread:4:zipf:.5", "spread:4:zipf:0.5"),
    ):
        assert canonical_skew(given_) == canonical_skew(one) == one


# How many tokens each rank has


@examples(40)
@given(
    seed=seeds,
    tokens=st.integers(0, 500),
    world=st.integers(1, 9),
    split=st.sampled_from(["even", "ragged", "one_rank"]),
)
def test_every_split_is_a_division_of_all_tokens(seed, tokens, world, split):
    bounds = token_bounds(tokens, world, split, seed)
    assert bounds == token_bounds(tokens, world, split, seed)
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    assert (len(bounds), bounds[-1][1]) == (world, tokens)
    counts = [stop - start for start, stop in bounds]
    assert min(counts) >= 0
    assert max(counts) == most_tokens(tokens, world, split, seed)
    if split == "even":
        assert bounds == split_bounds(tokens, world)
    if split == "one_rank":
        assert max(counts) == tokens
    if split == "ragged" and world >= 3:
        assert 0 in counts


def test_ragged_ranks_differ_and_none_is_preferred():
    shares = torch.tensor(
        [[stop - start for start, stop in token_bounds(1000, 4, "ragged", seed)] for seed in range(400)]
    )
    assert (shares.float().mean(0) - 250).abs().max() < 45
    assert sorted((shares == 0).sum(0).tolist())[0] > 60  # each is the idle one in a quarter of them
    assert all(len(set(row)) >= 3 for row in shares.tolist())
    assert {token_bounds(9, 3, "one_rank", seed).index((0, 9)) for seed in range(30)} == {0, 1, 2}


def test_a_split_of_replicated_tokens_is_refused():
    with pytest.raises(ConfigError, match=r"workload\.token_split = 'ragged': divides sharded tokens"):
        WorkloadSpec(tokens=4, token_layout="replicated", token_split="ragged")
    with pytest.raises(ConfigError, match=r"experiment\.token_splits = .*'one_rank'.*sharded"):
        Experiment(models=(SPEC,), token_layouts=("sharded", "replicated"), token_splits=("even", "one_rank"))
    with pytest.raises(ConfigError, match=r"token_splits.*'odd'.*legal: even, ragged"):
        Experiment(models=(SPEC,), token_splits=("odd",))


def test_splits_are_a_list_of_an_experiment():
    found = list(Experiment(models=(SPEC,), worlds=(2,), token_splits=("even", "ragged")).cases("cpu"))
    assert {case.workload.token_split for case in found} == {"even", "ragged"}
    assert {" tokens ragged " in case.label for case in found} == {True, False}
