"""Routers against one token at a time in plain Python; synthetic routing against what its name promises."""

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.errors import ConfigError
from moe_dist.model.routing import Routing, route
from moe_dist.model.spec import MoESpec
from moe_dist.workloads.skew_names import SKEWS, check_skew, skew_label
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.traces import trace_of


def make_spec(num_experts=16, top_k=4, **changes):
    return MoESpec(hidden=8, intermediate=128, num_experts=num_experts, top_k=top_k, **changes)


ROUTERS = {
    "mixtral": make_spec(8, 2),
    "softmax-raw": make_spec(16, 4, renormalize=False, routed_scaling=1.5),
    "qwen3": make_spec(128, 8),
    "sigmoid-plain": make_spec(16, 4, scoring="sigmoid"),
    "kimi": make_spec(48, 8, scoring="sigmoid", correction_bias=True, routed_scaling=2.827),
    "deepseek-v3": make_spec(
        64, 8, scoring="sigmoid", correction_bias=True, num_groups=8, top_groups=4, routed_scaling=2.5
    ),
    "tight-groups": make_spec(
        12, 4, scoring="sigmoid", correction_bias=True, num_groups=6, top_groups=2, renormalize=False
    ),
    "all-experts": make_spec(4, 4),
}


def route_one(logits, bias, spec):
    """One token, {expert: weight}: the papers' words in plain Python floats."""
    if spec.scoring == "softmax":
        total = sum(math.exp(logit) for logit in logits)
        scores = [math.exp(logit) / total for logit in logits]
    else:
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    biased = [score + b for score, b in zip(scores, bias, strict=True)]
    size = spec.num_experts // spec.num_groups
    members = [list(range(group * size, (group + 1) * size)) for group in range(spec.num_groups)]
    members.sort(key=lambda group: -sum(sorted(biased[e] for e in group)[-2:]))
    allowed = [e for group in members[: spec.top_groups] for e in group]
    chosen = sorted(allowed, key=lambda e: -biased[e])[: spec.top_k]
    divisor = sum(scores[e] for e in chosen) if spec.renormalize else 1
    return {e: scores[e] / divisor * spec.routed_scaling for e in chosen}


