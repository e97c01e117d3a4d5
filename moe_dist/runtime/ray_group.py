"""A group of Ray actors, one a rank, in one placement group; every wait is bounded, and work is watched."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moe_dist.comm.network import LOOPBACK
from moe_dist.errors import ClusterLost, ConfigError, MoeDistError, RankFailure, ResourceError
from moe_dist.messages import logs
from moe_dist.messages.counts import count_of
from moe_dist.messages.notices import notice
from moe_dist.runtime import failed_groups
from moe_dist.runtime.actor import RankActor
from moe_dist.runtime.blame import unpacked
from moe_dist.runtime.cluster import Watch, connect
from moe_dist.runtime.context import RankFunction, RaySpec
from moe_dist.runtime.ending import KILLED_S, ended
from moe_dist.runtime.heard import heard, said_before
from moe_dist.runtime.own_actors import ALL_GPUS_VISIBLE
from moe_dist.runtime.ray_places import bundle_of, check_resources, in_order, ranks_of_nodes
from moe_dist.runtime.ray_watch import Lookout
from moe_dist.runtime.restarts import Restarts

FREE_S = 0.5  # for the ranks that live to leave their collective; they are ended anyway

Prepared = tuple[RankFunction, tuple[Any, ...], float]


class RayGroup:
    """Ranks as Ray actors. Use as a context manager, or call `close`. With `spec.restarts` it recovers by itself, so
    many times in all: see `run`."""

    runtime = "ray"

    def __init__(
        self,
        world: int,
        device: str = "cpu",
        spec: RaySpec | None = None,
        shown: Callable[[str], None] | None = None,
        largest: int = 0,
    ) -> None:
        """`shown` is told what is waited for. `largest`: of the groups that will follow this one; without room for it
        not even this one is started."""
        self.world, self.device, self.spec, self._largest = world, device, spec or RaySpec(), largest
        self._shown = shown or (lambda _: None)
        self._prepared: list[Prepared] = []
        self._lost: ClusterLost | None = None
        self._restarts = Restarts(self.spec.restarts, notice)
        self._given_up: MoeDistError | None = None  # what for, until it recovers or is closed
        self._in_use = threading.RLock()
        self._start()

    def _start(self) -> None:
        """New ranks in a new placement group, and a process group of them."""
        self._actors: list[Any] = []
        self._bundles: Any = None
        connect(self.spec)
        check_resources(max(self.world, self._largest), self.device, self.spec)
        self._watch_cluster = Watch(self.spec.silence_timeout_s)
        self._lookout = Lookout(self.world, self._actors, self._watch_cluster, self.spec.silence_timeout_s)
        try:
            self._place()
            self._rendezvous()
            self._watch_cluster.seen_all()
            failed_groups.started()
        except BaseException as error:
            self._settle(error)
            raise

    def __enter__(self) -> RayGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _alone(self, called: str) -> Iterator[None]:
        """Two calls at once would reach the ranks in different orders, and two recoveries would mix their new ranks."""
        if not self._in_use.acquire(blocking=False):
            raise ConfigError("RayGroup", called, "another thread's call of this group is under way", "one at a time")
        try:
            yield
        finally:
            self._in_use.release()

    def _place(self) -> None:
        bundle = bundle_of(self.device, self.spec)
        self._bundles = placement_group([bundle] * self.world, strategy=self.spec.strategy)
        wanted = " and ".join(f"{self.world * count:g} {name}s" for name, count in bundle.items())
        if not self._patiently(self._bundles.wait, self.spec.start_timeout_s, f"{wanted} of the Ray cluster"):
            free = {name: f"{ray.available_resources().get(name, 0):g}" for name in bundle}
            hint = f"{self.world} bundles of {bundle} were not free within {self.spec.start_timeout_s:g} s."
            raise ResourceError("free resources in the Ray cluster", bundle, free, hint)
        remote = ray.remote(RankActor)
        for number in range(self.world):
            options = remote.options(
                num_cpus=self.spec.cpus_per_rank,
                num_gpus=1 if self.device == "cuda" else 0,
                max_concurrency=2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._bundles, number),
                runtime_env=ALL_GPUS_VISIBLE if self.device == "cuda" else None,
            )
            self._actors.append(options.remote(number, self.world, self.device, os.environ.get(logs.VARIABLE)))

    def _rendezvous(self) -> None:
        asked = [actor.where.remote(self.spec.interface) for actor in self._actors]
        found = self._get(asked, "first sign of life", self.spec.start_timeout_s)
        order = in_order(found)
        self._actors[:], self.places = [self._actors[n] for n in order], [found[n] for n in order]
        self._lookout.meet(self.places)
        on_nodes = ranks_of_nodes(self.places)
        self.nodes = tuple(map(len, on_nodes))
        named = self.spec.interface is not None
        addresses = [LOOPBACK if len(on_nodes) == 1 and not named else place["address"] for place in self.places]
        timeout_s = self.spec.collective_timeout_s
        port = self._get([self._actors[0].serve.remote(addresses[0], timeout_s)], "opening the meeting", timeout_s)[0]
        given = addresses[0], port, self.nodes, timeout_s
        joining = [
            actor.join.remote(rank, own, named, *given)
            for rank, (actor, own) in enumerate(zip(self._actors, addresses, strict=True))
        ]
        self._get(joining, "meeting the others", self.spec.start_timeout_s + timeout_s)

    def _patiently(self, wait: Callable[[float], Any], timeout_s: float, what: str) -> Any:
        """`wait(seconds)` again and again until it finds something or time is up; raises ClusterLost in between."""
        begin = time.monotonic()
        deadline = begin + timeout_s
        while True:
            remaining = deadline - time.monotonic()
            if (found := wait(max(0.0, min(1.0, remaining)))) or remaining <= 0:
                return found
            self._lookout.check_cluster("starting ranks")
            self._shown(f"waiting for {what}, {time.monotonic() - begin:.0f} of {timeout_s:.0f} s")

    def _get(self, futures: Sequence[Any], op: str, timeout_s: float) -> list[Any]:
        """Of all ranks; `op` says in words what they do."""
        pending = list(futures)

        stopped_at: dict[int, float] = {}

        def one(seconds: float) -> bool:
            nonlocal pending
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=seconds)
            self._lookout.raise_first_failure(done, futures)
            self._lookout.raise_stopped(op, stopped_at)
            return not pending

        if not self._patiently(one, timeout_s, f"{count_of(self.world, 'rank')} ({op})"):
            rank = next(rank for rank, future in enumerate(futures) if future in pending)
            raise RankFailure(rank, f"starting ({op})", -1, f"no answer within {timeout_s:g} s")
        results: list[Any] = ray.get(list(futures))
        return results

    def describe(self) -> Sequence[str]:
        several = len(self.nodes) > 1
        return [
            f"rank {rank}: {place['device']} {place['gpu'] or ''} pid {place['pid']}".replace("  ", " ")
            + (f" on {place['address']}" if several else "")
            for rank, place in enumerate(self.places)
        ]

    def run(
        self,
        function: RankFunction,
        *arguments: Any,
        timeout_s: float,
        shown: Callable[[str], None],
        pure: bool = False,
    ) -> list[Any]:
        """See Group.run. On any failure the other ranks are freed and the whole group is given up.

        Where `spec.restarts` are left, a group that was given up recovers at the next call. `pure`: what the function
        returns follows from its arguments and from what `prepare` has made, and it does nothing else that lasts. Then
        after a RankFailure the group recovers at once and the call is repeated, with `timeout_s` anew. Each restart is
        a notice that names the failure. Where none is left the call's first failure is raised.

        Raises ConfigError while another thread is in `run`, `prepare` or `recover`.
        """
        with self._alone("run"):
            return self._run(function, arguments, timeout_s, shown, pure)

    def _run(
        self,
        function: RankFunction,
        arguments: tuple[Any, ...],
        timeout_s: float,
        shown: Callable[[str], None],
        pure: bool,
    ) -> list[Any]:
        if self._given_up is not None:
            self._restart(self._given_up, self._given_up, shown)
        if not self._actors:
            raise RankFailure(
                -1, "run", -1, "this group is closed, by itself after a failure: recover, or start another"
            )
        first: RankFailure | None = None
        while True:
            try:
                return self._called(function, arguments, timeout_s, shown)
            except RankFailure as error:
                if not pure:
                    raise
                first, latest = first or error, error
            self._restart(first, latest, shown)

    def _restart(self, first: MoeDistError, latest: MoeDistError, shown: Callable[[str], None]) -> None:
        """Recover, as long as restarts are left, else raise `first`. A recovery that fails has used one up."""
        while self._restarts.take(latest):
            try:
                return self.recover(shown)
            except ClusterLost:
                raise
            except MoeDistError as error:
                latest = error
        self._given_up = None
        if latest is first:
            raise first
        raise first from latest

    def _called(
        self, function: RankFunction, arguments: tuple[Any, ...], timeout_s: float, shown: Callable[[str], None]
    ) -> list[Any]:
        try:
            futures = [actor.run.remote(function, arguments) for actor in self._actors]
            self._lookout.watch(futures, timeout_s, shown)
            return heard(unpacked(self._get(futures, "run", timeout_s), self._lookout.beats[0][0]))
        except BaseException as error:
            said_before(error)
            if isinstance(error, RankFailure):
                error.locate([place["host"] for place in self.places])
            self._settle(error)
            failed_groups.failed(error)
            if isinstance(error, MoeDistError) and self._lost is None and self._restarts.left:
                self._given_up = error
            raise

    def prepare(self, function: RankFunction, *arguments: Any, timeout_s: float, shown: Callable[[str], None]) -> None:
        """As `run`, and again on the new ranks after each `recover`, in the order of these calls: what makes the state
        that later calls need, such as weights, layers and CUDA graphs in `context.memo`. So it is `pure` as well."""
        self.run(function, *arguments, timeout_s=timeout_s, shown=shown, pure=True)
        self._prepared.append((function, arguments, timeout_s))

    def recover(self, shown: Callable[[str], None] | None = None) -> None:
        """Replace all ranks by new processes, in a new placement group and a new process group, and prepare them as the
        ones before were. What `run` gave before it gives again, bit by bit where the backend is deterministic; what a
        rank has kept since it was prepared is gone. Nothing of the old ranks is left when the new ones start.

        Takes `ray.start_timeout_s`, `ray.collective_timeout_s` and the time of each `prepare` at most. Raises
        ClusterLost where that is how the group ended, RankFailure where an old rank does not end, or a new one fails,
        ResourceError where the cluster has no place for the group any more, ConfigError while another thread is in
        `run`, `prepare` or `recover`. It may be called again after each."""
        with self._alone("recover"):
            if self._lost is not None:
                raise self._lost
            self.close()
            self._start()
            for function, arguments, timeout_s in self._prepared:
                self._called(function, arguments, timeout_s, shown or self._shown)

    def _settle(self, error: BaseException) -> None:
        """After a failure: free the ranks that still wait, and give the group up."""
        if isinstance(error, ClusterLost):
            self._lost = error
            self._lookout.close()
        else:
            ends = self._watch_cluster.ends_by_signal()
            futures = [] if ends else [actor.abort.remote() for actor in self._lookout.answer()]
            if futures:
                ray.wait(futures, num_returns=len(futures), timeout=FREE_S)
            self._end(FREE_S)  # what is left then is waited for by `close` and `recover`: `error` is to be known soon
        self._actors, self._bundles = [], None  # of a lost cluster nothing can be given back

    def _end(self, within_s: float) -> list[int]:
        """The ranks of this machine whose processes are still there then."""
        self._lookout.close()
        peers = self._lookout.peers
        if self._watch_cluster.ends_by_signal():
            for own in filter(None, peers):
                own.kill()
        else:
            for actor in self._actors:
                ray.kill(actor)
            if self._bundles is not None:
                remove_placement_group(self._bundles)
        self._actors, self._bundles = [], None
        left = ended((peer for peer in peers if peer is not None), within_s)
        for rank, peer in enumerate(peers):
            if peer is not None and rank not in left:  # those that are left are ended at the next call
                peer.close()
                peers[rank] = None
        return left

    def close(self) -> None:
        """End the actors and give their place back. May be called twice. Raises RankFailure where the process of a rank
        of this machine does not end."""
        self._given_up = None
        if left := self._end(KILLED_S):
            raise RankFailure(left[0], "ending", -1, "its process is still there after SIGKILL")
