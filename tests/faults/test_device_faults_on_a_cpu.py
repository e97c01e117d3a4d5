"""The faults that tests/gpu puts into ranks on GPUs, on a CPU: that all of it works before a GPU is asked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import ray
from faults.device_cases import KINDS, MODULES, cases, tried
from faults.device_work import MODES, ON_A_CPU, ON_GPUS
from private_ray import private_ray

pytestmark = pytest.mark.faults
for name in MODULES:
    ray.cloudpickle.register_pickle_by_value(sys.modules[name])  # actors can't import test modules


@pytest.fixture
def own_ray() -> Iterator[None]:
    with private_ray():
        yield


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("own_ray")
def test_one_of_each_kind(tmp_path: Path) -> None:
    """However little time is given, and no more."""
    planned = cases(2, "cpu", ON_A_CPU)
    rows, wrong = tried(planned, ON_A_CPU, tmp_path, budget_s=0.0)
    assert not wrong, "\n".join(wrong)
    assert [row["kind"] for row in rows] == list(KINDS)


@pytest.mark.parametrize("world", [2, 4])
def test_all_pairs_are_planned(world: int) -> None:
    planned = cases(world, "cuda", ON_GPUS)
    assert {(fault.kind, *of) for fault, of in planned} == set(product(KINDS, ON_GPUS.exchanges, MODES))
    soon = planned[: 2 * len(KINDS)]
    assert {(fault.kind, exchange) for fault, (exchange, _) in soon} == set(product(KINDS, ON_GPUS.exchanges))
    assert {(fault.kind, mode) for fault, (_, mode) in soon} == set(product(KINDS, MODES))
    assert {fault.rank for fault, _ in planned} == set(range(world))
    assert all(fault.promise_s <= 6.5 for fault, _ in planned)