@pytest.mark.parametrize("name", ROUTERS)
def test_route_against_one_token_at_a_time(name):
    spec = ROUTERS[name]
    generator = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(60, spec.num_experts, generator=generator)
    bias = 0.4 * torch.randn(spec.num_experts, generator=generator) if spec.correction_bias else None
    routing = route(logits, spec, bias)
    assert (routing.ids_TK.dtype, routing.weights_TK.dtype) == (torch.int32, torch.float32)
    assert routing.tokens == 60
    for t in range(60):
        expected = route_one(logits[t].tolist(), [0.0] * spec.num_experts if bias is None else bias.tolist(), spec)
        found = dict(zip(routing.ids_TK[t].tolist(), routing.weights_TK[t].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-5)
    if spec.renormalize:
        assert torch.allclose(routing.weights_TK.sum(-1), torch.full((60,), spec.routed_scaling), rtol=1e-5)


def test_the_bias_chooses_but_does_not_weigh():
    spec = make_spec(4, 2, scoring="sigmoid", correction_bias=True, renormalize=False)
    logits = torch.tensor([[-4.0, 3.0, 2.0, 1.0]])
    plain = route(logits, spec, torch.zeros(4))
    assert set(plain.ids_TK[0].tolist()) == {1, 2}
    biased = route(logits, spec, torch.tensor([5.0, 0, 0, 0]))
    assert biased.ids_TK[0].tolist() == [0, 1]
    assert biased.weights_TK[0].tolist() == pytest.approx([1 / (1 + math.exp(4)), 1 / (1 + math.exp(-3))])


@pytest.mark.parametrize("shift", [0.0, -10.0])
def test_the_best_expert_of_a_poor_group_is_not_chosen(shift):
    """Group scores are the sums of two; and biased scores below zero must not let masked experts back in, as a mask
    by 0 instead of -inf would."""
    spec = make_spec(6, 2, scoring="sigmoid", correction_bias=True, num_groups=3, top_groups=1)
    logits = torch.tensor([[4.0, -9.0, 1.0, 1.5, 0.0, 0.1]])
    ids = route(logits, spec, torch.full((6,), shift)).ids_TK
    assert set(ids[0].tolist()) == {2, 3}


def test_bf16_and_extreme_logits_are_handled_in_float32():
    spec = make_spec(16, 4)
    logits = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    low, high = route(logits, spec), route(logits.float(), spec)
    assert torch.equal(low.weights_TK, high.weights_TK)
    for scoring in ("softmax", "sigmoid"):
        weights = route(torch.full((1, 16), -1e4), spec.with_changes(scoring=scoring)).weights_TK
        assert torch.isfinite(weights).all()


def test_no_tokens_and_wrong_columns():
    spec = make_spec(16, 4)
    assert route(torch.zeros(0, 16), spec).ids_TK.shape == (0, 4)
    with pytest.raises(ConfigError, match=r"logits = \(3, 15\).*\[tokens, 16\]"):
        route(torch.zeros(3, 15), spec)


# --- synthetic routing ---


def counts(routing, num_experts):
    ids = routing.ids_TK.flatten()
    return torch.bincount(ids[ids >= 0].long(), minlength=num_experts)


@pytest.mark.parametrize("skew", ["balanced", "uniform", "zipf:0", "zipf:1.2", "hot:1", "hot:6", "single"])
@pytest.mark.parametrize("tokens", [1, 33, 4097])  # 4097: two chunks of Gumbel noise
def test_synthetic_routing_is_well_formed_and_repeatable(skew, tokens):
    spec = make_spec(16, 4, routed_scaling=2.5)
    routing = synthetic_routing(spec, tokens, skew, seed=3)
    ids, weights = routing.ids_TK, routing.weights_TK
    assert ids.shape == weights.shape == (tokens, 4)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert ids.min() >= -1
    assert ids.max() < 16
    assert torch.equal(ids < 0, weights == 0)
    if skew != "single":
        assert (ids >= 0).all()
        ordered = ids.sort(-1).values
        assert (ordered[:, 1:] != ordered[:, :-1]).all()  # K distinct experts
    assert torch.allclose(weights.sum(-1), torch.full((tokens,), 2.5), rtol=1e-5)
    again = synthetic_routing(spec, tokens, skew, seed=3)
    assert torch.equal(again.ids_TK, ids)
    assert torch.equal(again.weights_TK, weights)
    others = [synthetic_routing(spec, tokens, skew, seed).ids_TK for seed in (4, 5, 6)]
    assert not all(torch.equal(other, ids) for other in others)


@pytest.mark.parametrize("skew", ["balanced", "single", *(pytest.param(s) for s in ("uniform", "zipf:1", "hot:1"))])
def test_no_tokens_at_all(skew):
    assert synthetic_routing(make_spec(), 0, skew, 0).ids_TK.shape == (0, 4)


@settings(max_examples=60, deadline=None)
@given(experts=st.integers(1, 40), top_k=st.integers(1, 40), tokens=st.integers(1, 70), seed=st.integers(0, 99))
def test_balanced_is_even_to_one_row(experts, top_k, tokens, seed):
    spec = make_spec(experts, min(top_k, experts))
    found = counts(synthetic_routing(spec, tokens, "balanced", seed), experts)
    assert found.max() - found.min() <= 1
    assert found.sum() == tokens * spec.top_k


@pytest.mark.parametrize("skew", ["uniform", "zipf:0", "hot:64"])
def test_uniform_passes_chi_square(skew):
    """63 degrees of freedom: mean 63, deviation 11. Too even (as balanced is) fails as well."""
    found = counts(synthetic_routing(make_spec(64, 2), 20000, skew, seed=1), 64).double()
    chi_square = float(((found - found.mean()) ** 2 / found.mean()).sum())
    assert 25 < chi_square < 120


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_zipf_follows_its_law(power):
    found = counts(synthetic_routing(make_spec(16, 1), 20000, f"zipf:{power}", seed=2), 16).double()
    odds = torch.arange(1, 17).double() ** -power
    shares = found.sort(descending=True).values / 20000
    assert torch.allclose(shares, odds / odds.sum(), atol=0.012)  # 3.5 deviations of the largest possible share


def test_zipf_popularity_is_a_random_order_of_the_experts():
    tops = {int(counts(synthetic_routing(make_spec(), 500, "zipf:2", seed), 16).argmax()) for seed in range(12)}
    assert len(tops) >= 5


@pytest.mark.parametrize("hot", [1, 3, 4, 6, 16])
def test_hot_experts_fill_what_they_can(hot):
    tokens, top_k = 4000, 4
    found = counts(synthetic_routing(make_spec(16, top_k), tokens, f"hot:{hot}", seed=7), 16)
    ordered = found.sort(descending=True).values.double()
    if hot <= top_k:
        assert (ordered[:hot] == tokens).all()
        rest = tokens * (top_k - hot) / (16 - hot)
    else:
        assert torch.allclose(ordered[:hot], torch.tensor(tokens * top_k / hot).double(), rtol=0.1)
        rest = 0
    assert torch.allclose(ordered[hot:], torch.tensor(rest).double(), rtol=0.15)


def test_single_is_one_expert_with_all_the_weight():
    routing = synthetic_routing(make_spec(routed_scaling=2.5), 50, "single", seed=0)
    assert len(routing.ids_TK[:, 0].unique()) == 1
    assert (routing.ids_TK[:, 1:] == -1).all()
    assert (routing.weights_TK[:, 0] == 2.5).all()


@pytest.fixture
def recorded(tmp_path):
    """Saves what it is given and returns the skew that names it."""

    def save(content):
        torch.save(content, tmp_path / "routing.pt")
        return f"file:{tmp_path / 'routing.pt'}"

    return save


def test_a_file_wraps_around(recorded):
    ids = torch.tensor([[0, 5], [7, -1], [2, 3]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.75, 2.0]], dtype=torch.float64)
    skew = recorded({"ids": ids, "weights": weights})
    check_skew(skew)
    routing = synthetic_routing(make_spec(8, 2, routed_scaling=9.0), 7, skew, seed=0)
    order = [0, 1, 2, 0, 1, 2, 0]
    assert torch.equal(routing.ids_TK, ids[order].int())
    assert torch.equal(routing.weights_TK, weights[order].float())  # as recorded: not scaled again
    assert torch.equal(synthetic_routing(make_spec(8, 2), 2, skew, 0).ids_TK, ids[:2].int())


