"""What the clock says of a captured step: its stages are its own, its memory is its weights and little more."""

from __future__ import annotations

from statistics import median

import pytest
from gpu.ranks import backends_here, run_on_ranks

from moe_dist.bench.case import Case
from moe_dist.bench.measure import measure
from moe_dist.commands.config import find_model
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import ParallelSpec, WorkloadSpec

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.mark.parametrize("tokens", [16, 4096])
def test_a_graphs_stages_are_measured_in_the_graph(tokens):
    """Run eagerly, the stages of a few tokens take their launch times: more than the whole graph."""
    model = find_model("Qwen3-30B-A3B")
    for backend in sorted({*backends_here()} - {"torch"}):  # which can't be captured
        case = Case(
            model=model, parallel=ParallelSpec(), exchange="local", backend=backend, graph=True, iters=20, check=False,
            workload=WorkloadSpec(tokens=tokens, token_layout="replicated"),
        )  # fmt: skip
        (result,) = run_on_ranks(1, measure, case, case.plan(Machine.detect("cuda")))
        p50, staged = median(result.rounds_us[0]), sum(result.stages_us.values())
        assert 0.6 * p50 < staged < 1.25 * p50, f"{backend}: {result.stages_us} of {p50}"
        assert (len(result.chained_us), result.chained_steps) == (1, 32)
        assert result.clock_us < result.chained_us[0] < 1.1 * p50, f"{backend}: {result.chained_us}, {result.clock_us}"
        weights = case.plan(Machine.detect("cuda")).weight_bytes(0)
        scratch = 0.5 * weights + tokens * (1 << 20)  # `deep_gemm` has a tile of 128 rows for each of 128 experts
        assert weights < result.max_memory < weights + scratch, f"{backend}: {result.max_memory}"
