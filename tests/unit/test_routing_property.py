"""Whatever a router computes, every token gets experts that differ, in range, and weights as the model's rule says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from profiles import examples

from moe_dist.errors import MoeDistError
from moe_dist.model.routing import Routing, route
from moe_dist.model.spec import MoESpec

DTYPES = [torch.float32] * 4 + [torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.float8_e4m3fn]
LOGITS = st.one_of(
    st.floats(-8, 8, width=32),
    st.sampled_from([0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 3e38, -3e38, 1e-40]),
)
FINITE = st.floats(-8, 8, width=32)


@st.composite
def routers(draw: st.DrawFn) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor | None]:
    """Keys of a spec, mostly legal, with logits and a bias, mostly of its shape."""
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    experts = groups * draw(st.integers(1, 4))
    keys = {
        "num_experts": experts,
        "top_k": draw(st.integers(1, experts + (draw(st.integers(0, 9)) == 0))),
        "scoring": draw(st.sampled_from(["softmax", "sigmoid"])),
        "renormalize": draw(st.booleans()),
        "correction_bias": draw(st.booleans()),
        "num_groups": groups,
        "top_groups": draw(st.integers(1, groups)),
        "routed_scaling": draw(st.sampled_from([1.0, 2.5, 0.5])),
    }
    values = draw(st.sampled_from([LOGITS, FINITE, FINITE]))
    tokens, columns = draw(st.integers(0, 4)), experts + (draw(st.integers(0, 15)) == 0)
    drawn = draw(st.lists(values, min_size=tokens * columns, max_size=tokens * columns))
    logits = torch.tensor(drawn, dtype=torch.float32).view(tokens, columns).to(draw(st.sampled_from(DTYPES)))
    bias = None
    if draw(st.sampled_from([keys["correction_bias"]] * 9 + [not keys["correction_bias"]])):
        bias = torch.tensor(draw(st.lists(values, min_size=experts, max_size=experts)), dtype=torch.float32)
    return keys, logits, bias


@examples(150)
@given(routers())
def test_any_router_is_refused_or_routes(given: tuple[dict[str, Any], torch.Tensor, torch.Tensor | None]) -> None:
    keys, logits, bias = given
    try:
        spec = MoESpec(hidden=128, intermediate=128, **keys)
        routing = route(logits, spec, bias)
    except MoeDistError as error:
        event(type(error).__name__)
        return
    event("routed")
    assert (routing.ids_TK.dtype, routing.weights_TK.dtype) == (torch.int32, torch.float32)
    assert routing.ids_TK.shape == routing.weights_TK.shape == (len(logits), spec.top_k)
    for token, ids in enumerate(routing.ids_TK.tolist()):
        experts = [expert for expert in ids if expert >= 0]
        assert len(set(experts)) == len(experts)
        assert all(-1 <= expert < spec.num_experts for expert in ids)
        weights = routing.weights_TK[token]
        if not weights.isnan().any():  # a token that is lost stays so, and what lies beside -1 counts for nothing
            assert all(weights[place] == 0 for place, expert in enumerate(ids) if expert < 0)
        if bool(logits[token].isfinite().all()) and (bias is None or bool(bias.isfinite().all())):
            check_token(spec, logits[token].double().tolist(), bias, ids, routing, token)


def check_token(
    spec: MoESpec, logits: list[float], bias: torch.Tensor | None, ids: list[int], routing: Routing, token: int
) -> None:
    """By the rule in plain Python. Experts that are as good may change places, so their scores are compared."""
    assert min(ids) >= 0
    if spec.scoring == "softmax":
        parts = [math.exp(each - max(logits)) for each in logits]
        scores = [part / sum(parts) for part in parts]
    else:
        scores = [1 / (1 + math.exp(-each)) if each > -700 else 0.0 for each in logits]
    choice = [score + (0.0 if bias is None else float(bias[expert])) for expert, score in enumerate(scores)]
    if spec.num_groups == 1:
        best = sorted(choice, reverse=True)[: spec.top_k]
        tolerance = 1e-5 * (1 + max(map(abs, choice)))
        taken = sorted((choice[expert] for expert in ids), reverse=True)
        assert all(abs(one - other) <= tolerance for one, other in zip(taken, best, strict=True))
    else:
        size = spec.num_experts // spec.num_groups
        assert len({expert // size for expert in ids}) <= spec.top_groups
    weights = [scores[expert] for expert in ids]
    if spec.renormalize:
        weights = [weight / max(sum(weights), 1e-20) for weight in weights]
    for weight, found in zip(weights, routing.weights_TK[token].tolist(), strict=True):
        assert math.isclose(weight * spec.routed_scaling, found, rel_tol=1e-3, abs_tol=1e-6)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_rank_without_tokens_routes_none(scoring: str, groups: int) -> None:
    keys: dict[str, Any] = {"scoring": scoring, "num_groups": groups, "top_groups": 1}
    spec = MoESpec(hidden=128, intermediate=128, num_experts=8, top_k=2, **keys)
    routing = route(torch.empty(0, 8), spec)
    assert routing.ids_TK.shape == routing.weights_TK.shape == (0, 2)
