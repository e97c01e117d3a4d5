"""Faults in ranks on GPUs, under Ray: NCCL and nvlink, eager steps and replays of a graph. Each is named as on a CPU,
leaves nothing behind on the machine nor on its GPUs, and the group recovers with the same bits.

MOE_DIST_GPU_FAULTS_S: how long after its start a test still begins another fault, once there was one of each kind. What
it did not come to is in its record, under `not_run`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from faults.device_cases import KINDS, MODULES, cases, tried
from faults.device_work import ON_GPUS
from faults.outcome import GONE_S, figures
from private_ray import private_ray

from moe_dist.machine.gpus import topology

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(590)]
for name in MODULES:
    ray.cloudpickle.register_pickle_by_value(sys.modules[name])  # actors can't import test modules

BUDGET_S = {2: 270.0, 4: 120.0}
FREE_MIB = 64  # that a driver may hold more after a process than before it


@pytest.fixture
def own_ray(world: int) -> Iterator[None]:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, {torch.cuda.device_count()} are here")
    with private_ray(num_cpus=4, num_gpus=torch.cuda.device_count()):
        yield


def used() -> list[int]:
    """MiB of each GPU, by NVML."""
    found = topology()
    assert found is not None
    return [(each.total - each.free) >> 20 for each in found.gpus if each.total is not None and each.free is not None]


class Memory:
    """What the GPUs hold where there are no ranks."""

    def __init__(self) -> None:
        self.before = used()

    def left(self) -> list[str]:
        """What is held beyond it, once the driver has had time to give it back. Others' memory that has gone meanwhile,
        such as that of an earlier test's ranks, must not hide what ours leave."""
        deadline = time.monotonic() + GONE_S
        while True:
            now = used()
            self.before = list(map(min, self.before, now))
            more = [here - before for here, before in zip(now, self.before, strict=True)]
            if max(more) <= FREE_MIB or time.monotonic() > deadline:
                return [f"{mib} MiB of GPU {index}" for index, mib in enumerate(more) if mib > FREE_MIB]
            time.sleep(0.1)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.usefixtures("own_ray")
def test_faults_are_named_and_survived(world: int, tmp_path: Path) -> None:
    budget_s = float(os.environ.get("MOE_DIST_GPU_FAULTS_S", BUDGET_S[world]))
    name = torch.cuda.get_device_name()  # whose answer takes some of GPU 0's memory, from here on
    planned, memory = cases(world, "cuda", ON_GPUS), Memory()

    def keep(rows: list[dict[str, Any]]) -> None:
        if out := os.environ.get("GPU_TEST_ROWS"):
            document = {
                "what": "faults on GPUs", "gpu": name, "world": world,
                "torch": torch.__version__, "ray": ray.__version__, "nccl": list(torch.cuda.nccl.version()),
                "budget_s": budget_s, "figures": figures(rows),
                "not_run": [f"{fault} in {', '.join(of)}" for fault, of in planned[len(rows) :]], "rows": rows,
            }  # fmt: skip
            Path(out).mkdir(parents=True, exist_ok=True)
            (Path(out) / f"faults_{world}.json").write_text(json.dumps(document, indent=1))

    rows, wrong = tried(planned, ON_GPUS, tmp_path, budget_s, memory.left, keep)
    assert not wrong, "\n".join(wrong)
    assert {row["kind"] for row in rows} == set(KINDS)
