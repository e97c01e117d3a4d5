"""Exchange `fused` with backend `deep_gemm_mega` on ranks of a CPU, with a stand-in for the package."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from contract.layer_cases import CPU, Case, Inputs, failures, inputs_of, run_cases
from dist import fake_deep_gemm
from dist.pool import Pool
from dist.test_workloads_on_ranks import MACHINE, as_graph, case, measured
from prometheus_client import CollectorRegistry

from moe_dist.bench.findings import merge
from moe_dist.bench.results import make_row
from moe_dist.comm import Comm
from moe_dist.engine.graph import StepGraph
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.plan import Plan
from moe_dist.engine.planning import make_plan
from moe_dist.engine.stack import MoEStack
from moe_dist.errors import ConfigError
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import shard_from
from moe_dist.runtime.metrics import Metrics
from moe_dist.workloads.random_weights import random_expert

SPEC = MoESpec(hidden=512, intermediate=256, num_experts=8, top_k=3)
PAIR = {"exchange": "fused", "backend": "deep_gemm_mega"}


def plan_of(world: int = 2, spec: MoESpec = SPEC, **changes: Any) -> Plan:
    return make_plan(spec, ParallelSpec(ep=world), machine=CPU, **PAIR | changes)


def with_package(comm: Comm, newest: bool, function: Any, *given: Any) -> Any:
    with fake_deep_gemm.installed(newest):
        fake_deep_gemm.made.clear()
        comm.kept.clear()
        return function(comm, *given)


@pytest.mark.parametrize("newest", [False, True])
def test_it_computes_what_the_oracle_does(pool: Pool, newest: bool) -> None:
    """Also where ranks have different numbers of tokens, and none: all launch for the largest one's."""
    with fake_deep_gemm.installed(newest):
        cases = [
            Case("even", plan_of(), Inputs((6, 6), 1)),
            Case("uneven", plan_of(), Inputs((9, 2), 2, "zipf:1.2")),
            Case("one rank has none", plan_of(), Inputs((0, 5), 3)),
            Case("a bucket that is larger", plan_of(), Inputs((3, 4), 4), bucket=11),
            Case("nobody has any", plan_of(), Inputs((0, 0), 5)),
            Case("replicated", plan_of(token_layout="replicated"), Inputs((4, 3), 7)),
            Case(
                "weights on inputs", plan_of(spec=SPEC.with_changes(top_k=1, weights_on_input=True)), Inputs((4, 3), 9)
            ),
        ]
    by_rank = pool.run(2, with_package, newest, run_cases, cases)
    assert failures(cases, by_rank) == []


def test_it_computes_what_the_oracle_does_on_four_ranks(pool: Pool) -> None:
    with fake_deep_gemm.installed():
        cases = [Case("single", plan_of(4), Inputs((5, 0, 2, 3), 8, "single"))]
    assert failures(cases, pool.run(4, with_package, False, run_cases, cases)) == []


def layers_of(comm: Comm, count: int, up_first: bool = False) -> list[MoELayer]:
    plan = plan_of(comm.world)
    shards = [
        shard_from(lambda expert, seed=seed: random_expert(SPEC, expert, seed), plan.placement, comm.rank)
        for seed in range(count)
    ]
    for shard in shards:
        shard.turn(gate_first=not up_first)
    return [MoELayer(plan, shard, comm) for shard in shards]


def given(comm: Comm, tokens: int, seed: int) -> Any:
    x, routing = inputs_of(SPEC.hidden, SPEC.num_experts, SPEC.top_k, Inputs((tokens,) * comm.world, seed))
    mine = slice(comm.rank * tokens, (comm.rank + 1) * tokens)
    return x[mine].bfloat16(), routing.rows(mine.start, mine.stop)


def stack_in_graphs(comm: Comm) -> dict[str, Any]:
    """Two layers, eagerly and in "graphs" of two sizes between each other, and what was made for them."""
    layers = layers_of(comm, 2)
    stack, inputs = MoEStack(layers), {size: given(comm, size, size) for size in (4, 9)}
    eager = {size: stack(x, [routing] * 2, max_tokens_per_rank=size) for size, (x, routing) in inputs.items()}
    undo = as_graph()
    try:
        graphs = {size: StepGraph(stack, size, x, [routing] * 2) for size, (x, routing) in inputs.items()}
        found = [
            (size, graphs[size](x, [routing] * 2).clone()) for _ in range(2) for size, (x, routing) in inputs.items()
        ]
        x, routing = inputs[4]
        fewer = graphs[9](x, [routing] * 2).clone()
    finally:
        undo()
    differ = [size for size, y in found if not torch.equal(y, eager[size])]
    count, memory = len(fake_deep_gemm.made), weakref.ref(fake_deep_gemm.made[0])
    fake_deep_gemm.made.clear()
    comm.kept.clear()
    held = memory() is not None  # real replays go on in it
    return {"differ": differ, "fewer": torch.equal(fewer, eager[4]), "made": count, "held": held}


def test_layers_of_one_shape_share_memory_and_graphs_give_the_same_bits(pool: Pool) -> None:
    for found in pool.run(2, with_package, False, stack_in_graphs):
        assert found == {"differ": [], "fewer": True, "made": 1, "held": True}


def growing(comm: Comm) -> dict[str, Any]:
    """A larger step takes larger memory, and the smaller ones stay in theirs. Weights that lie [up; gate] are read
    right, and those of a layer stay what they were when another backend turns the shard."""
    (layer,) = layers_of(comm, 1)
    small, large = given(comm, 4, 1), given(comm, 400, 2)
    before = layer(*small)
    layer(*large)
    (turned,) = layers_of(comm, 1, up_first=True)
    same = torch.equal(turned(*small), before)
    layer._weights[0].turn(gate_first=False)
    return {
        "sizes": [len(each.x) for each in fake_deep_gemm.made],
        "kept": list(comm.kept.values()) == fake_deep_gemm.made,
        "turned": same,
        "stays": torch.equal(layer(*small), before),
    }


