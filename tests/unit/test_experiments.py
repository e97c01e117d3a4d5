"""The experiments that are shipped: each can be planned for the machine that its name says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from moe_dist.bench.case import Experiment
from moe_dist.bench.runner import plan_cases
from moe_dist.bench.source_spec import SourceSpec
from moe_dist.commands.config import EXPERIMENTS_OWN, read_experiment, resolve_models
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec, Section
from moe_dist.runtime.context import RaySpec

PAGE = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text()
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


def default_of(section: type[Section], key: str) -> str:
    """As the page has it: nothing for what is required, None, and a section."""
    field = section.model_fields.get(key)
    if field is None or field.is_required() or field.default is None or isinstance(field.default, Section):
        return ""
    if isinstance(field.default, tuple):
        return f"`[{', '.join(map(str, field.default))}]`"
    return f"`{field.default if isinstance(field.default, str) else json.dumps(field.default)}`"


def test_the_page_has_every_key_with_its_default() -> None:
    tables = re.findall(r"\| key \| default \| what \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", PAGE)
    keys = [*Experiment.model_fields, "model"]
    assert set(keys) >= EXPERIMENTS_OWN
    sections = ((Experiment, keys), (SourceSpec, None), (RaySpec, None), (MoESpec, None))
    for table, (section, names) in zip(tables, sections, strict=True):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        wanted = [(f"`{key}`", default_of(section, key)) for key in names or section.model_fields]
        assert [(key, default) for key, default, _ in lines] == wanted
        assert all(what for _, _, what in lines)


def test_the_page_s_example_is_an_experiment() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    config = yaml.safe_load(example)
    config["models"] = [name for name in config["models"] if not name.endswith(".yaml")]
    experiment = Experiment(**resolve_models(config))
    assert len(list(experiment.cases("cuda"))) == 3 * 2 * 2 * 2 * 2 * 2
