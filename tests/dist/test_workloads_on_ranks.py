"""Workloads on ranks: rows of each kind agree with the oracle, timed steps really take their routings in turn, ranks
with few tokens and none, a routing that is recorded and measured again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dist.pool import Pool
from torch import Tensor

import moe_dist.bench.clock
import moe_dist.bench.measure
from moe_dist.bench.case import Case, Experiment
from moe_dist.bench.findings import merge
from moe_dist.bench.inputs import make_inputs
from moe_dist.bench.loading import weights_of
from moe_dist.bench.measure import measure
from moe_dist.bench.results import make_row
from moe_dist.bench.rounds import Turn
from moe_dist.bench.row import Row
from moe_dist.bench.source_spec import SourceSpec
from moe_dist.checkpoint import layer_spec, make_checkpoint
from moe_dist.comm import Comm
from moe_dist.engine import graph
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.plan import Plan
from moe_dist.machine.machine import Machine
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec, WorkloadSpec
from moe_dist.runtime.context import RankContext
from moe_dist.step import Support
from moe_dist.workloads.skew_names import ROUTINGS

SPEC = MoESpec(name="small", hidden=128, intermediate=256, num_experts=8, top_k=2)
MACHINE = Machine("cpu", 1, "a test's CPU")


def case(skew: str = "uniform", split: str = "even", tokens: int = 24, layout: str = "sharded", **changes: Any) -> Case:
    grid = ParallelSpec(**changes.pop("grid", {"ep": 2}))
    workload = WorkloadSpec(tokens=tokens, seed=5, skew=skew, token_split=split, token_layout=layout)
    defaults = {"model": SPEC, "exchange": "ag_rs", "backend": "torch", "iters": 2, "warmup": 0}
    return Case(parallel=grid, workload=workload, **(defaults | changes))


def as_graph() -> Any:
    """ "Graphs" on a CPU: a replay runs the step again on the graph's buffers. Gives back how to undo it."""
    before = graph.capture, Plan.capturable

    def capture(call: Any, warm_up: Any) -> Any:
        warm_up()
        result = call()

        def replay() -> None:
            again = call()
            if result is not None:
                result.copy_(again)

        return SimpleNamespace(replay=replay), result

    graph.capture = moe_dist.bench.clock.capture = capture
    Plan.capturable = Support(True)

    def undo() -> None:
        graph.capture, Plan.capturable = before
        moe_dist.bench.clock.capture = graph.capture

    return undo


def measured(comm: Comm, chosen: Case, turns: int = 1, in_graph: bool = False) -> tuple[Any, list[Tensor]]:
    """The result, and the ids that the first layer of each timed step was given."""
    context, plan = RankContext(comm, "torchrun"), chosen.plan(MACHINE)
    undo = as_graph() if in_graph else lambda: None
    seen: list[Tensor] = []
    timing, forward, clock = [False], MoELayer.forward, moe_dist.bench.measure.time_steps

    def watched(self: Any, x: Tensor, routing: Routing | None = None, **step: Any) -> Tensor:
        if timing[0] and routing is not None:
            seen.append(routing.ids_TK.clone())
        return forward(self, x, routing, **step)

    def timed(comm: Comm, step: Any, *rest: Any, **options: Any) -> list[float]:
        def marked() -> None:
            timing[0] = True
            step()
            timing[0] = False

        return clock(comm, marked, *rest, **options)

    MoELayer.forward, moe_dist.bench.measure.time_steps = watched, timed  # type: ignore[method-assign]
    try:
        for number in range(turns + 1):
            result = measure(context, chosen, replace(plan, graph=in_graph), Turn(number, turns, 0))
    finally:
        MoELayer.forward, moe_dist.bench.measure.time_steps = forward, clock  # type: ignore[method-assign]
        undo()
    return result, seen[:: chosen.layers]


def row_of(pool: Pool, chosen: Case, *arguments: Any) -> Row:
    results = pool.run(chosen.parallel.world, measured, chosen, *arguments)
    plan = replace(chosen.plan(MACHINE), graph=arguments[1:] == (True,))
    return make_row(chosen, plan, merge([result for result, _ in results]), "torchrun")


@pytest.mark.parametrize(
    "chosen",
    [
        case("hot_rank:2x1.75"),
        case("burst:2", exchange="all_to_all"),
        case("spread:2:zipf:1.5"),
        case("rotating:zipf:2", exchange="all_to_all", grid={"tp": 2}),
        case("rotating:hot_rank:2x2", layers=2),
        case("rotating:hot:2", exchange="all_reduce", layout="replicated", tokens=5),
    ],
    ids=lambda chosen: chosen.label,
)
def test_rows_of_each_routing_agree_with_the_oracle(pool: Pool, chosen: Case) -> None:
    row = row_of(pool, chosen, 2)
    assert (row.ok, row.skew, row.err_repeat) == (True, chosen.workload.skew, 0.0)
    assert row.pairs == chosen.workload.tokens * SPEC.top_k
    assert len(row.routing_p50_us) == (2 if "rotating" in row.skew else 0)  # so many iterations were there