def test_memory_grows_with_the_step(pool: Pool) -> None:
    for found in pool.run(2, with_package, False, growing):
        assert found == {"sizes": [384, 768], "kept": True, "turned": True, "stays": True}


@pytest.mark.parametrize("in_graph", [False, True])
def test_a_row_is_labelled_from_what_ran(pool: Pool, in_graph: bool) -> None:
    with fake_deep_gemm.installed():
        chosen = case(tokens=25, model=SPEC, iters=3, **PAIR)
        plan = chosen.plan(MACHINE)
    found = merge([result[0] for result in pool.run(2, with_package, False, measured, chosen, 2, in_graph)])
    row = make_row(chosen, plan, found, "torchrun")
    assert (row.exchange, row.backend, row.peer, row.form) == ("fused", "deep_gemm_mega", None, "layer")
    assert (row.placement, row.payload_dtype, row.combine_dtype, row.graph) == ("EP2", "fp8", "bf16", in_graph)
    assert row.ok is True, (row.err_oracle, row.err_exact, row.err_token, row.err_repeat, row.err_again)
    assert row.stages_us["layer"] > 0
    assert row.stages_us["gemm1"] == 0
    assert 0 < row.bytes_sent <= plan.wire_bytes(26)


def counted(comm: Comm) -> dict[str, Any]:
    """What leaves this rank, counted pair by pair: rows of its tokens, and sums of the others' tokens."""
    (layer,) = layers_of(comm, 1)
    x, routing = inputs_of(SPEC.hidden, SPEC.num_experts, SPEC.top_k, Inputs((7,) * comm.world, 5, "zipf:1.2"))
    routing.ids_TK[comm.rank * 7, 0] = -1
    mine = slice(comm.rank * 7, comm.rank * 7 + 7)
    layer(x[mine].bfloat16(), routing.rows(mine.start, mine.stop))
    everyone = comm.all_gather([routing.ids_TK[mine]])[0]
    local, leaving, coming = SPEC.num_experts // comm.world, 0, 0
    for token, ids in enumerate(everyone.view(-1, SPEC.top_k).tolist()):
        for expert in ids:
            home, source = expert // local, token // 7
            if expert >= 0 and home != source:
                leaving, coming = leaving + (source == comm.rank), coming + (home == comm.rank)
    row = SPEC.hidden + 4 * SPEC.hidden // 128 + 8  # and where the pair came from, with its weight
    return {"found": layer.exchange.stored_bytes(), "by hand": leaving * row + coming * 2 * SPEC.hidden}


def test_stored_bytes_are_those_of_pairs_that_leave(pool: Pool) -> None:
    for found in pool.run(2, with_package, False, counted):
        assert found["found"] == found["by hand"] > 0


def watched(comm: Comm) -> dict[str, float | None]:
    (layer,), registry = layers_of(comm, 1), CollectorRegistry()
    labels = {"rank": str(comm.rank), "layer": "0", **PAIR}
    names = {"steps_total": {}, "stage_seconds_count": {"stage": "layer"}, "rows": {}, "expert_imbalance_ratio": {}}
    with Metrics(layer, registry=registry):
        layer(*given(comm, 4, 1))
        return {name: registry.get_sample_value(f"moe_dist_{name}", labels | more) for name, more in names.items()}


def test_metrics_claim_no_rows_that_nobody_has_counted(pool: Pool) -> None:
    for found in pool.run(2, with_package, False, watched):
        assert found == {"steps_total": 1, "stage_seconds_count": 1, "rows": None, "expert_imbalance_ratio": None}


def two_shapes(comm: Comm) -> int:
    """Layers that differ in top_k alone can't share memory."""
    for top_k in (3, 2):
        spec = SPEC.with_changes(top_k=top_k)
        plan = make_plan(spec, ParallelSpec(ep=comm.world), machine=CPU, **PAIR)
        own = shard_from(lambda expert, spec=spec: random_expert(spec, expert, 0), plan.placement, comm.rank)
        x, routing = inputs_of(spec.hidden, spec.num_experts, top_k, Inputs((4,) * comm.world, 1))
        mine = slice(comm.rank * 4, comm.rank * 4 + 4)
        MoELayer(plan, own, comm)(x[mine].bfloat16(), routing.rows(mine.start, mine.stop))
    return len(fake_deep_gemm.made)


def test_layers_of_two_shapes_have_memory_of_their_own(pool: Pool) -> None:
    assert pool.run(2, with_package, False, two_shapes) == [2, 2]


def refused_in_a_capture(comm: Comm) -> str:
    kept = type(comm).captures
    type(comm).captures = property(lambda self: True)  # type: ignore[assignment]
    try:
        comm.keep("another", dict)
    except ConfigError as error:
        return str(error)
    finally:
        type(comm).captures = kept  # type: ignore[method-assign]
    return ""


def test_memory_is_not_made_in_a_capture(pool: Pool) -> None:
    for said in pool.run(2, with_package, False, refused_in_a_capture):
        assert "can't be made while a CUDA graph is captured" in said


def test_a_comm_that_was_left_keeps_nothing() -> None:
    comm = Comm.single()
    first = comm.keep("key", list)
    assert comm.keep("key", list) is first
    assert comm.keep("another", list) is not first
    comm.leave()
    assert comm.kept == {}
