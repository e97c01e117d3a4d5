"""Faults in ranks that are Ray actors; after each one the group recovers and must give the same bits again."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import ray
from faults.bench import Bench
from faults.kinds import drawn
from faults.outcome import figures, keep
from private_ray import private_ray

pytestmark = pytest.mark.faults
for name in ("faults.bench", "faults.inject", "faults.kinds", "faults.work"):
    ray.cloudpickle.register_pickle_by_value(sys.modules[name])  # actors can't import test modules

SEED = int(os.environ.get("MOE_DIST_FAULTS_SEED", "1"))
COUNT = int(os.environ.get("MOE_DIST_FAULTS_COUNT", "110"))


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
