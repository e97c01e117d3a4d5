"""Exchange hierarchical over simulated nodes: ranks of one machine that are told which node they are on. The other
contract tests have it too, with all ranks on one node."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dist.pool import Pool
from layer_cases import HERE, Case, Inputs, planned
from test_layer_against_oracle import FORMATS, LAYOUTS, SEED, check, spec_of

from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.machine.machine import Machine
from moe_dist.machine.nodes import Nodes
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import shard
from moe_dist.oracle.reference import relative_error
from moe_dist.workloads.random_weights import random_weights

COPIES = {0: (1, 3), 5: (0,), 9: (0, 1, 2)}
GRIDS = [
    (ParallelSpec(ep=2), (1, 1)),
    (ParallelSpec(ep=4), (2, 2)),
    (ParallelSpec(ep=4), (1, 1, 1, 1)),
    (ParallelSpec(ep=4, replicas=COPIES), (2, 2)),
    (ParallelSpec(tp=2, ep=2, replicas={1: (1,), 8: (0,)}), (2, 2)),
    pytest.param(ParallelSpec(ep=8), (4, 4), marks=pytest.mark.slow),
    pytest.param(ParallelSpec(tp=2, ep=4), (4, 4), marks=pytest.mark.slow),
    pytest.param(ParallelSpec(tp=2, ep=4, replicas=COPIES), (2, 2, 2, 2), marks=pytest.mark.slow),
]
# Tokens of each rank and who gets them, given a number of ranks.
LOADS: dict[str, Any] = {
    "uneven, one rank without": lambda world: ([(5 * rank + 3) % 7 for rank in range(world - 1)] + [0], "uniform"),
    "one token": lambda world: ([0] * (world - 1) + [1], "uniform"),
    "none": lambda world: ([0] * world, "uniform"),
    "all to one expert": lambda world: ([3] * world, "hot:1"),
    "all from one rank": lambda world: ([0, 11] + [0] * (world - 2), "uniform"),
}


@pytest.mark.parametrize(("parallel", "nodes"), GRIDS, ids=lambda it: getattr(it, "label", str(it)))
def test_against_the_oracle(pool: Pool, parallel: ParallelSpec, nodes: tuple[int, ...]) -> None:
    cases = []
    for load, made in LOADS.items():
        counts, skew = made(parallel.world)
        for quant, dtype in FORMATS if load.startswith("uneven") else FORMATS[2:3]:
            for layout in LAYOUTS:
                spec = spec_of(quant, dtype, top_k=1 if skew == "hot:1" else 3)
                plan = planned(spec, parallel, "hierarchical", "torch", layout, "auto", None)
                name = f"{load} {quant} {dtype} {layout} on {nodes}"
                cases.append(Case(name, plan, Inputs(tuple(counts), SEED, skew), nodes=nodes))
    assert "torch" in HERE
    check(pool, cases)


SMALL = MoESpec(hidden=128, intermediate=128, num_experts=4, top_k=2, quant="none", dtype="fp32")


def across(comm: Comm, nodes: tuple[int, ...], ids_TK: torch.Tensor) -> tuple[torch.Tensor, list[int], int]:
    """The result of a step, how many rows this rank has sent to each other one, there and back, and all bytes."""
    comm.nodes = nodes
    plan = make_plan(SMALL, ParallelSpec(ep=4), exchange="hierarchical", backend="torch", machine=Machine.detect("cpu"))
    layer = MoELayer(plan, shard(random_weights(SMALL, 1), plan.placement, comm.rank), comm)
    sent, plain = [0] * comm.world, comm.all_to_all

    def counted(parts: Any, send: Any, receive: Any, **named: Any) -> Any:
        if any(part.shape[1:] == (SMALL.hidden,) for part in parts):
            sent[:] = [before + rows for before, rows in zip(sent, send, strict=True)]
        return plain(parts, send, receive, **named)

    comm.all_to_all = counted  # type: ignore[method-assign]
    before = comm.bytes_sent
    try:
        x = torch.randn(len(ids_TK), SMALL.hidden, generator=torch.Generator().manual_seed(comm.rank))
        y = layer(x, Routing(ids_TK, torch.full(ids_TK.shape, 0.5)))
    finally:
        del comm.all_to_all  # type: ignore[method-assign]
        comm.nodes = ()
    return y, sent, comm.bytes_sent - before


def test_a_row_crosses_the_network_once_for_each_node(pool: Pool) -> None:
    """By hand: two nodes of two ranks, expert e on rank e, two tokens a rank. Each token of node 0 goes to experts 2
    and 3, which are both on node 1; each of node 1 to expert 2 and to one on node 0."""
    ids = {0: [[2, 3], [2, 3]], 1: [[2, 3], [3, 2]], 2: [[2, 0], [2, 1]], 3: [[2, 0], [1, 2]]}
    given = [torch.tensor(ids[rank], dtype=torch.int32) for rank in range(4)]
    two = [pool.run(4, across_of_rank, nodes, given) for nodes in ((2, 2), (1, 1, 1, 1))]
    rows = [[sent for _, sent, _ in of_rank] for of_rank in two]
    # There: rank 0's two tokens to rank 2, once each, which hands them to rank 3; the sums go the same ways back.
    # To rank 2 from rank 0: its rows there (2) and the sums of rank 2's rows, one for each that needed node 0 (2).
    assert rows[0][0][2] == rows[0][2][0] == 2 + 2
    assert rows[0][0][3] == rows[0][3][0] == 0  # a rank of another place: never directly
    assert rows[0][1][3] == rows[0][3][1] == 2 + 2
    # Without nodes rank 0 sends each token to both ranks, and each sends sums back.
    assert rows[1][0][2] == 2 + 1
    assert rows[1][0][3] == 2 + 1
    crossing = [sum(sent[rank][other] for rank in (0, 1) for other in (2, 3)) for sent in rows]
    assert crossing == [8, 12]
    for (one, _, _), (other, _, _) in zip(*two, strict=True):
        assert relative_error(one, other) < 1e-6


def across_of_rank(comm: Comm, nodes: tuple[int, ...], given: list[torch.Tensor]) -> Any:
    return across(comm, nodes, given[comm.rank])


def test_the_plan_bounds_what_a_rank_sends(pool: Pool) -> None:
    """Every token to all experts: the worst case, however ranks are grouped."""
    everyone = torch.arange(4, dtype=torch.int32).repeat(6, 1)
    spec = SMALL.with_changes(top_k=4)
    plan = make_plan(spec, ParallelSpec(ep=4), exchange="hierarchical", backend="torch", machine=Machine.detect("cpu"))
    for nodes in ((2, 2), (4,), (1, 1, 1, 1)):
        found = pool.run(4, bytes_of_rank, spec, nodes, everyone)
        assert max(found) <= plan.wire_bytes(24)
        assert max(found) >= 0.95 * plan.wire_bytes(24)


def bytes_of_rank(comm: Comm, spec: MoESpec, nodes: tuple[int, ...], ids_TK: torch.Tensor) -> int:
    comm.nodes = nodes
    plan = make_plan(spec, ParallelSpec(ep=4), exchange="hierarchical", backend="torch", machine=Machine.detect("cpu"))
    layer = MoELayer(plan, shard(random_weights(spec, 1), plan.placement, comm.rank), comm)
    before = comm.bytes_sent
    try:
        layer(torch.ones(len(ids_TK), spec.hidden), Routing(ids_TK, torch.full(ids_TK.shape, 0.25)))
    finally:
        comm.nodes = ()
    return comm.bytes_sent - before


def test_nodes_of_different_sizes_are_refused(pool: Pool) -> None:
    machine = Machine("cpu", 1, "a test's CPU", nodes=Nodes((3, 1)))
    with pytest.raises(UnsupportedError, match=r"needs as many ranks on each node, and the nodes have 3 \+ 1 ranks"):
        make_plan(SMALL, ParallelSpec(ep=4), exchange="hierarchical", backend="torch", machine=machine)
    for rank in pool.run(4, wrong_nodes):
        assert rank == [("comm.nodes", (3, 1)), ("comm.nodes", (2, 2, 2))]


def wrong_nodes(comm: Comm) -> list[tuple[str, Any]]:
    found = []
    for nodes in ((3, 1), (2, 2, 2)):
        try:
            across(comm, nodes, torch.zeros(1, 2, dtype=torch.int32))
        except ConfigError as error:
            found.append((error.field, error.value))
    return found
