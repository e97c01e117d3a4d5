"""When a group of Ray actors starts again by itself, and when it does not. Nothing is started here: what starts and
calls come to is written down beforehand."""

from __future__ import annotations

import pickle
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from moe_dist.errors import ClusterLost, ConfigError, RankFailure, ResourceError
from moe_dist.messages.notices import MoeDistWarning
from moe_dist.runtime import ray_group
from moe_dist.runtime.context import RaySpec
from moe_dist.runtime.ray_group import RayGroup

DIED, SECOND = RankFailure(1, "all_gather", 7, "died"), RankFailure(0, "barrier", 3, "second")
NO_ROOM = ResourceError("free resources in the Ray cluster", 2, 1, "More.")


def step() -> None:
    """What the ranks would run."""


class Written(RayGroup):
    """`starts` and `calls`: what each raises in turn, None where it is well; all later ones are."""

    def __init__(self, restarts: int, calls: list[Any], starts: tuple[Any, ...] = ()) -> None:
        self.calls, self.starts, self.log = list(calls), [None, *starts], []
        super().__init__(2, "cpu", RaySpec(restarts=restarts))

    def _start(self) -> None:
        self._actors = []
        self.log.append("start")
        _raise_next(self.starts)
        self._actors = [SimpleNamespace(run=SimpleNamespace(remote=lambda *_: None))] * 2
        self.places = [{"host": "here"}] * 2
        self._watch_cluster = SimpleNamespace(ends_by_signal=lambda: False)
        self._lookout = SimpleNamespace(watch=self._watch, answer=list, beats=[("step", 0.0, 0)], close=lambda: None)

    def _watch(self, *_: Any) -> None:
        self.log.append("call")
        _raise_next(self.calls)

    def _get(self, *_: Any) -> list[Any]:
        return [pickle.dumps((rank, ())) for rank in range(2)]

    def _end(self, within_s: float) -> list[int]:
        self._actors = []
        return []

    def asked(self, **given: Any) -> list[Any]:
        return self.run(step, timeout_s=1.0, shown=lambda _: None, **given)


def _raise_next(errors: list[Any]) -> None:
    error = errors.pop(0) if errors else None
    if error is not None:
        raise error


def told(group: Written, **given: Any) -> list[str]:
    """What the user hears while this call is answered."""
    with pytest.warns(MoeDistWarning) as said:
        assert group.asked(**given) == [0, 1]
    return [str(each.message) for each in said]


def test_nothing_is_repeated_unless_it_is_asked_for():
    group = Written(0, [DIED])
    with pytest.raises(RankFailure, match="died"):
        group.asked(pure=True)
    with pytest.raises(RankFailure, match="this group is closed"):
        group.asked(pure=True)
    assert group.log == ["start", "call"]


def test_a_pure_call_is_repeated_on_new_ranks():
    group = Written(3, [None, DIED, SECOND])
    assert group.asked(pure=True) == [0, 1]
    assert told(group, pure=True) == [f"{DIED}; restart 1 of 3", f"{SECOND}; restart 2 of 3"]
    assert group.log == ["start", "call", "call", "start", "call", "start", "call"]


def test_after_the_limit_the_first_failure_is_raised():
    group = Written(1, [DIED, SECOND])
    with pytest.warns(MoeDistWarning), pytest.raises(RankFailure, match="died") as raised:
        group.asked(pure=True)
    assert raised.value.__cause__ is SECOND
    with pytest.raises(RankFailure, match="this group is closed"):
        group.asked(pure=True)


@pytest.mark.parametrize("error", [DIED, ConfigError("field", 7, "on purpose")])
def test_another_call_fails_at_once_and_the_next_one_has_new_ranks(error):
    group = Written(1, [error])
    with pytest.raises(type(error)):
        group.asked()
    assert group.log == ["start", "call"]
    assert told(group) == [f"{error}; restart 1 of 1"]


def test_what_would_come_out_the_same_is_not_repeated():
    group = Written(1, [ConfigError("field", 7, "on purpose")])
    with pytest.raises(ConfigError):
        group.asked(pure=True)
    assert group.log == ["start", "call"]