@pytest.mark.parametrize(
    ("ids", "shape", "words"),
    [
        ([[0, 1, 2]], (1, 3), r"\[rows, 2\]"),
        ([[0, 1]], (2, 2), r"weights \(2, 2\)"),
        ([0, 1], (2,), r"ids \(2,\)"),
        (torch.zeros(0, 2), (0, 2), r"ids \(0, 2\)"),
        ([[0, 8]], (1, 2), "expert 8.*-1 to 7"),
        pytest.param([[0, -2]], (1, 2), "-2"),
        pytest.param([[0, 2**32 + 1]], (1, 2), "expert"),  # wraps to expert 1
    ],
)
def test_a_file_that_does_not_fit_is_refused(recorded, ids, shape, words):
    skew = recorded({"ids": torch.as_tensor(ids).long(), "weights": torch.ones(shape)})
    with pytest.raises(ConfigError, match=words):
        synthetic_routing(make_spec(8, 2), 4, skew, 0)


@pytest.mark.parametrize(
    "content",
    [
        {"indices": torch.zeros(1, 2)},
        [1, 2],
        {"ids": [[0, 1]], "weights": torch.ones(1, 2)},
        {"ids": torch.tensor([[0, 1]]), "weights": torch.tensor([[1.0, math.nan]])},
    ],
)
def test_a_file_with_something_else_is_refused(recorded, content):
    with pytest.raises(ConfigError):
        synthetic_routing(make_spec(8, 2), 4, recorded(content), 0)


