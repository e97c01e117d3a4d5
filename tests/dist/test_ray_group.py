"""Ranks as Ray actors: what comes back, what happens when one fails, and what is left behind."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import OutOfMemoryError
from ray.util import placement_group_table

from moe_dist.errors import ConfigError, RankFailure, ResourceError
from moe_dist.runtime import ray_watch
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
    started = RayGroup(world, "cpu", RaySpec(**{"collective_timeout_s": COLLECTIVE_S} | changes))
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


def doomed(context: RankContext, how: str) -> None:
    """Twenty collectives, then rank 1 fails while rank 0 is, or soon will be, in one that waits for it."""
    for _ in range(20):
        context.comm.barrier()
    context.progress("work of a doomed rank")
    if context.rank == 1:
        if how == "raise":
            raise ValueError("on purpose")
        if how == "return":
            return
        if how == "exit":
            os._exit(7)
        if how == "differ":
            context.comm.all_reduce(torch.ones(4))
        else:
            os.kill(os.getpid(), signal.Signals[how])
            time.sleep(5)  # a stop may reach another thread first
    context.comm.barrier()


class Speechless(BaseException):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def odd(context: RankContext, how: str) -> Any:
    for _ in range(20):
        context.comm.barrier()
    context.progress("work of an odd rank\ud800")
    if context.rank == 0:
        context.comm.barrier()
    if how == "result":
        return threading.Lock()
    raise {"interrupt": KeyboardInterrupt(), "speechless": Speechless()}[how]


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
    begin, said = time.monotonic(), []
    with pytest.raises(ResourceError) as raised:
        RayGroup(2, "cpu", RaySpec(cpus_per_rank=0.5, start_timeout_s=2.0), said.append)
    assert 1.5 < time.monotonic() - begin < 10.0
    assert "free resources in the Ray cluster" in str(raised.value)
    assert "2 bundles of {'CPU': 0.5} were not free within 2 s" in str(raised.value)
    assert raised.value.available == {"CPU": "0.2"}
    assert "waiting for 1 CPUs of the Ray cluster, 1 of 2 s" in said
    states = [entry["state"] for entry in placement_group_table().values()]
    assert states.count("CREATED") == 1  # the first group's
    assert "PENDING" not in states


WAITS = r"; rank 0 wait(s|ed) in barrier \(sequence number 21\)"
LOG = r"; its log: /\S+/worker-\S+\.err, which "
slow = partial(pytest.param, marks=pytest.mark.slow)  # the others show nearly as much


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        slow("raise", r"ValueError: on purpose$"),
        slow("return", r"returned after 20 collectives" + WAITS),
        ("SIGKILL", r"its process died of SIGKILL; where nobody sent it, the kernel did, because memory ran out" + LOG),
        slow("exit", r"its process died with exit code 7" + LOG),
        ("SIGSTOP", r"silent for \d s: its process is stopped \(SIGSTOP, or a debugger\)" + WAITS),
        ("differ", r"was in all_reduce where rank 0 was in barrier" + WAITS),
    ],
)
def test_a_failure_is_told_as_it_was(how: str, cause: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The rank that did not come, what it did, its number and how it ended; at once, long before a heartbeat or so."""
    with group(2, silence_timeout_s=30.0, collective_timeout_s=8.0 if how == "differ" else COLLECTIVE_S) as ranks:
        pids = pids_of(ranks)
        began = time.monotonic()
        error = failure(ranks, doomed, how)
        assert time.monotonic() - began < 20.0  # several times what is promised, on a busy CPU
        assert isinstance(error, RankFailure)
        assert (error.rank, error.op) == (1, "work of a doomed rank")
        assert error.seq == (21 if how == "differ" else 20)
        assert re.match(cause, error.cause), error.cause
        assert all(gone(pid) for pid in pids)
        if how == "raise":
            assert "in doomed" in error.trace  # the rank's own traceback
        with pytest.raises(RankFailure, match="this group is closed"):
            ranks.run(whoami, 0.0, timeout_s=LONG_S, shown=silent)
    said = capfd.readouterr()  # one error, raised, and no other
    assert "Traceback" not in said.out + said.err


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        slow("interrupt", "KeyboardInterrupt"),
        pytest.param(
            "speechless", "Speechless (its message can't be shown: __str__ raised RuntimeError)", marks=pytest.mark.slow
        ),
        ("result", "its result, of type lock, can't be pickled: TypeError: cannot pickle '_thread.lock' object"),
    ],
)
def test_what_no_message_can_carry_is_told_as_well(how: str, cause: str) -> None:
    with group(2) as ranks:
        error = failure(ranks, odd, how)
    assert isinstance(error, RankFailure)
    assert (error.rank, error.op, error.seq, error.cause) == (1, r"work of an odd rank\ud800", 20, cause)


def test_a_call_that_takes_too_long_names_who_is_behind() -> None:
    with group(2) as ranks:
        error = failure(ranks, loiter, timeout_s=3.0)
        assert isinstance(error, RankFailure)
        assert (error.rank, error.op, error.seq) == (1, "counting more sheep", 1)
        assert error.cause.startswith("not done within 3 s, here for ")


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


def test_a_rank_killed_for_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray has an error of its own for that, neither a task's nor an actor's death."""

    def killed(*_: Any, **__: Any) -> None:
        raise OutOfMemoryError("Task was killed due to the node running low on memory.\nand more")

    monkeypatch.setattr(ray_watch.ray, "get", killed)
    error = ray_watch._failure(object())
    assert error is not None
    ranks = SimpleNamespace(beats=[(), ("run", 0.0, 5)], peers=[None, None], places=[{}, {"log": None}])
    named = ray_watch.Lookout._death(ranks, 1, error)  # type: ignore[arg-type]
    assert (named.rank, named.op, named.seq) == (1, "run", 5)
    assert "ended by Ray because the node ran out of memory" in named.cause
    assert "running low on memory" in named.cause
    assert "and more" not in named.cause
