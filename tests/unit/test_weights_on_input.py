"""A layer whose weights are its experts' inputs', as in Llama 4, on one rank: every way to run it, and who has to know
of it. What it computes on several ranks, with every exchange, is in tests/contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.bench.tune import tune_shape
from moe_dist.comm import Comm
from moe_dist.commands.config import find_model
from moe_dist.engine.agreement import plan_facts
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.plan import Plan
from moe_dist.engine.planning import make_plan
from moe_dist.machine.machine import Machine
from moe_dist.model.routing import Routing, route
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import ExpertWeights
from moe_dist.oracle.reference import relative_error
from moe_dist.step import Stages, workspace_of
from moe_dist.workloads.random_weights import random_expert, random_weights
from moe_dist.workloads.skews import synthetic_routing

SPEC = MoESpec(hidden=256, intermediate=128, num_experts=4, top_k=1, weights_on_input=True, quant="none")
CPU = Machine.detect("cpu")
T = 21
X = torch.randn(T, 256, generator=torch.Generator().manual_seed(1)).bfloat16()


def planned(spec: MoESpec, **changes: Any) -> Plan:
    return make_plan(spec, ParallelSpec(), **{"exchange": "local", "backend": "torch", "machine": CPU} | changes)


def routing(spec: MoESpec = SPEC, tokens: int = T) -> Routing:
    return synthetic_routing(spec, tokens, "uniform", 3)


def by_hand(weights: ExpertWeights, x: Tensor, asked: Routing) -> Tensor:
    """Llama4TextMoe: one product in float32, rounded to bf16, and experts on that."""
    y = torch.zeros(x.shape)
    scaled = (x.float() * asked.weights_TK).bfloat16().float()
    for token, expert in enumerate(asked.ids_TK[:, 0].tolist()):
        if expert >= 0:
            w13, w2 = weights.dequantized(expert)
            gate, up = (w13 @ scaled[token]).chunk(2)
            y[token] = w2 @ (gate * gate.sigmoid() * up)
    return y


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("shared", ["none", "replicated"])
def test_every_way_to_run_it(debug: bool, captured: bool, shared: str) -> None:
    spec = SPEC.with_changes(shared_experts=shared, shared_intermediate=64)
    weights, of_shared = random_weights(spec, 0), random_expert(spec.shared_spec(), 0, 1) if shared != "none" else None
    plan = planned(spec)
    layer = MoELayer(plan, weights, Comm.single(), shared=of_shared, debug=debug)
    asked = routing()
    asked.ids_TK[[2, 7]], asked.weights_TK[[2, 7]] = -1, float("nan")  # as padding, whatever its weight
    kept, workspace = (X.clone(), asked.weights_TK.clone()), workspace_of(layer.comm.device)
    layer.warm_up(X, asked, 32, captured=captured)
    workspace.high_water = 0
    y = layer(X, asked, max_tokens_per_rank=32, captured=captured).float()
    assert workspace.high_water <= plan.scratch_bytes(T)
    assert torch.equal(X, kept[0])
    assert torch.equal(asked.weights_TK.nan_to_num(), kept[1].nan_to_num())
    wanted = by_hand(weights, X, asked)
    if of_shared is not None:  # which gets the tokens as they came
        every = Routing(torch.zeros(T, 1, dtype=torch.int32), torch.ones(T, 1))
        wanted += by_hand(of_shared, X, every)
    assert relative_error(y, wanted) < 4e-3
    assert shared != "none" or not y[[2, 7]].any()
    nothing = layer(X[:0], asked.rows(0, 0), max_tokens_per_rank=32, captured=captured)
    assert nothing.shape == (0, 256)


def test_the_scaling_is_part_of_dispatch_and_of_the_scratch() -> None:
    plan, asked = planned(SPEC), routing()
    other = planned(SPEC.with_changes(weights_on_input=False))
    assert plan.scratch_bytes(T) - other.scratch_bytes(T) == T * 256 * 2 + 256
    layer, stages = MoELayer(plan, random_weights(SPEC, 0), Comm.single()), Stages(on=True)
    layer(X, asked, stages=stages)
    assert stages.totals_us()["dispatch"] > 0


def test_ranks_must_agree_on_it() -> None:
    assert plan_facts(planned(SPEC))["plan.spec.weights_on_input"] == "True"


def test_drawn_weights_are_not_all_1() -> None:
    """The softmax over one place is: a scaling that is left out would not be seen."""
    assert len(routing().weights_TK.unique()) == T
    assert bool((routing(SPEC.with_changes(weights_on_input=False)).weights_TK == 1).all())


def test_a_backend_is_tuned_with_rows_as_a_layer_hands_them_over() -> None:
    plan = planned(SPEC.with_changes(quant="fp8_block"))
    tuned = tune_shape(plan, plan.parts()[0], [8], 1, 0, lambda _: None, lambda: None)
    assert [found.wrong for found in tuned.found] == [0]


def test_a_known_model_has_it() -> None:
    scout = find_model("Llama-4-Scout")
    assert (scout.weights_on_input, scout.top_k, scout.shared_intermediate) == (True, 1, 8192)


def test_the_largest_logit_is_chosen_where_scores_are_all_1_or_all_0() -> None:
    """float32 has one sigmoid for everything from 17 on, and 0 for everything below -104."""
    spec = MoESpec(hidden=16, intermediate=16, num_experts=3, top_k=1, scoring="sigmoid", renormalize=False)
    logits = torch.tensor([[20.0, 40.0, 30.0], [-200.0, -120.0, -150.0], [20.0, 19.0, float("inf")]])
    found = route(logits, spec)
    assert found.ids_TK.flatten().tolist() == [1, 1, 2]
    assert found.weights_TK.flatten().tolist() == [1.0, 0.0, 1.0]
    nowhere = torch.full((1, 3), float("-inf"))
    assert route(nowhere, spec).ids_TK.tolist() == [[-1]]
    odd = route(torch.tensor([[1.0, float("nan"), 2.0]]), spec)
    assert odd.ids_TK.tolist() == [[1]]
    assert bool(odd.weights_TK.isnan().all())