@pytest.mark.parametrize(("exchange", "in_graph"), [("ag_rs", True), ("all_to_all", False), ("all_reduce", True)])
def test_rows_of_a_layer_with_weights_on_inputs(pool: Pool, exchange: str, in_graph: bool) -> None:
    """A stack of two, whose layers take their scratch one after the other, with ranks that have few tokens or none."""
    model = SPEC.with_changes(
        top_k=1, weights_on_input=True, shared_experts="replicated", shared_intermediate=128, quant="fp8_block"
    )
    chosen = case("zipf:1.2", "one_rank", model=model, exchange=exchange, grid={"tp": 2, "ep": 2}, layers=2)
    row = row_of(pool, chosen, 2, in_graph)
    assert (row.ok, row.graph, row.err_repeat) == (True, in_graph, 0.0), (row.err_oracle, row.err_whole, row.err_again)
    assert row.err_whole is not None
    assert row.err_whole < 1e-5


def test_a_hot_rank_is_that_on_ranks_and_spreading_takes_it_away(pool: Pool) -> None:
    unchecked: Any = {"iters": 0, "check": False}
    assert row_of(pool, case("hot_rank:2x1.75", **unchecked)).imbalance == 1.75
    assert row_of(pool, case("spread:2:hot_rank:2x1.75", **unchecked)).imbalance < 1.1
    four = row_of(pool, case("hot_rank:2x1.75", grid={"ep": 4}, **unchecked))
    assert four.imbalance >= 1.75  # two of the ranks have half of its experts each
    assert row_of(pool, case("hot_rank:2x1.75", grid={"tp": 2}, **unchecked)).imbalance == 1.0


@pytest.mark.parametrize(
    ("exchange", "split", "grid", "in_graph"),
    [
        ("ag_rs", "ragged", {"ep": 4}, False),
        ("ag_rs", "one_rank", {"tp": 2}, True),
        ("all_to_all", "ragged", {"tp": 2, "ep": 2}, False),
        ("all_to_all", "one_rank", {"ep": 2}, False),
        ("all_to_all", "ragged", {"ep": 3}, True),
        ("all_reduce", "one_rank", {"ep": 2}, False),
        ("all_reduce", "ragged", {"ep": 3}, True),
    ],
)
def test_ranks_with_different_numbers_of_tokens(
    pool: Pool, exchange: str, split: str, grid: Any, in_graph: bool
) -> None:
    row = row_of(pool, case("zipf:1", split, 23, exchange=exchange, grid=grid), 2, in_graph)
    assert (row.ok, row.token_split, row.global_tokens, row.graph) == (True, split, 23, in_graph)
    assert row.tokens_per_rank == 23 if split == "one_rank" else row.tokens_per_rank > 23 / row.world
    even = row_of(pool, case("zipf:1", tokens=23, exchange=exchange, grid=grid, iters=0, check=False))
    assert row.rows_per_rank == even.rows_per_rank  # the same tokens go to the same experts


def test_a_shared_expert_s_dynamic_scale_is_that_of_a_ragged_share(pool: Pool) -> None:
    model = SPEC.with_changes(quant="fp8_tensor_dynamic", shared_experts="replicated", shared_intermediate=128)
    assert row_of(pool, case(split="ragged", model=model, exchange="all_to_all", grid={"ep": 3}, layers=2)).ok


# Steps that take several routings


def expected(comm: Comm, chosen: Case) -> list[Tensor]:
    steps = make_inputs(chosen, chosen.plan(MACHINE), comm, [])
    return [layers[0].mine()[1].ids_TK for layers in steps]


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("layers", [1, 2])
def test_timed_steps_take_the_routings_in_turn(pool: Pool, in_graph: bool, layers: int) -> None:
    """Over rounds too, whose iterations are no multiple of the routings."""
    chosen = case("rotating:zipf:1.5", "ragged", iters=19, layers=layers)
    wanted, found = pool.run(2, expected, chosen), pool.run(2, measured, chosen, 3, in_graph)
    for rank in range(2):
        assert len({str(ids.tolist()) for ids in wanted[rank]}) == len(wanted[rank]) == ROUTINGS
        result, seen = found[rank]
        assert len(seen) == sum(map(len, result.rounds_us)) == 19
        for number, ids in enumerate(seen):
            own = wanted[rank][number % ROUTINGS]
            assert torch.equal(ids[: len(own)], own)
            assert (ids[len(own) :] == -1).all()  # a graph's padding
    row = make_row(
        chosen, replace(chosen.plan(MACHINE), graph=in_graph), merge([result for result, _ in found]), "test"
    )
    assert (row.ok, len(row.routing_p50_us)) == (True, ROUTINGS)
    assert row.p50_us == sorted(time for round_us in merged(found) for time in round_us)[9]


def merged(found: Any) -> list[list[float]]:
    return merge([result for result, _ in found]).rounds_us


