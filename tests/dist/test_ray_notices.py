"""What ranks have to say reaches the user: Ray shows nothing of what they write."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import ray

from moe_dist.commands import cli, measuring
from moe_dist.backends import BACKENDS
from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.bench.measure import measure, ready
from moe_dist.messages.building import say
from moe_dist.messages.notices import notice
from moe_dist.runtime.context import RaySpec
from moe_dist.runtime.ray_group import RayGroup

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors can't import test modules
pytestmark = pytest.mark.usefixtures("local_ray")


class Speaking(TorchBackend):
    """Every rank builds something, and one finds no table for its 3 of 7 experts."""

    def prepare(self, weights):
        super().prepare(weights)
        say("building something")
        say("half of it is built", progress=True)
        if weights.num_experts == 3:
            notice("no table for 3 experts")

    def config_sources(self):
        return ("default",)


class SpeakingGroup:
    """A group of ranks that know this backend: they are other processes."""

    def __init__(self, world: int, shown: object) -> None:
        self._ranks = RayGroup(world, "cpu", RaySpec())
        self.world, self.runtime, self.nodes = world, "ray", self._ranks.nodes

    def describe(self):
        return self._ranks.describe()

    def run(self, function, *arguments, **options):
        assert function in (ready, measure)
        return self._ranks.run(on_rank if function is measure else ready, *arguments, **options)

    def close(self) -> None:
        self._ranks.close()


def on_rank(context, *arguments):
    from moe_dist import backends  # the rank's own, not a copy that came along

    if "speaking" not in backends.BACKENDS.names():
        backends.BACKENDS.register("speaking", Speaking)
    return measure(context, *arguments)


@pytest.fixture
def speaking(monkeypatch):
    BACKENDS.register("speaking", Speaking)
    monkeypatch.setattr(measuring, "group_starter", lambda *_: SpeakingGroup)
    yield
    BACKENDS.unregister("speaking")


def test_through_the_command(speaking, capsys, tmp_path: Path):
    path = tmp_path / "results.json"
    arguments = ["--ep", "2", "--tokens", "8", "--iters", "3", "--backend", "speaking", "--device", "cpu"]
    arguments += ["model.num_experts=7"]
    assert cli.main(["run", *arguments, "--out", str(path)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moe-dist: ")]
    document = json.loads(path.read_text())
    assert document["notices"] == [
        {"text": "building something", "ranks": [0, 1]}, {"text": "no table for 3 experts", "ranks": [1]},
    ]  # fmt: skip
    assert lines == ["moe-dist: rank 0, 1: building something", "moe-dist: rank 1: no table for 3 experts"]
    assert document["rows"][0]["config"] == "default"
    assert document["rows"][0]["ok"] is True
