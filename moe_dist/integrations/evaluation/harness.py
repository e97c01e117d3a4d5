"""Tasks of lm-evaluation-harness on a model with moe_dist's experts: its own HFLM, given the model that is there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from moe_dist.errors import ConfigError, InstallationError
from moe_dist.integrations.evaluation.scores import LOST
from moe_dist.runtime.context import RankContext

CHECKED = "0.4.13"


@dataclass(frozen=True)
class Metric:
    """One of a task. `higher`: whether more is better, None where the task does not say. `error`: None where the
    harness gives none. The difference from the baseline is one of two means, as the harness pairs no answers."""

    name: str
    value: float
    error: float | None
    higher: bool | None
    difference: float | None = None
    difference_error: float | None = None

    @property
    def lost(self) -> bool:
        if self.difference is None or self.difference_error is None or self.higher is None:
            return False
        worse = -self.difference if self.higher else self.difference
        return worse > 0 and worse > LOST * self.difference_error


def require() -> str:
    """Its version. Raises InstallationError where it is not installed."""
    try:
        return version("lm-eval")
    except PackageNotFoundError:
        rule = f"--harness needs the package lm-eval, the extra `eval`; this was checked against {CHECKED}"
        raise InstallationError(rule) from None


def run(
    context: RankContext, task: str, folder: str | None, limit: int | None, shots: int, batch_size: int
) -> tuple[Metric, ...]:
    """All numbers of one task, on the model that `prepare` has kept. `folder`: of further tasks' YAML files. Every rank
    asks the same in the same order, so it is collective. Raises ConfigError for a task that isn't there, or whose data
    would have to be fetched."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = context.memo["model"]
    context.progress(f"harness, {task}")
    tasks = TaskManager(include_path=folder)
    if task not in tasks.all_tasks:
        rule = f"lm-eval {version('lm-eval')} has no task of this name" + (f", {folder} neither" if folder else "")
        raise ConfigError("harness", task, rule, "a name of `lm-eval ls tasks`, or of a YAML file in --harness-tasks")
    asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    given: dict[str, Any] = {"limit": limit, "num_fewshot": shots or None, "batch_size": batch_size}
    try:
        found = simple_evaluate(
            model=asked, tasks=[task], task_manager=tasks, log_samples=False, bootstrap_iters=1000, **given
        )
    except (ConnectionError, FileNotFoundError, OSError) as error:
        rule = f"its data can't be read, and nothing is fetched: {' '.join(str(error).split())[:200]}"
        raise ConfigError("harness", task, rule, "a task whose data is on this machine") from None
    better = found.get("higher_is_better", {}).get(task, {})
    return metrics(found["results"][task], better)


def metrics(results: Mapping[str, Any], better: Mapping[str, bool | None]) -> tuple[Metric, ...]:
    """Of what the harness gives: "exact_match,none" beside "exact_match_stderr,none"."""
    found = []
    for key, value in results.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = results.get(f"{name}_stderr,{kind}")
        number = float(error) if isinstance(error, (int, float)) else None
        label = name if kind == "none" else f"{name} ({kind})"
        found.append(Metric(label, float(value), number, better.get(name)))
    return tuple(found)


def compared(found: tuple[Metric, ...], baseline: tuple[Metric, ...]) -> tuple[Metric, ...]:
    """With their differences from the baseline's."""
    others = {each.name: each for each in baseline}
    made = []
    for each in found:
        other = others[each.name]
        error = None
        if each.error is not None and other.error is not None:
            error = math.hypot(each.error, other.error)
        made.append(Metric(each.name, each.value, each.error, each.higher, each.value - other.value, error))
    return tuple(made)
