"""`doctor --pairs` between real processes: torchrun's ranks, and members on a Ray cluster."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from moe_dist.commands.cli import main
from moe_dist.runtime.context import RaySpec
from moe_dist.runtime.pair_members import pairs_of_nodes
from moe_dist.runtime.pairs import advise

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_torchruns_ranks():
    command = [ROOT / "launch" / "torchrun.sh", "--nproc-per-node", "3", "-m", "moe_dist", "doctor", "--pairs"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command += ["--runtime", "torchrun", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["pairs"]  # one document: one rank speaks
    assert len(found["members"]) == 3
    ends = {(way["source"], way["target"]) for way in found["ways"] if way["problem"] == ""}
    assert ends == {(i, j) for i in range(3) for j in range(3) if i != j}
    assert found["advice"][0]["variables"]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_cluster_of_one_node():
    places, ways = pairs_of_nodes(RaySpec(), 60.0)
    assert len(places) == 2
    assert {(way.source, way.target) for way in ways if way.ok} == {(0, 1), (1, 0)}
    assert advise(places, ways)[0].variables


def test_a_runtime_without_pairs_is_refused(capsys):
    assert main(["doctor", "--runtime", "ray"]) == 2
    assert "--pairs beside it" in capsys.readouterr().err
