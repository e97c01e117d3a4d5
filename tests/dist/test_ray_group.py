"""Ranks as Ray actors: what comes back, what happens when one fails, and what is left behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import OutOfMemoryError
from ray.util import placement_group_table

from moe_dist.errors import ConfigError, RankFailure, ResourceError
from moe_dist.runtime import ray_group
from moe_dist.runtime.context import RankContext, RaySpec
from moe_dist.runtime.ray_group import RayGroup

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors can't import test modules
pytestmark = pytest.mark.usefixtures("local_ray")

COLLECTIVE_S = 60.0  # no failure below may take anywhere near as long
SOON_S = 20.0
LONG_S = 120.0


def silent(_: str) -> None:
    pass


@contextmanager
def group(world: int, **changes: Any) -> Iterator[RayGroup]:
    """Ends with nothing of the group left, or the test fails."""
    started = RayGroup(world, "cpu", RaySpec(collective_timeout_s=COLLECTIVE_S, **changes))
    pids = pids_of(started)
    try:
        yield started
    finally:
        started.close()
        leftover = [pid for pid in pids if not gone(pid)]
        for pid in leftover:
            os.kill(pid, signal.SIGKILL)
    assert leftover == []
    assert {entry["state"] for entry in placement_group_table().values()} == {"REMOVED"}
    until(lambda: ray.available_resources().get("CPU") == 2.0, "its CPUs are given back")


def pids_of(started: RayGroup) -> list[int]:
    return [place["pid"] for place in started.places]


def gone(pid: int, within_s: float = 15.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def until(holds: Callable[[], bool], what: str, within_s: float = 15.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(0.1)


def failure(started: RayGroup, function: Callable[..., Any], *arguments: Any, timeout_s: float = LONG_S) -> Exception:
    """What `run` raises, which must be soon."""
    begin = time.monotonic()
    with pytest.raises((ConfigError, RankFailure)) as raised:
        started.run(function, *arguments, timeout_s=timeout_s, shown=silent)
    assert time.monotonic() - begin < SOON_S
    return raised.value


# What ranks run.


def whoami(context: RankContext, pause_s: float) -> tuple[int, int, str]:
    time.sleep(pause_s * (context.world - context.rank))  # the last rank is ready first
    return context.rank, context.world, context.runtime


def collectives(context: RankContext) -> dict[str, Any]:
    comm, rank, world = context.comm, context.rank, context.world
    own = torch.full((2, 3), float(rank))
    return {
        "sum": comm.all_reduce(own.clone())[0, 0].item(),
        "gathered": comm.all_gather([own])[0][:, 0].tolist(),
        "scattered": comm.reduce_scatter(torch.arange(float(world))[:, None].repeat(1, 2)).tolist(),
        "exchanged": comm.all_to_all([torch.full((world, 1), float(rank))], [1] * world, [1] * world)[0][:, 0].tolist(),
        "largest": comm.agree_max(rank * 10),
        "grad": torch.is_grad_enabled(),
    }


def remember(context: RankContext, value: int | None) -> Any:
    if value is not None:
        context.memo["value"] = value + context.rank
    return context.memo.get("value")


def misconfigured(context: RankContext) -> None:
    if context.rank == 1:
        raise ConfigError("field", 7, "on purpose", (1, 2))
    context.comm.barrier()  # rank 1 never comes


def broken(context: RankContext) -> None:
    if context.rank == 1:
        raise ValueError("on purpose")
    context.comm.barrier()


def stopped_by(context: RankContext, number: int) -> None:
    """Rank 1 gets a signal while the others are in a collective that waits for it."""
    context.progress("work of a doomed rank")
    context.comm.barrier()
    if context.rank == 1:
        time.sleep(1.5)  # long enough for the others to wait, and for a heartbeat to have told what it does
        os.kill(os.getpid(), number)
    context.comm.barrier()


def loiter(context: RankContext) -> None:
    context.progress("counting sheep")
    context.comm.barrier()
    if context.rank == 1:
        context.progress("counting more sheep")
        time.sleep(LONG_S)


def test_results_collectives_and_a_config_error() -> None:
    """One group of three serves all of this, because each start costs seconds."""
    with group(3, cpus_per_rank=0.6) as ranks:
        assert [line.split(" pid ")[0] for line in ranks.describe()] == [f"rank {rank}: cpu" for rank in range(3)]
        assert len(set(pids_of(ranks))) == 3

        found = ranks.run(whoami, 0.3, timeout_s=LONG_S, shown=silent)
        assert found == [(rank, 3, "ray") for rank in range(3)]

        for rank, found in enumerate(ranks.run(collectives, timeout_s=LONG_S, shown=silent)):
            assert found == {
                "sum": 3.0,
                "gathered": [0.0, 0.0, 1.0, 1.0, 2.0, 2.0],
                "scattered": [[3.0 * rank] * 2],
                "exchanged": [0.0, 1.0, 2.0],
                "largest": 20,
                "grad": False,
            }

        ranks.run(remember, 5, timeout_s=LONG_S, shown=silent)
        assert ranks.run(remember, None, timeout_s=LONG_S, shown=silent) == [5, 6, 7]

        texts: list[str] = []
        ranks.run(whoami, 1.0, timeout_s=LONG_S, shown=texts.append)
        assert "whoami" in texts

        busy_cluster_is_refused()

        error = failure(ranks, misconfigured)
        assert isinstance(error, ConfigError)
        assert (error.field, error.value, error.rule, error.legal) == ("field", 7, "on purpose", (1, 2))


def busy_cluster_is_refused() -> None:
    """1.8 of the 2 CPUs are taken: a second group could run later, but nobody waits for ever."""
    begin = time.monotonic()
    with pytest.raises(ResourceError) as raised:
        RayGroup(2, "cpu", RaySpec(cpus_per_rank=0.5, start_timeout_s=2.0))
    assert 1.5 < time.monotonic() - begin < 10.0
    assert "free resources in the Ray cluster" in str(raised.value)
    assert "2 bundles of {'CPU': 0.5} were not free within 2 s" in str(raised.value)
    assert raised.value.available == {"CPU": "0.2"}
    states = [entry["state"] for entry in placement_group_table().values()]
    assert states.count("CREATED") == 1  # the first group's
    assert "PENDING" not in states


def test_an_unexpected_exception_names_the_rank() -> None:
    with group(2) as ranks:
        error = failure(ranks, broken)
        assert isinstance(error, RankFailure)
        assert (error.rank, error.cause) == (1, "ValueError: on purpose")
        with pytest.raises(RankFailure):
            ranks.run(whoami, 0.0, timeout_s=LONG_S, shown=silent)  # given up as a whole, and it says so


def test_a_killed_rank_is_named_and_the_survivors_are_freed() -> None:
    with group(3) as ranks:
        pids = pids_of(ranks)
        error = failure(ranks, stopped_by, signal.SIGKILL)
        assert isinstance(error, RankFailure)
        assert error.rank == 1
        assert error.op == "work of a doomed rank"
        assert "died" in error.cause
        assert all(gone(pid) for pid in pids)
    with group(2) as again:  # the same Ray serves the next group
        assert again.run(whoami, 0.0, timeout_s=LONG_S, shown=silent) == [(0, 2, "ray"), (1, 2, "ray")]
        error = failure(again, loiter, timeout_s=3.0)
        assert isinstance(error, RankFailure)
        assert error.rank == 1
        assert error.op == "counting more sheep"
        assert error.cause.startswith("not done within 3 s, here for ")


def test_a_stopped_rank_is_noticed_by_its_silence() -> None:
    """Ray reports nothing for a process that exists and does not answer."""
    with group(2, silence_timeout_s=4.0) as ranks:
        error = failure(ranks, stopped_by, signal.SIGSTOP)
        assert isinstance(error, RankFailure)
        assert (error.rank, error.op) == (1, "heartbeat")
        assert error.cause.startswith("silent for ")


@pytest.mark.parametrize(
    ("world", "device", "spec", "said"),
    [
        (40, "cpu", RaySpec(), ["CPUs", "10 CPU needed, 2 CPU available", "40 ranks ask for 10 CPU on one node"]),
        (9, "cpu", RaySpec(strategy="PACK"), ["CPUs", "2.25 CPU needed, 2 CPU available", "in the cluster"]),
        (2, "cuda", RaySpec(), ["GPUs", "2 GPU needed, 0 GPU available", "2 ranks ask for 2 GPU on one node"]),
    ],
)
def test_too_small_a_cluster_is_refused_at_once(world: int, device: str, spec: RaySpec, said: list[str]) -> None:
    begin = time.monotonic()
    with pytest.raises(ResourceError) as raised:
        RayGroup(world, device, spec)
    assert time.monotonic() - begin < 2.0
    for text in said:
        assert text in str(raised.value)


def test_a_rank_killed_for_memory_is_named(monkeypatch):
    """Ray has an error of its own for that, neither a task's nor an actor's death."""

    def killed(*_, **__):
        raise OutOfMemoryError("Task was killed due to the node running low on memory.\nand more")

    monkeypatch.setattr(ray_group.ray, "get", killed)
    error = ray_group._failure(object())
    group = SimpleNamespace(_beats=[(), ("run", 0.0, 5)], _sequence=lambda rank: 5, _actors=[])
    named = ray_group.RayGroup._named(group, 1, "run", error)
    assert isinstance(named, RankFailure)
    assert (named.rank, named.op, named.seq) == (1, "run", 5)
    assert "running low on memory" in named.cause
    assert "and more" not in named.cause
