"""Workloads in real CUDA graphs: routings that steps take in turn, and ranks with different numbers of tokens."""

from __future__ import annotations

from statistics import median

import pytest
import torch
from gpu.ranks import run_on_ranks

from moe_dist.bench.case import Case
from moe_dist.bench.measure import measure
from moe_dist.bench.rounds import Turn
from moe_dist.commands.config import find_model
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import ParallelSpec, WorkloadSpec
from moe_dist.workloads.skew_names import ROUTINGS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(500)]
ROUNDS = 3
MODEL = find_model("Qwen3-30B-A3B")


def in_rounds(context, cases: list[Case]):
    """What is known of each case after its last round."""
    found = []
    for case in cases:
        for number in range(ROUNDS + 1):
            result = measure(context, case, case.plan(Machine.detect("cuda")), Turn(number, ROUNDS, 0))
        found.append(result)
    return found


def test_replays_take_the_routings_in_turn():
    """An expert that takes half of the pairs in each step, another one in the next; and no step is slower for it."""
    skews = ["hot:1", "rotating:hot:1"]
    cases = [
        Case(
            model=MODEL, parallel=ParallelSpec(), exchange="local", backend="triton", graph=True, iters=29,
            workload=WorkloadSpec(tokens=512, skew=skew),
        )
        for skew in skews
    ]  # fmt: skip
    (results,) = run_on_ranks(1, in_rounds, cases)
    for result in results:
        assert result.err_oracle <= 3e-2
        assert result.err_repeat <= 1e-3  # of the last step of each round, by its own routing
        assert result.err_again <= 0.2
    fixed, rotating = (median(time for times in result.rounds_us for time in times) for result in results)
    assert rotating < 1.5 * fixed  # copies of ids and weights are not timed
    assert len(results[1].by_layer) == ROUTINGS


@pytest.mark.parametrize("exchange", ["ag_rs", "all_to_all", "nvlink"])
def test_ragged_ranks(exchange):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, {torch.cuda.device_count()} are here")
    cases = [
        Case(
            model=MODEL, parallel=ParallelSpec(ep=2), exchange=exchange, backend="triton", graph=graph, iters=9,
            workload=WorkloadSpec(tokens=64, token_split=split, skew="zipf:1"),
        )
        for split in ("ragged", "one_rank") for graph in (False, True)
    ]  # fmt: skip
    for results in run_on_ranks(2, in_rounds, cases):
        for case, result in zip(cases, results, strict=True):
            assert max(result.err_oracle, result.err_repeat) <= 3e-2, case.label
