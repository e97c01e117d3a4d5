"""The members that test each other's network interfaces (`pairs.py`): one on each node of a Ray cluster, or
torchrun's ranks."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from moe_dist.errors import RankFailure
from moe_dist.runtime import voice
from moe_dist.runtime.context import RaySpec
from moe_dist.runtime.pairs import Doors, Place, Way, reach

OP = "testing pairs"


def pairs_of_nodes(spec: RaySpec, timeout_s: float) -> tuple[list[Place], list[Way]]:
    """Between the nodes of the Ray cluster that `spec` names; on a cluster of one node between two processes of it.
    Raises as `cluster.connect`, and RankFailure for a node that does not answer in time."""
    import ray
    from ray.exceptions import GetTimeoutError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from moe_dist.runtime.cluster import connect

    connect(spec)
    nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
    nodes = nodes * 2 if len(nodes) == 1 else nodes
    remote = ray.remote(_Member)
    members: list[Any] = [
        remote.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(number)
        for number, node in enumerate(nodes)
    ]
    deadline = time.monotonic() + timeout_s

    def asked(futures: list[Any]) -> list[Any]:
        found = []
        for number, future in enumerate(futures):
            try:
                found.append(ray.get(future, timeout=max(0.0, deadline - time.monotonic())))
            except GetTimeoutError:
                cause = f"node {nodes[number]} did not answer within {timeout_s:g} s"
                raise RankFailure(number, OP, 0, cause) from None
            except ray.exceptions.RayError as error:
                raise RankFailure(number, OP, 0, " ".join(str(error).split())[:300]) from None
        return found

    try:
        places = asked([member.place.remote() for member in members])
        ways = asked([member.reach.remote(places) for member in members])
    finally:
        for member in members:
            ray.kill(member)
    return places, [way for found in ways for way in found]


class _Member:
    """A Ray actor."""

    def __init__(self, number: int) -> None:
        self._doors = Doors(number)

    def place(self) -> Place:
        return self._doors.place

    def reach(self, places: list[Place]) -> list[Way]:
        return reach(self._doors.place, places)


def pairs_of_ranks(timeout_s: float) -> tuple[list[Place], list[Way]]:
    """Between torchrun's ranks, each of which calls this and gets all that was found. Raises ConfigError outside of
    torchrun, RankFailure for a rank that does not answer in time."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    here = voice.launched()
    try:
        shared = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))[0]
    except Exception as error:
        raise RankFailure(0, OP, 0, f"its store does not answer: {' '.join(str(error).split())[:300]}") from error
    store = PrefixStore("moe_dist_pairs", shared)

    def told(name: str, own: Any) -> list[Any]:
        """What each rank has to say, in their order."""
        store.set(f"{name}{here.rank}", json.dumps(own))
        found = []
        for rank in range(here.world):
            try:
                found.append(json.loads(store.get(f"{name}{rank}")))
            except Exception as error:
                cause = f"rank {here.rank} waited {timeout_s:g} s for it"
                raise RankFailure(rank, f"{OP} ({name})", 0, cause) from error
        return found

    with Doors(here.rank) as doors:
        own = doors.place
        places = [
            Place(member, host, bytes.fromhex(token), tuple(map(tuple, ports)), frozenset(loopbacks))
            for member, host, token, ports, loopbacks in told(
                "place", [own.member, own.host, own.token.hex(), own.doors, sorted(own.loopbacks)]
            )
        ]
        found = told("ways", [vars(way) for way in reach(own, places)])
        # Whoever ends first takes its doors, and rank 0 the store, away.
        with suppress(RankFailure):
            told("done", True)
    return places, [Way(**way) for each in found for way in each]
