"""vLLM's own plugin loader, registry, factory, runner, loader and custom op with our layer in them, on a CPU by the
reference backend. Its CUDA kernels and the packages that it only imports are not there, so the routing is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from experts import SPEC, TOLERANCE, drawn, error, expected
from vllm.model_executor.custom_op import op_registry_oot
from vllm_server import UpFirst, experts_of, layer_of, load, loaded, place, run, server

from moe_dist.backends import BACKENDS
from moe_dist.integrations.vllm import register
from moe_dist.integrations.vllm.layer import MoeDistRoutedExperts
from moe_dist.integrations.vllm.method import MoeDistFp8Method
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.spec import ParallelSpec
from moe_dist.model.weights import shard

pytestmark = pytest.mark.stacks


def test_the_plugin_is_loaded_by_entry_point() -> None:
    assert op_registry_oot["RoutedExperts"] is MoeDistRoutedExperts
    register()  # again: nothing is there twice
    assert MoeDistRoutedExperts.backend == "torch"


@pytest.mark.parametrize("backend", ["torch", UpFirst])
def test_a_layer_gives_what_the_oracle_says(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend is UpFirst:
        monkeypatch.setitem(BACKENDS._targets, "torch", UpFirst)
    weights, x_TH, routing = drawn()
    with server() as config:
        layer = loaded(layer_of(), weights)
        assert type(layer.routed_experts) is MoeDistRoutedExperts
        assert isinstance(layer.routed_experts.quant_method, MoeDistFp8Method)
        found = run(layer, config, x_TH, routing)
        empty = run(layer, config, x_TH[:0], Routing(routing.ids_TK[:0], routing.weights_TK[:0]))
    assert found.dtype == torch.bfloat16
    assert error(found, expected(weights, x_TH, routing)) < TOLERANCE
    assert empty.shape == (0, SPEC.hidden)


def test_the_gate_of_gelu() -> None:
    spec = SPEC.with_changes(activation="geglu")
    weights, x_TH, routing = drawn(spec)
    with server() as config:
        layer = loaded(layer_of(activation="gelu_tanh"), weights)
        assert error(run(layer, config, x_TH, routing), expected(weights, x_TH, routing, spec)) < TOLERANCE


def test_vllm_does_the_shared_expert_and_the_scaling() -> None:
    weights, x_TH, routing = drawn()
    shared = torch.nn.Linear(SPEC.hidden, SPEC.hidden, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    with server() as config:
        layer = loaded(
            layer_of(shared_experts=shared, routed_scaling_factor=2.5, apply_routed_scale_to_output=True), weights
        )
        found = run(layer, config, x_TH, routing)
    right = 2.5 * expected(weights, x_TH, routing) + shared(x_TH).float()
    assert error(found, right) < TOLERANCE


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["tp", "ep"])
def test_ranks_hold_what_vllm_gives_them(kind: str, rank: int) -> None:
    weights, x_TH, routing = drawn()
    parallel = ParallelSpec(tp=2) if kind == "tp" else ParallelSpec(ep=2)
    with server():
        layer = experts_of(place(**{kind: 2}, rank=rank))
        load(layer, weights)
        layer.quant_method.process_weights_after_loading(layer)
        found = layer.forward_modular(x_TH, routing.weights_TK, routing.ids_TK)
    held = shard(weights, Placement.build(SPEC, parallel), rank)
    assert layer.w13_weight.shape == held.w13_eFH.shape
    assert error(found, expected(held, x_TH, routing, SPEC, parallel, rank)) < TOLERANCE


def test_without_the_variable_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dist.integrations.vllm.registering.register_layer", lambda name: pytest.fail(name))
    monkeypatch.setenv("MOE_DIST_VLLM_BACKEND", "")
    register()
    monkeypatch.delenv("MOE_DIST_VLLM_BACKEND")
    register()
