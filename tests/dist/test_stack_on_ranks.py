"""Stacks on several ranks: what the layers give one by one, whatever they exchange by, and one agreement a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dist.pool import Pool

from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.engine.router import Router
from moe_dist.engine.stack import MoEStack
from moe_dist.errors import ConfigError, RankFailure
from moe_dist.machine.machine import Machine
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import shard
from moe_dist.step import workspace_of
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

SPEC = MoESpec(name="small", hidden=128, intermediate=512, num_experts=8, top_k=2)
FORMS = (  # of the layers of one stack: placement and exchange
    ("ep", "ag_rs"), ("tp", "all_to_all"), ("ep", "all_to_all"), ("tp", "all_reduce"), ("ep", "all_reduce"),
)  # fmt: skip


def layer_of(comm: Comm, seed: int, kind: str, exchange: str, layout: str, router: bool, **options: Any) -> MoELayer:
    parallel = ParallelSpec(**{kind: comm.world})
    plan = make_plan(
        SPEC,
        parallel,
        exchange=exchange,
        backend="torch",
        token_layout=layout,
        machine=Machine.detect("cpu"),
        **options,
    )
    gate = Stream("a test's router", seed).normal(SPEC.num_experts, SPEC.hidden)
    weights = shard(random_weights(SPEC, seed), plan.placement, comm.rank)
    return MoELayer(plan, weights, comm, router=Router(plan, gate) if router else None)


def stack_of(comm: Comm, layout: str, router: bool, forms: Any = FORMS) -> MoEStack:
    return MoEStack(layer_of(comm, seed, *form, layout, router) for seed, form in enumerate(forms))


def inputs(rank: int, tokens: int, layers: int) -> tuple[torch.Tensor, list[Routing]]:
    x = Stream("a test's tokens", rank).normal(tokens, SPEC.hidden).bfloat16()
    return x, [synthetic_routing(SPEC, tokens, "zipf:1.2", rank, number) for number in range(layers)]


def chained(stack: MoEStack, x: torch.Tensor, routings: list[Routing] | None, **options: Any) -> torch.Tensor:
    for number, layer in enumerate(stack.layers):
        x = x + layer(x, None if routings is None else routings[number], **options)
    return x


def scratch_of(comm: Comm, call: Any, *given: Any, **options: Any) -> int:
    """Bytes of the workspace that a step takes."""
    workspace = workspace_of(comm.device)
    workspace._views.clear()  # a view that is known is not counted again
    workspace.high_water = 0
    call(*given, **options)
    return workspace.high_water


def compared(comm: Comm, counts: list[int], layout: str, own: bool, bucket: int | None, captured: bool) -> str:
    stack = stack_of(comm, layout, own)
    tokens = counts[comm.rank]
    x, routings = inputs(comm.rank if layout == "sharded" else 0, tokens, len(FORMS))
    given, options = None if own else routings, {"max_tokens_per_rank": bucket, "captured": captured}
    y, expected = stack(x, given, **options), chained(stack, x, given, **options)
    if y.shape != x.shape or not torch.equal(y, expected):
        return f"rank {comm.rank} differs by {float((y - expected).abs().max())}"
    one = None if own else routings[0]
    most = max(scratch_of(comm, layer, x, one, **options) for layer in stack.layers)
    taken = scratch_of(comm, stack, x, given, **options)
    return "" if taken == most else f"{taken} bytes of scratch, and {most} for one layer"


@pytest.mark.parametrize(
    ("counts", "layout"),
    [([5, 5], "sharded"), ([0, 7], "sharded"), ([7, 7], "replicated"), ([3, 0, 9, 1], "sharded"),
     ([0, 0, 0, 0], "sharded"), ([6, 6, 6, 6], "replicated")],
)  # fmt: skip
@pytest.mark.parametrize("own", [False, True], ids=["given", "own routers"])
def test_a_stack_is_its_layers_one_by_one(pool: Pool, counts: list[int], layout: str, own: bool) -> None:
    for bucket, captured in ((None, False), (9, False), (9, True)):
        assert pool.run(len(counts), compared, counts, layout, own, bucket, captured) == [""] * len(counts)


def hundred(comm: Comm) -> tuple[int, int]:
    """Scratch of one layer and of a hundred."""
    stack = MoEStack([layer_of(comm, 0, "ep", "ag_rs", "sharded", False) for _ in range(100)])
    x, routings = inputs(comm.rank, 20, 100)
    return scratch_of(comm, stack.layers[0], x, routings[0]), scratch_of(comm, stack, x, routings)


def test_a_hundred_layers_need_the_scratch_of_one(pool: Pool) -> None:
    for alone, together in pool.run(2, hundred):
        assert 0 < alone == together


def meetings(comm: Comm, debug: bool, bucket: int | None) -> tuple[int, bool]:
    """How often the ranks met in a step, and whether it gave what it gives where every layer meets. `debug` aside,
    layers behave as on a GPU."""
    forms = [("ep", "ag_rs")] * 4
    stack = stack_of(comm, "sharded", False, forms)
    x, routings = inputs(comm.rank, 3 + 2 * comm.rank, 4)
    expected = stack(x, routings)
    if not debug:
        before, MoELayer.meets = MoELayer.meets, False
    try:
        count, meet = [], comm.meet
        comm.meet = lambda *given: (count.append(given), meet(*given))[1]
        found = stack(x, routings, max_tokens_per_rank=bucket)
    finally:
        comm.meet = meet
        if not debug:
            MoELayer.meets = before
    return len(count), torch.equal(found, expected)


@pytest.mark.parametrize(("debug", "bucket", "often"), [(False, None, 1), (False, 9, 0), (True, None, 4), (True, 9, 4)])
def test_ranks_agree_on_a_bucket_once(pool: Pool, debug: bool, bucket: int | None, often: int) -> None:
    assert pool.run(2, meetings, debug, bucket) == [(often, True)] * 2


def differing(comm: Comm, what: str) -> tuple[str, str]:
    forms = [("ep", "ag_rs")] * 3
    if comm.rank == 1:
        forms = {"exchange": [*forms[:2], ("ep", "all_to_all")], "number": forms[:2]}.get(what, forms)
    stack = stack_of(comm, "sharded", False, forms)
    x, routings = inputs(comm.rank, 4, len(forms))
    before, MoELayer.meets = MoELayer.meets, False
    try:
        if what == "step left out" and comm.rank == 1:
            with pytest.raises(ConfigError):
                stack(x, routings[:1])
        stack(x, routings)
    except ConfigError as error:
        return error.field, error.rule
    except RankFailure as error:
        return error.op, error.cause
    finally:
        MoELayer.meets = before
        if what == "number" and comm.rank == 1:  # later tests use this group: the ranks have counted alike again
            comm.number_layer()
        if what == "step left out" and comm.rank == 0:
            comm.begin_step()
    return "", ""


@pytest.mark.parametrize(
    ("what", "field", "rule"),
    [("", "", ""), ("exchange", "layers[2].plan.exchange", "must be the same on all ranks"),
     ("number", "layers", "must be the same on all ranks"),
     ("step left out", "meet", "left a step out")],
)  # fmt: skip
def test_ranks_whose_stacks_differ_hear_of_it_where_they_meet(pool: Pool, what: str, field: str, rule: str) -> None:
    for found, said in pool.run(2, differing, what):
        assert found == field
        assert rule in said