def test_the_label_of_a_file_is_its_content(recorded, tmp_path):
    skew = recorded({"ids": torch.zeros(1, 2), "weights": torch.ones(1, 2)})
    label = skew_label(skew, trace_of(skew))
    shutil.copy(skew.removeprefix("file:"), tmp_path / "copy.pt")
    assert trace_of(f"file:{tmp_path / 'copy.pt'}") == trace_of(skew)
    assert label.startswith("file:")
    assert len(label) == 17
    other = recorded({"ids": torch.ones(1, 2), "weights": torch.ones(1, 2)})
    assert skew_label(other, trace_of(other)) != label
    assert skew_label("zipf:1.2", trace_of("zipf:1.2")) == "zipf:1.2"


def test_balanced_tokens_come_in_random_order():
    """Else the tokens of a rank would go round the experts in turns, and each rank's would be balanced by itself."""
    spec = MoESpec(hidden=128, intermediate=128, num_experts=8, top_k=2)
    ids = synthetic_routing(spec, 64, "balanced", 0).ids_TK
    again = (ids[4:] == ids[:-4]).all(1)  # four tokens take all experts once
    assert 0.05 < again.float().mean() < 0.6  # one in four by chance


@pytest.mark.parametrize("skew", ["balanced", "uniform", "zipf:0", "zipf:1.2", "hot:1", "single", "router"])
def test_legal_skews(skew):
    check_skew(skew)


@pytest.mark.parametrize(
    "skew",
    [
        "", "zipf", "zipf:", "zipf:x", "zipf:nan", "zipf:-1", "hot", "hot:0", "hot:-2", "hot:1.5", "foo:3", "single:2",
        "Balanced", "file", "file:", "file:/no/such/file", "router:1", pytest.param("balanced:"),
    ],
)  # fmt: skip
def test_malformed_skews_list_the_legal_ones(skew):
    for refuse in (check_skew, lambda s: synthetic_routing(make_spec(), 4, s, 0)):
        with pytest.raises(ConfigError) as caught:
            refuse(skew)
        assert (caught.value.field, caught.value.value, caught.value.legal) == ("workload.skew", skew, SKEWS)


def test_router_skew_needs_a_checkpoint():
    with pytest.raises(ConfigError, match="checkpoint"):
        synthetic_routing(make_spec(), 4, "router", 0)


def test_rows_of_a_routing():
    routing = Routing(torch.arange(12, dtype=torch.int32).view(6, 2), torch.arange(12.0).view(6, 2))
    part = routing.rows(2, 4).to("cpu")
    assert part.ids_TK.tolist() == [[4, 5], [6, 7]]
    assert part.weights_TK.tolist() == [[4, 5], [6, 7]]


@pytest.mark.parametrize(("groups", "chosen"), [(4, 1), (4, 2), (2, 2)])
def test_limited_routing_stays_within_its_groups(groups, chosen):
    spec = make_spec(num_experts=16, top_k=4)
    ids = synthetic_routing(spec, 400, f"limited:{groups}x{chosen}", 3).ids_TK.long()
    assert all(len(set(row)) == 4 for row in ids.tolist())
    reached = [len({expert // (16 // groups) for expert in row}) for row in ids.tolist()]
    assert max(reached) == min(chosen, groups)
    loads = torch.bincount(ids.flatten(), minlength=16).float()
    assert loads.min() > 0.6 * loads.mean()


@pytest.mark.parametrize("skew", ["limited:3x1", "limited:8x1", "limited:4x5", "limited:4", "limited:x1"])
def test_limited_routing_that_can_not_work(skew):
    with pytest.raises(ConfigError, match="limited"):
        synthetic_routing(make_spec(num_experts=16, top_k=4), 8, skew, 0)