class TestOfARecovery:
    def test_one_that_fails_has_used_one_up(self):
        group = Written(3, [DIED], starts=(NO_ROOM, SECOND))
        assert told(group, pure=True) == [
            f"{DIED}; restart 1 of 3", f"{NO_ROOM}; restart 2 of 3", f"{SECOND}; restart 3 of 3"
        ]  # fmt: skip
        assert group.log == ["start", "call", "start", "start", "start", "call"]

    @pytest.mark.parametrize("pure", [True, False])
    def test_where_none_is_left_the_failure_before_it_is_raised(self, pure):
        group = Written(2, [DIED], starts=(NO_ROOM, SECOND))
        if not pure:
            with pytest.raises(RankFailure, match="died"):
                group.asked()
        with pytest.warns(MoeDistWarning), pytest.raises(RankFailure, match="died") as raised:
            group.asked(pure=pure)
        assert raised.value.__cause__ is SECOND

    def test_what_was_prepared_is_prepared_again_and_may_fail(self):
        group = Written(2, [None, DIED, SECOND])
        group.prepare(step, timeout_s=1.0, shown=lambda _: None)
        assert told(group, pure=True) == [f"{DIED}; restart 1 of 2", f"{SECOND}; restart 2 of 2"]
        assert group.log == ["start", "call", "call", "start", "call", "start", "call", "call"]

    @pytest.mark.parametrize("error", [ClusterLost("a:1", "starting ranks", "gone"), KeyboardInterrupt()])
    def test_a_lost_cluster_and_a_signal_end_it(self, error):
        group = Written(3, [DIED], starts=(error,))
        with pytest.warns(MoeDistWarning), pytest.raises(type(error)):
            group.asked(pure=True)
        assert group.log == ["start", "call", "start"]


def test_a_lost_cluster_starts_nothing():
    group = Written(3, [ClusterLost("a:1", "step", "gone")])
    with pytest.raises(ClusterLost):
        group.asked(pure=True)
    with pytest.raises(RankFailure, match="this group is closed"):
        group.asked(pure=True)
    assert group.log == ["start", "call"]


def test_a_group_that_was_closed_stays_closed():
    group = Written(3, [DIED])
    with pytest.raises(RankFailure, match="died"):
        group.asked()
    group.close()
    with pytest.raises(RankFailure, match="this group is closed"):
        group.asked(pure=True)
    assert group.log == ["start", "call"]


def test_another_thread_is_refused_while_a_call_is_under_way():
    """Two recoveries at once would leave a placement group behind, and ranks of both in one list."""
    group, begun, over = Written(0, []), threading.Event(), threading.Event()
    group._watch = lambda *_: (begun.set(), over.wait(10))
    group._start()
    working = threading.Thread(target=group.asked)
    working.start()
    try:
        assert begun.wait(10)
        for refused in (group.recover, group.asked):
            with pytest.raises(ConfigError, match="another thread's call of this group is under way"):
                refused()
    finally:
        over.set()
        working.join()
    group.recover()


@pytest.mark.parametrize("ends", [True, False])
def test_a_head_that_ends_by_the_same_signal_is_asked_for_nothing(monkeypatch, ends):
    """Ray waits for it without an end, so the ranks' own processes are ended."""
    asked, killed = [], []
    monkeypatch.setattr(ray_group.ray, "kill", lambda actor: asked.append(actor))
    monkeypatch.setattr(ray_group, "remove_placement_group", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(ray_group, "ended", lambda peers, within_s: [*peers][:0])
    peer = SimpleNamespace(kill=lambda: killed.append("peer"), close=lambda: None)
    group = RayGroup.__new__(RayGroup)
    group._actors, group._bundles = ["actor"], "bundles"
    group._lookout = SimpleNamespace(close=lambda: None, answer=lambda: [], peers=[peer, None])
    group._watch_cluster = SimpleNamespace(ends_by_signal=lambda: ends)
    group._settle(KeyboardInterrupt())
    assert (asked, killed) == (([], ["peer"]) if ends else (["actor", "bundles"], []))
    assert (group._actors, group._bundles) == ([], None)
