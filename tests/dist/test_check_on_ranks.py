"""The check on several ranks: right layers pass, and a collective that does wrong does not make its own expectation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dist.pool import Pool

from moe_dist.bench.case import Case
from moe_dist.bench.collectives import prove_collectives
from moe_dist.bench.findings import merge
from moe_dist.bench.gathered import joined, summed, told
from moe_dist.bench.measure import measure
from moe_dist.bench.results import make_row
from moe_dist.bench.row import Row
from moe_dist.comm import Comm
from moe_dist.errors import RankFailure
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec, ParallelSpec, WorkloadSpec
from moe_dist.runtime.context import RankContext

SPEC = MoESpec(name="small", hidden=256, intermediate=256, num_experts=8, top_k=2)
MACHINE = Machine("cpu", 1, "a test's CPU")


def case(
    model: MoESpec = SPEC, tokens: int = 40, exchange: str = "ag_rs", layout: str = "sharded", **grid: Any
) -> Case:
    workload = WorkloadSpec(tokens=tokens, seed=3, token_layout=layout)
    return Case(
        model=model, parallel=ParallelSpec(**grid), exchange=exchange, backend="torch", workload=workload, iters=0
    )


def row_of(pool: Pool, chosen: Case, function: Any = None, *arguments: Any) -> Row:
    results = pool.run(chosen.parallel.world, function or measured, chosen, *arguments)
    return make_row(chosen, chosen.plan(MACHINE), merge(results), "torchrun")


def measured(comm: Comm, chosen: Case) -> Any:
    return measure(RankContext(comm, "torchrun"), chosen, chosen.plan(MACHINE))


SHARED = [
    SPEC.with_changes(quant=quant, shared_experts=shared, shared_intermediate=256)
    for quant in ("fp8_tensor_dynamic", "fp8_block")
    for shared in ("replicated", "tp")
]


@pytest.mark.parametrize(
    ("model", "exchange"),
    [
        (model, exchange)
        for model in SHARED
        for exchange in ("ag_rs", "all_reduce", "all_to_all")
        if (model.shared_experts, exchange) != ("tp", "all_to_all")  # which the plan refuses
    ],
    ids=lambda given: given if isinstance(given, str) else f"{given.quant} {given.shared_experts}",
)
@pytest.mark.parametrize("layout", ["sharded", "replicated"])
def test_a_shared_expert_s_dynamic_scale_is_each_rank_s_own(
    pool: Pool, model: MoESpec, exchange: str, layout: str
) -> None:
    row = row_of(pool, case(model, 16, exchange, layout, ep=2))
    assert row.err_oracle < 1e-2
    assert row.ok is True


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("layout", ["sharded", "replicated"])
@pytest.mark.parametrize("model", [SPEC, SHARED[0]], ids=["routed", "shared"])
def test_few_tokens_and_none_pass(pool: Pool, model: MoESpec, layout: str, tokens: int) -> None:
    assert row_of(pool, case(model, tokens, "ag_rs", layout, ep=2)).ok is True


def test_copies_of_experts_pass_in_another_order(pool: Pool) -> None:
    for quant in ("fp8_tensor_dynamic", "fp8_block"):
        chosen = case(SPEC.with_changes(quant=quant), 40, "all_reduce", ep=2, replicas={0: [1], 7: [0]})
        assert row_of(pool, chosen).ok is True


# Collectives that do wrong, on every rank


def broken(comm: Comm, kind: str) -> None:
    """Breaks this one object."""
    op, _, how = kind.partition(" ")
    right = getattr(comm, op)

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = right(*arguments, **options)
        for rows in found if isinstance(found, list) else [found]:
            if how == "twice":
                rows.mul_(2)
            elif how == "row 9" and len(rows) > 20:
                rows[9] = 0
            elif how == "swapped" and len(rows) > 20:
                rows[[4, 11]] = rows[[11, 4]]
        return found

    setattr(comm, op, wrong)


def measured_broken(comm: Comm, chosen: Case, kind: str, proven: bool) -> Any:
    broken(comm, kind)
    context = RankContext(comm, "torchrun")
    if not proven:
        context.memo["proven"] = True
    return measure(context, chosen, chosen.plan(MACHINE))


@pytest.mark.parametrize("kind", ["all_reduce twice", "all_reduce row 9"])
@pytest.mark.parametrize("layout", ["sharded", "replicated"])
def test_an_all_reduce_that_is_wrong_does_not_make_the_expectation(pool: Pool, kind: str, layout: str) -> None:
    row = row_of(pool, case(SPEC, 64, "all_reduce", layout, ep=2), measured_broken, kind, False)
    assert row.err_token > 0.9
    assert row.ok is False


def proof(comm: Comm, kind: str) -> tuple[str, int, str] | None:
    if kind:
        broken(comm, kind)
    try:
        prove_collectives(RankContext(comm, "torchrun"))
    except RankFailure as error:
        return error.op, error.rank, error.cause
    return None


@pytest.mark.parametrize("world", [2, 3, 4])
def test_right_collectives_are_proven_once(pool: Pool, world: int) -> None:
    assert pool.run(world, proof, "") == [None] * world


OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("how", ["twice", "row 9", "swapped"])
def test_a_wrong_collective_is_named_with_rank_and_row(pool: Pool, op: str, how: str) -> None:
    first = {"twice": 0, "row 9": 9, "swapped": 4}[how]
    for rank, said in enumerate(pool.run(3, proof, f"{op} {how}")):
        assert said is not None
        assert said[:2] == (op, rank)
        assert f"row {first} of " in said[2]


def sums(comm: Comm) -> tuple[Any, Any]:
    part = torch.full((5, 2), float(comm.rank + 1))
    return summed(comm, part).tolist(), told(comm, comm.rank, 0.5).tolist()


def test_sums_over_ranks(pool: Pool) -> None:
    assert pool.run(3, sums) == [([[6.0, 6.0]] * 5, [[0.0, 0.5], [1.0, 0.5], [2.0, 0.5]])] * 3


def rows_of_all(comm: Comm, bounds: list[tuple[int, int]]) -> list[list[int]]:
    start, stop = bounds[comm.rank]
    return joined(comm, torch.arange(2 * start, 2 * stop).view(-1, 2), bounds).tolist()


@pytest.mark.parametrize("bounds", [[(0, 3), (3, 5), (5, 6)], [(0, 1), (1, 1), (1, 1)], [(0, 2), (2, 4), (4, 6)]])
def test_rows_of_all_ranks(pool: Pool, bounds: list[tuple[int, int]]) -> None:
    everyone = [[2 * row, 2 * row + 1] for row in range(bounds[-1][1])]
    assert pool.run(3, rows_of_all, bounds) == [everyone] * 3
