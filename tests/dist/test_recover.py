"""A group that has failed takes new ranks in place of all old ones and goes on with the same results."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import ray
from faults.kinds import LIMIT_S, SOON_S, Fault
from faults.outcome import shared_memory, wait_gone
from faults.work import healthy, load, work
from ray.util import placement_group_table

from moe_dist.comm import Comm
from moe_dist.errors import ConfigError, RankFailure
from moe_dist.messages.notices import MoeDistWarning
from moe_dist.runtime.context import RankContext, RaySpec
from moe_dist.runtime.ray_group import RayGroup

for name in ("faults.inject", "faults.kinds", "faults.work", __name__):
    ray.cloudpickle.register_pickle_by_value(sys.modules[name])  # actors can't import test modules
pytestmark = pytest.mark.usefixtures("local_ray")
CALL_S = 60.0


def silent(_: str) -> None:
    pass


def kept(context: RankContext) -> list[str]:
    return sorted(context.memo)


def keep(context: RankContext, name: str) -> None:
    context.memo[name] = context.rank


def struck_once(context: RankContext, fault: Fault) -> str:
    """`work`, with the fault unless it has happened."""
    return work(context, healthy(world=context.world) if os.path.exists(fault.marks) else fault)


def loaded_later(context: RankContext, fault: Fault) -> None:
    """`load`, and the ranks that come after the first ones have the fault, once."""
    first = fault.marks + " first"
    struck = context.rank == fault.rank and os.path.exists(first) and not os.path.exists(fault.marks)
    load(context, fault if struck else healthy(world=context.world))
    Path(first).touch()


def test_a_killed_rank_and_a_hung_one_are_replaced(tmp_path: Path) -> None:
    """One group for both, because each start costs seconds."""
    memory = shared_memory()
    with RayGroup(2, "cpu", RaySpec()) as ranks:
        ranks.prepare(load, healthy(), timeout_s=CALL_S, shown=silent)
        ranks.run(keep, "of this call alone", timeout_s=CALL_S, shown=silent)
        before = ranks.run(work, healthy(), timeout_s=CALL_S, shown=silent)
        assert len(set(before)) == 2  # the ranks have tokens of their own

        old = [place["pid"] for place in ranks.places]
        killed = Fault(0, "SIGKILL", "collective", 7, 1, 2, f"{tmp_path}/killed")
        with pytest.raises(RankFailure, match=r"^rank 1 failed in ten steps \(sequence number \d+\): its process died"):
            ranks.run(work, killed, timeout_s=CALL_S, shown=silent)
        assert wait_gone(old)[1] == []
        assert {entry["state"] for entry in placement_group_table().values()} == {"REMOVED"}
        assert shared_memory() <= memory
        with pytest.raises(RankFailure, match="this group is closed"):
            ranks.run(work, healthy(), timeout_s=CALL_S, shown=silent)

        ranks.recover()
        new = [place["pid"] for place in ranks.places]
        assert set(new).isdisjoint(old)
        assert ranks.run(kept, timeout_s=CALL_S, shown=silent) == [["layer"]] * 2
        assert ranks.run(work, healthy(), timeout_s=CALL_S, shown=silent) == before

        hung, begin = Fault(0, "sleep", "collective", 7, 1, 2, f"{tmp_path}/hung"), time.monotonic()
        said = r"^rank 1 failed in ten steps .*: in \w+ for \d\.\d s, where its limit is 1\.5 s, at inject\.py:\d+ in "
        with pytest.raises(RankFailure, match=said):  # both are in the collective, by their records
            ranks.run(work, hung, timeout_s=CALL_S, shown=silent)
        assert time.monotonic() - begin < 2 * (LIMIT_S + SOON_S)  # twice what is promised, on a busy CPU
        assert wait_gone(new)[1] == []


@pytest.mark.slow  # what it adds to the test above and to those of tests/unit/test_restarts.py takes two more starts
def test_a_group_restarts_by_itself(tmp_path: Path) -> None:
    """A rank dies within a call that is pure, and within one that is not; then no restart is left. One group for all
    of it, because each start costs seconds."""
    dies = [Fault(0, "SIGKILL", "between", 5, rank, 2, f"{tmp_path}/{rank}") for rank in (0, 1)]
    always = Fault(0, "raise", "between", 5, 1, 2, f"{tmp_path}/always")
    with RayGroup(2, "cpu", RaySpec(restarts=2)) as ranks:
        ranks.prepare(load, healthy(), timeout_s=CALL_S, shown=silent)
        before = ranks.run(work, healthy(), timeout_s=CALL_S, shown=silent)
        said = r"^rank 0 failed in ten steps .*its process died of SIGKILL.*; restart 1 of 2$"
        with pytest.warns(MoeDistWarning, match=said):
            assert ranks.run(struck_once, dies[0], timeout_s=CALL_S, shown=silent, pure=True) == before

        with pytest.raises(RankFailure, match=r"^rank 1 failed in ten steps .*its process died"):
            ranks.run(struck_once, dies[1], timeout_s=CALL_S, shown=silent)
        with pytest.warns(MoeDistWarning, match=r"^rank 1 failed .*; restart 2 of 2$"):
            assert ranks.run(work, healthy(), timeout_s=CALL_S, shown=silent) == before

        with pytest.raises(RankFailure, match=r"^rank 1 failed .*ValueError: on purpose$"):
            ranks.run(work, always, timeout_s=CALL_S, shown=silent, pure=True)
        with pytest.raises(RankFailure, match="this group is closed"):
            ranks.run(work, healthy(), timeout_s=CALL_S, shown=silent)


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [1, 2])
def test_a_rank_dies_while_its_group_recovers(tmp_path: Path, restarts: int) -> None:
    """That takes one more restart, and where none is left the failure which began it is raised."""
    dies = Fault(0, "SIGKILL", "between", 5, 1, 2, f"{tmp_path}/dies")
    again = Fault(0, "exit_code", "loading", 0, 0, 2, f"{tmp_path}/again")
    with RayGroup(2, "cpu", RaySpec(restarts=restarts)) as ranks:
        ranks.prepare(loaded_later, again, timeout_s=CALL_S, shown=silent)
        before = ranks.run(work, healthy(), timeout_s=CALL_S, shown=silent)

        def asked() -> list[str]:
            return ranks.run(struck_once, dies, timeout_s=CALL_S, shown=silent, pure=True)

        if restarts == 2:
            with pytest.warns(MoeDistWarning) as said:
                assert asked() == before
        else:
            named = pytest.raises(RankFailure, match=r"^rank 1 failed in ten steps .*SIGKILL")
            with pytest.warns(MoeDistWarning) as said, named as raised:
                asked()
            assert "its process died with exit code 7" in str(raised.value.__cause__)
    notices = [str(each.message) for each in said if each.category is MoeDistWarning]
    counted = [f"restart {number} of {restarts}" for number in range(1, restarts + 1)]
    assert [text.rpartition("; ")[2] for text in notices] == counted


def test_a_stopped_rank_does_not_outlive_its_group() -> None:
    """Ray can't tell it to end."""
    with RayGroup(1, "cpu", RaySpec()) as ranks:
        pid = ranks.places[0]["pid"]
        os.kill(pid, signal.SIGSTOP)
    assert wait_gone([pid])[1] == []


@pytest.mark.parametrize("limit_s", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_a_limit_that_can_not_be(limit_s: object) -> None:
    context = RankContext(Comm.single(), "none")
    with pytest.raises(ConfigError, match=r"limit_s = .*: bounds the time between two collectives \(legal: seconds"):
        context.progress("work", limit_s)  # type: ignore[arg-type]
