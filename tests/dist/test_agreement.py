"""Ranks that don't agree on what they run hear of it before they compute each other's wrong numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dist.pool import Pool

from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.errors import ConfigError
from moe_dist.machine.machine import Machine
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import shard
from moe_dist.workloads.random_weights import random_expert, random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

SPEC = MoESpec(name="small", hidden=256, intermediate=256, num_experts=8, top_k=2)
EP = {"grid": {"ep": 2}, "exchange": "ag_rs"}
MOVED = [0, 0, 0, 1, 1, 1, 1, 0]
ALIKE = EP | {"token_layout": "replicated"}


def layer_of(comm: Comm, grid: Any, spec: MoESpec = SPEC, **options: Any) -> MoELayer:
    plan = make_plan(spec, ParallelSpec(**grid), backend="torch", machine=Machine.detect("cpu"), **options)
    shared = None
    if spec.shared_experts != "none":
        shared = random_expert(spec.shared_spec(), spec.num_experts, 0)
    return MoELayer(plan, shard(random_weights(spec, 0), plan.placement, comm.rank), comm, shared=shared)


def inputs(seed: int, tokens: int = 6) -> tuple[torch.Tensor, Routing]:
    return Stream("tokens", seed).normal(tokens, 256).bfloat16(), synthetic_routing(SPEC, tokens, "uniform", seed)


def refused(comm: Comm, options: list[dict[str, Any]]) -> tuple[str, str] | None:
    layer = layer_of(comm, **options[comm.rank])
    try:
        layer(*inputs(0))
    except ConfigError as error:
        return error.field, error.rule
    return None


@pytest.mark.parametrize(
    ("change", "field", "values"),
    [
        ({}, None, ()),
        ({"spec": SPEC.with_changes(name="another name")}, None, ()),
        ({"grid": {"tp": 2}}, "plan.placement", ("EP2", "TP2")),
        ({"grid": {"ep": 2, "replicas": {0: [1]}}}, "plan.placement", ("EP2", "EP2+1")),
        ({"grid": {"ep": 2, "expert_map": MOVED}}, "plan.placement", ("EP2", "EP2@0d5773")),
        ({"exchange": "all_to_all"}, "plan.exchange", ("ag_rs", "all_to_all")),
        ({"payload": "unquantized"}, "plan.payload", ("fp8", "bf16")),
        ({"combine_dtype": "fp32"}, "plan.combine_dtype", ("bf16", "fp32")),
        ({"token_layout": "replicated"}, "plan.token_layout", ("sharded", "replicated")),
        ({"spec": SPEC.with_changes(activation="geglu")}, "plan.spec.activation", ("swiglu", "geglu")),
        ({"spec": SPEC.with_changes(quant="fp8_channel")}, "plan.spec.quant", ("fp8_block", "fp8_channel")),
        ({"spec": SPEC.with_changes(routed_scaling=2.5)}, "plan.spec.routed_scaling", ("1.0", "2.5")),
    ],
)
def test_plans_that_differ(pool: Pool, change: dict[str, Any], field: str | None, values: tuple[str, ...]) -> None:
    for said in pool.run(2, refused, [EP, EP | change]):
        if field is None:
            assert said is None
        else:
            found, rule = said
            assert found == field
            assert rule.startswith(f"must be the same on all ranks (rank 0: {values[0]}; rank 1: {values[1]})")


def test_maps_of_experts_that_differ_are_told_by_their_groups(pool: Pool) -> None:
    other = [0, 0, 0, 1, 0, 1, 1, 1]
    options = [EP | {"grid": {"ep": 2, "expert_map": experts}} for experts in (MOVED, other)]
    for field, rule in pool.run(2, refused, options):
        assert field == "plan.placement"
        assert "plan.placement.experts[0] (rank 0: 0-2, 7; rank 1: 0-2, 4)" in rule
        assert "plan.placement.experts[1] (rank 0: 3-6; rank 1: 3, 5-7)" in rule


def test_who_is_alike_is_told(pool: Pool) -> None:
    three = [{"grid": {"ep": 3}, "exchange": "ag_rs"}] * 3
    three[1] = three[1] | {"combine_dtype": "fp32"}
    assert {rule for _, rule in pool.run(3, refused, three)} == {
        "must be the same on all ranks (ranks 0, 2: bf16; rank 1: fp32)"
    }


def replicated(comm: Comm, exchange: str, what: str, shared: bool) -> str | None:
    spec = SPEC.with_changes(shared_experts="replicated", shared_intermediate=128) if shared else SPEC
    layer = layer_of(comm, **ALIKE | {"spec": spec, "exchange": exchange})
    x, routing = inputs(0)
    ids, weights = routing.ids_TK.clone(), routing.weights_TK.clone()
    ids[4], ids[5, 1] = -1, -1
    weights[4] = weights[5, 1] = 0.5 + comm.rank  # beside no expert
    if not shared:
        x[4] = comm.rank  # no expert takes it
    if comm.rank == 1:
        if what == "x":
            x[1, 3] += 1
        elif what == "row":
            x[4, 0] += 1
        elif what == "ids":
            ids[2, 0] = (ids[2, 0] + 1) % 8
        elif what == "weights":
            weights[2, 0] *= 2
        elif what == "order":
            x, ids, weights = x.flip(0), ids.flip(0), weights.flip(0)
    try:
        layer(x, Routing(ids, weights))
    except ConfigError as error:
        return error.field
    return None


@pytest.mark.parametrize("exchange", ["all_reduce", "ag_rs"])
@pytest.mark.parametrize(
    ("what", "field"),
    [("", None), ("x", "x"), ("ids", "routing"), ("weights", "routing"), ("order", "routing"), ("row", None)],
)
def test_replicated_tokens_that_differ(pool: Pool, exchange: str, what: str, field: str | None) -> None:
    assert pool.run(2, replicated, exchange, what, False) == [field] * 2


def test_a_shared_expert_takes_every_row(pool: Pool) -> None:
    assert pool.run(2, replicated, "all_reduce", "", True) == [None] * 2
    assert pool.run(2, replicated, "all_reduce", "row", True) == ["x"] * 2


def crossed(comm: Comm, exchange: str, two_comms: bool) -> list[str]:
    """Two layers of one plan, called in another order by rank 1; what is raised, and once more in one order."""
    comms = [comm, Comm.from_group("cpu", comm._group) if two_comms else comm]
    layers = [layer_of(each, {"ep": 2}, exchange=exchange) for each in comms]
    order, found = layers if comm.rank == 0 else layers[::-1], []
    for layer in (order[0], layers[0], layers[1]):
        try:
            layer(*inputs(0))
            found.append("")
        except ConfigError as error:
            found.append(f"{error.field}: {error.rule}")
    return found


@pytest.mark.parametrize("two_comms", [False, True], ids=["one Comm", "a Comm each"])
@pytest.mark.parametrize("exchange", ["ag_rs", "all_to_all", "all_reduce"])
def test_layers_that_are_called_in_another_order(pool: Pool, exchange: str, two_comms: bool) -> None:
    """Of one model, so that nothing but their numbers tells them apart."""
    for first, *then in pool.run(2, crossed, exchange, two_comms):
        assert first.startswith("layer: the ranks call different layers")
        assert then == ["", ""]
