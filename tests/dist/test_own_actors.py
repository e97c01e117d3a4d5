"""Ray actors of a program's own as the ranks of one process group."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import ray

from moe_dist import join_actors
from moe_dist.errors import ConfigError, RankFailure

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors can't import test modules
pytestmark = pytest.mark.usefixtures("local_ray")


class Rank:
    comm: Any

    def agreed(self, value: int) -> tuple[int, int, int]:
        return self.comm.rank, self.comm.world, self.comm.agree_max(value)

    def is_joined(self) -> bool:
        return hasattr(self, "comm")


def ranks(count: int, **options: Any) -> list[Any]:
    remote = ray.remote(Rank).options(**{"num_cpus": 0.25} | options)
    return [remote.remote() for _ in range(count)]


def test_actors_become_ranks_in_their_order() -> None:
    actors = ranks(3)
    join_actors(actors, timeout_s=60.0)
    found = ray.get([actor.agreed.remote(10 + rank) for rank, actor in enumerate(actors)], timeout=60)
    assert found == [(0, 3, 12), (1, 3, 12), (2, 3, 12)]


def test_one_actor_is_a_group_too() -> None:
    (actor,) = ranks(1)
    join_actors([actor])
    assert ray.get(actor.agreed.remote(7), timeout=60) == (0, 1, 7)


@pytest.mark.slow
def test_an_actor_without_a_place_is_a_rank_failure() -> None:
    first, second = *ranks(1), *ranks(1, num_cpus=100)
    with pytest.raises(RankFailure, match=r"rank 1 failed in its place.*did not answer within 10 s; it may still wait"):
        join_actors([first, second], timeout_s=10.0)
    assert not ray.get(first.is_joined.remote(), timeout=60)


@pytest.mark.parametrize(
    ("actors", "arguments", "said"),
    [
        ([], {}, "actors = .?none.?: a group has at least one rank"),
        ([Rank()], {}, r"actors\[0\] = .?Rank.?: is no handle of a Ray actor"),
        ([], {"timeout_s": 0}, "timeout_s = 0: bounds every collective"),
    ],
)
def test_what_can_not_be_joined(actors: list[Any], arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        join_actors(actors, **arguments)


def test_what_a_rank_raises_is_raised_here() -> None:
    """An actor that has a process group already can't form another."""
    (actor,) = ranks(1)
    join_actors([actor])
    with pytest.raises(RankFailure, match="rank 0 failed in rendezvous of 1 rank "):
        join_actors([actor])
