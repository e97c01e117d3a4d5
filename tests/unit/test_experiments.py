"""The experiments that are shipped: each can be planned for the machine that its name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_dist.bench.case import Experiment
from moe_dist.bench.runner import plan_cases
from moe_dist.commands.config import read_experiment, resolve_models
from moe_dist.machine.machine import Machine

FOLDER = Path(__file__).parents[2] / "configs" / "experiments"
EP_ALONE = "exchange fused under TP"  # the one exchange that does not serve every placement
NAMED = sorted(path for path in FOLDER.glob("*.yaml") if path.stem.startswith("h"))


@pytest.mark.parametrize("path", NAMED, ids=lambda path: path.stem)
def test_all_of_it_can_run_there(path: Path) -> None:
    machine = Machine.named(path.stem.partition("-")[0])
    experiment = Experiment(**resolve_models(read_experiment(str(path))))
    assert experiment.name == path.stem
    assert max(experiment.worlds) == machine.devices
    planned, refused = plan_cases(experiment.cases(machine.device), machine)
    assert planned
    assert all(EP_ALONE in each.reason for each in refused), refused


def test_eight_gpus_are_covered() -> None:
    """Every grid of two factors, decode to prefill, even and skewed."""
    experiment = Experiment(**resolve_models(read_experiment(str(FOLDER / "h200x8.yaml"))))
    planned, _ = plan_cases(experiment.cases("cuda"), Machine.named("h200x8"))
    assert {plan.parallel.label for _, plan in planned} == {"TP8", "EP8", "TP2xEP4", "TP4xEP2"}
    assert {case.workload.tokens // 8 for case, _ in planned} == {8, 128, 2048, 8192}
