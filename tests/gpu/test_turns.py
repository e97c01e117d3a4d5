"""Steps that are kept from turn to turn: graphs beside graphs, and beside a backend that turns the weights of all."""

from __future__ import annotations

import pytest
import torch
from gpu.ranks import backends_here, run_on_ranks

from moe_dist.bench.case import Case
from moe_dist.bench.measure import measure
from moe_dist.bench.rounds import Turn
from moe_dist.commands.config import find_model
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import ParallelSpec, WorkloadSpec

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(500)]
ROUNDS = 3


def in_turns(context, cases: list[Case]):
    """What is known of each case after its last turn."""
    found = {}
    for number in range(ROUNDS + 1):
        for index, case in enumerate(cases):
            found[index] = measure(context, case, case.plan(Machine.detect("cuda")), Turn(number, ROUNDS, 0))
    return [found[index] for index in range(len(cases))]


@pytest.mark.parametrize("world", [1, 2])
def test_every_turn_gives_what_the_first_one_gave(world):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, {torch.cuda.device_count()} are here")
    exchanges = ["local"] if world == 1 else ["ag_rs", "all_to_all"]
    placements = [ParallelSpec()] if world == 1 else [ParallelSpec(tp=2), ParallelSpec(ep=2)]
    cases = [
        Case(
            model=find_model("Qwen3-30B-A3B"), parallel=parallel, exchange=exchange, backend=backend, iters=9,
            graph=graph, workload=WorkloadSpec(tokens=64, token_layout="replicated" if world == 1 else "sharded"),
        )
        for parallel in placements for exchange in exchanges
        for backend in sorted(backends_here(), key=lambda name: name == "flashinfer_cutlass")  # it turns them last
        for graph in (False, True) if not graph or backend != "torch"
    ]  # fmt: skip
    for case in cases:
        case.plan(Machine.detect("cuda"))
    for rank, results in enumerate(run_on_ranks(world, in_turns, cases)):
        for case, result in zip(cases, results, strict=True):
            text = f"rank {rank} {case.label}: {result.err_oracle} {result.err_repeat}"
            assert [len(times) for times in result.rounds_us] == [3, 3, 3], text
            assert result.err_oracle <= 3e-2, text
            assert result.err_repeat <= 1e-2, text
            assert result.err_again <= 0.2, text  # tokens in another order, in the same graph