def stuck(comm: Comm, chosen: Case) -> Any:
    """The graph's buffers keep the routing of the last step but one, from the first timed one on."""
    fill, count = graph.StepGraph.fill, [0]

    def late(self: Any, x: Tensor, routing: Any = None) -> None:
        count[0] += 1
        if count[0] < 20:
            fill(self, x, routing)

    graph.StepGraph.fill = late  # type: ignore[method-assign]
    try:
        return measured(comm, chosen, 1, True)
    finally:
        graph.StepGraph.fill = fill  # type: ignore[method-assign]


def test_steps_that_go_by_another_routing_than_theirs_do_not_pass(pool: Pool) -> None:
    chosen = case("rotating:hot:1", iters=30)
    results = pool.run(2, stuck, chosen)
    row = make_row(chosen, replace(chosen.plan(MACHINE), graph=True), merge([result for result, _ in results]), "test")
    assert row.ok is False
    assert row.err_repeat > 0.1


def test_the_second_checked_routing_is_computed_too(pool: Pool) -> None:
    results = pool.run(2, wrong_in_the_middle, case("rotating:zipf:1.5"))
    chosen = case("rotating:zipf:1.5")
    assert make_row(chosen, chosen.plan(MACHINE), merge([result for result, _ in results]), "test").err_oracle > 0.05


def wrong_in_the_middle(comm: Comm, chosen: Case) -> Any:
    """A layer that is off by a tenth where it is given the routing of step 4."""
    middle, forward = expected(comm, chosen)[ROUTINGS // 2], MoELayer.forward

    def off(self: Any, x: Tensor, routing: Any = None, **step: Any) -> Tensor:
        y = forward(self, x, routing, **step)
        return 1.1 * y if torch.equal(routing.ids_TK, middle) else y

    MoELayer.forward = off  # type: ignore[method-assign]
    try:
        return measured(comm, chosen)
    finally:
        MoELayer.forward = forward  # type: ignore[method-assign]


# Recorded and measured again


def again(pool: Pool, path: Path, chosen: Case) -> tuple[Row, Row]:
    """A row that is recorded, and the row of what was recorded."""
    first = row_of(pool, chosen)
    (read,) = Experiment(
        models=(chosen.model,), worlds=(chosen.parallel.world,), placements=("ep",), exchanges=("ag_rs",), iters=8,
        tokens=(chosen.workload.tokens,), skews=(f"file:{path}",), layers=chosen.layers, seed=5,
    ).cases("cpu")  # fmt: skip
    wanted, found = (pool.run(2, ids_of, each) for each in (chosen, read))
    assert wanted == found
    return first, row_of(pool, read)


def ids_of(comm: Comm, chosen: Case) -> list[Any]:
    plan = chosen.plan(MACHINE)
    routers = [router for _, _, router in weights_of(RankContext(comm, "test"), chosen, plan, Turn())]
    steps = make_inputs(chosen, plan, comm, routers)
    return [[(each.routing.ids_TK.tolist(), each.routing.weights_TK.tolist()) for each in layers] for layers in steps]


@pytest.mark.parametrize(("skew", "layers"), [("uniform", 3), ("rotating:zipf:1", 2)])
def test_what_was_recorded_is_what_is_measured_again(pool: Pool, tmp_path: Path, skew: str, layers: int) -> None:
    path = tmp_path / "routing.pt"
    chosen = case(skew, layers=layers, iters=8, record_routing=str(path))
    first, second = again(pool, path, chosen)
    assert (first.ok, second.ok) == (True, True)
    assert second.skew.startswith("file:")
    assert (first.rows_per_rank, first.imbalance) == (second.rows_per_rank, second.imbalance)
    assert len(first.routing_p50_us) == len(second.routing_p50_us) == (ROUTINGS if "rotating" in skew else 0)
    assert first.trace_short is second.trace_short is None


def test_a_row_says_that_its_trace_was_too_short(pool: Pool, tmp_path: Path) -> None:
    ids = torch.arange(8).view(4, 2)
    torch.save({"ids": ids, "weights": torch.ones(4, 2)}, tmp_path / "short.pt")
    row = row_of(pool, case(f"file:{tmp_path / 'short.pt'}", iters=0, check=False))
    assert row.trace_short == "4 recorded rows for the 24 of a step: from the first one again"


def test_a_checkpoint_s_router_is_recorded(pool: Pool, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden": 128, "intermediate": 128, "num_experts": 8, "top_k": 2, "shards": 1, "layers": 2}
    made = make_checkpoint(tmp_path / "model", **sizes)
    source = SourceSpec(checkpoint=str(made), layer=0)
    routed = {"model": layer_spec(made, 0), "source": source, "layers": 2, "record_routing": str(tmp_path / "r.pt")}
    first, second = again(pool, tmp_path / "r.pt", case("router", **routed))
    assert (first.ok, second.ok) == (True, True)
    assert first.rows_per_rank == second.rows_per_rank
