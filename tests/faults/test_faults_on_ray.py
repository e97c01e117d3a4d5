"""Faults in ranks that are Ray actors; after each one the group recovers and must give the same bits again."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import ray
from faults.inject import Injector
from faults.kinds import COLLECTIVE_S, KINDS, Fault, drawn
from faults.outcome import Outcome, figures, keep, marked, shared_memory, wait_gone
from faults.work import healthy, load, work
from private_ray import private_ray
from ray.util import placement_group_table

from moe_dist.errors import MoeDistError, RankFailure
from moe_dist.runtime import ray_group
from moe_dist.runtime.actor import RankActor
from moe_dist.runtime.context import RaySpec
from moe_dist.runtime.ray_group import RayGroup

pytestmark = pytest.mark.faults
for name in ("faults.inject", "faults.kinds", "faults.work", __name__):
    ray.cloudpickle.register_pickle_by_value(sys.modules[name])  # actors can't import test modules

SEED = int(os.environ.get("MOE_DIST_FAULTS_SEED", "1"))
COUNT = int(os.environ.get("MOE_DIST_FAULTS_COUNT", "110"))
CALL_S = 60.0
SPEC = RaySpec(collective_timeout_s=COLLECTIVE_S, start_timeout_s=120.0)


def silent(_: str) -> None:
    pass


class Doomed(RankActor):
    """One that may fail before there is a group."""

    fault: Fault

    def join(self, *arguments: Any) -> None:
        Injector(self.fault, self.rank).at("before")
        super().join(*arguments)


def doomed(fault: Fault) -> type[RankActor]:
    return type("Doomed", (Doomed,), {"fault": fault})


class Bench:
    """A group of one world size that is used again and again."""

    def __init__(self, world: int) -> None:
        self.memory = shared_memory()
        self.group = RayGroup(world, "cpu", SPEC)
        self.group.prepare(load, healthy(world=world), timeout_s=CALL_S, shown=silent)
        self.reference = self.group.run(work, healthy(world=world), timeout_s=CALL_S, shown=silent)

    def tried(self, fault: Fault) -> Outcome:
        outcome = Outcome(fault, "ray")
        pids = [place["pid"] for place in self.group.places]
        try:
            outcome.results = self._with(fault)
        except MoeDistError as error:
            ended = time.monotonic()
            _told(outcome, error)
            if fault.moment == "before":
                pids = [pid for _, pid in [marked(fault) or (0.0, 0)] if pid]
            outcome.gone_s, left = wait_gone(pids)
            outcome.left += left
        else:
            ended = time.monotonic()
        if (struck := marked(fault)) is not None:
            outcome.named_s = ended - struck[0]
        elif fault.kind != "none":
            outcome.left.append("the fault never happened")
        if KINDS[fault.kind].error:
            self._again(outcome)
        return outcome

    def _with(self, fault: Fault) -> list[str]:
        if fault.moment == "before":
            ray_group.RankActor = doomed(fault)  # type: ignore[misc]
            try:
                self.group.recover()
            finally:
                ray_group.RankActor = RankActor  # type: ignore[misc]
        if fault.moment == "loading":
            self.group.run(load, fault, timeout_s=CALL_S, shown=silent)
        return self.group.run(work, fault, timeout_s=CALL_S, shown=silent)

    def _again(self, outcome: Outcome) -> None:
        """Nothing is left, and the group's successor gives the same bits."""
        live = [entry for entry in placement_group_table().values() if entry["state"] != "REMOVED"]
        outcome.left += [f"{len(live)} placement groups"] if live else []
        outcome.left += [f"/dev/shm/{name}" for name in shared_memory() - self.memory]
        begin = time.monotonic()
        self.group.recover()
        outcome.again_s = time.monotonic() - begin
        again = self.group.run(work, healthy(world=self.group.world), timeout_s=CALL_S, shown=silent)
        if again != self.reference:
            outcome.left.append("other bits after recovery")


def _told(outcome: Outcome, error: MoeDistError) -> None:
    outcome.error, outcome.cause = type(error).__name__, str(error)
    outcome.rank = error.raised_on
    if isinstance(error, RankFailure):
        outcome.rank, outcome.op, outcome.seq, outcome.cause = error.rank, error.op, error.seq, error.cause


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    with private_ray():
        yield


@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("own_ray")
def test_every_fault_is_named_and_survived(tmp_path: Path) -> None:
    rows, wrong = [], []
    for world, share in groupby(drawn(SEED, COUNT), key=lambda fault: fault.world):
        bench = Bench(world)
        for drawn_fault in share:
            fault = replace(drawn_fault, marks=str(tmp_path / str(drawn_fault.number)))
            outcome = bench.tried(fault)
            found = outcome.wrong(bench.reference)
            wrong += [f"{fault}: {each}: {outcome}" for each in found]
            rows.append(outcome.row() | {"wrong": found})
            print(fault, outcome.error, outcome.named_s, outcome.gone_s, outcome.again_s, found, flush=True)
            keep("ray", {"seed": SEED, "figures": figures(rows), "rows": rows})
        bench.group.close()
    assert len(rows) == COUNT
    assert not wrong, "\n".join(wrong)
