"""What ranks have to say reaches the user: Ray shows nothing of what they write."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import ray

from moe_dist.backends import BACKENDS
from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.bench.measure import measure, ready
from moe_dist.commands import cli, measuring
from moe_dist.errors import ConfigError
from moe_dist.messages.building import say
from moe_dist.messages.notices import collecting, notice
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


def speak(context, fails: bool) -> int:
    notice("said by all")
    if context.rank == 1:
        warnings.warn("of another library", UserWarning, stacklevel=1)
        if fails:
            raise ConfigError("x", 1, "on purpose")
    return context.rank


SAID = ["rank 0, 1: said by all", "rank 1: UserWarning: of another library"]


def test_of_any_function_that_a_group_runs():
    with RayGroup(2, "cpu", RaySpec()) as group:
        with collecting() as said:
            assert group.run(speak, False, timeout_s=60.0, shown=lambda _: None) == [0, 1]
        assert said == SAID
        with collecting() as said, pytest.raises(ConfigError, match="on purpose"):
            group.run(speak, True, timeout_s=60.0, shown=lambda _: None)
        assert said == ["rank 1: said by all", SAID[1]]


def test_log_lines_of_a_rank_as_json(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOE_DIST_LOG_FORMAT", "json")
    with RayGroup(2, "cpu", RaySpec()) as group:
        group.run(speak, False, timeout_s=60.0, shown=lambda _: None)
        log = Path(group.places[1]["log"])
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    said = {(line["rank"], line["level"], line["message"]) for line in lines}
    assert {(1, "info", "speak"), (1, "warning", "said by all")} <= said
