"""Traces: what is run for one, and that none is written over."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from unit.test_bench import CPU

from moe_dist.bench.case import Case
from moe_dist.bench.profile import Ranges, profile_steps, trace_file
from moe_dist.bench.profile_spec import ProfileSpec
from moe_dist.errors import OutputError
from moe_dist.model.spec import MoESpec, ParallelSpec, WorkloadSpec
from moe_dist.step.stages import STAGES

SPEC = MoESpec(name="small", hidden=128, intermediate=128, num_experts=4, top_k=2)
CONTEXT: Any = SimpleNamespace(rank=1, device=torch.device(CPU.device), progress=lambda text: None)


class FakeStep:
    """A step of two routings with every stage in it, eager or as a graph; it counts its runs."""

    def __init__(self, graph: bool) -> None:
        self.graph = object() if graph else None
        self.steps, self.routings, self.x, self.bucket = [["a"], ["b"]], ["a"], None, 8
        self.replays, self.taken, self.stages = 0, [], []

    def take(self, number: int) -> None:
        self.taken.append(number)

    def call(self) -> None:
        self.replays += 1

    def module(self, x: Any, routing: Any, max_tokens_per_rank: int, stages: Any) -> None:
        self.stages.append(stages)
        for name in STAGES:
            with stages(name):
                pass


def case(tmp_path: Path, steps: int = 2) -> Case:
    return Case(
        model=SPEC,
        parallel=ParallelSpec(),
        exchange="local",
        backend="torch",
        workload=WorkloadSpec(tokens=8),
        profile=ProfileSpec(folder=str(tmp_path / "traces"), name="single-step", steps=steps),
    )


def names(path: Path) -> list[str]:
    with gzip.open(path, "rt") as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]


def test_stages_of_eager_steps_are_ranges_once_a_step(tmp_path):
    step: Any = FakeStep(graph=False)
    profile_steps(CONTEXT, case(tmp_path), step)
    found = names(trace_file(case(tmp_path), 1))
    assert {name: found.count(name) for name in STAGES} == dict.fromkeys(STAGES, 2)
    assert (len(step.stages), step.taken) == (3, [0, 1, 0])  # the first one is not in the trace
    assert all(isinstance(each, Ranges) and each.take() == [] for each in step.stages)


def test_a_graph_is_replayed(tmp_path):
    step: Any = FakeStep(graph=True)
    profile_steps(CONTEXT, case(tmp_path, steps=4), step)
    assert (step.replays, step.stages) == (5, [])
    found = names(trace_file(case(tmp_path), 1))
    assert [name.startswith("ProfilerStep#") for name in found] == [True] * 4


def test_without_a_profile_nothing_runs(tmp_path):
    step: Any = FakeStep(graph=False)
    profile_steps(CONTEXT, case(tmp_path).with_changes(profile=None), step)
    assert (step.stages, step.taken, [*tmp_path.iterdir()]) == ([], [], [])


def test_a_trace_that_is_there_stays(tmp_path):
    path = trace_file(case(tmp_path), 1)
    path.parent.mkdir()
    path.write_text("an earlier one")
    with pytest.raises(OutputError, match=r"rank1\.trace\.json\.gz can't be written: File exists"):
        profile_steps(CONTEXT, case(tmp_path), FakeStep(graph=False))  # type: ignore[arg-type]
    assert path.read_text() == "an earlier one"
