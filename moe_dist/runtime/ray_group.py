"""A group of Ray actors, one a rank, in one placement group; every wait is bounded, and work is watched."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moe_dist.comm.network import LOOPBACK
from moe_dist.errors import ClusterLost, MoeDistError, RankFailure, ResourceError
from moe_dist.messages import logs
from moe_dist.runtime import failed_groups
from moe_dist.runtime.actor import RankActor
from moe_dist.runtime.blame import (
    STOPPED,
    STOPPED_S,
    blamed,
    is_echo,
    left_early,
    overdue,
    said_by,
    silence,
    stalled,
    unpacked,
)
from moe_dist.runtime.cluster import Watch, connect
from moe_dist.runtime.context import RankFunction, RaySpec
from moe_dist.runtime.heard import heard, said_before
from moe_dist.runtime.logs import said_last
from moe_dist.runtime.other_nodes import OtherNodes
from moe_dist.runtime.own_actors import ALL_GPUS_VISIBLE
from moe_dist.runtime.pulse import Peer, Sight
from moe_dist.runtime.ray_places import bundle_of, check_resources, in_order, ranks_of_nodes
from moe_dist.runtime.resources import ended

BEAT_EVERY_S = 1.0  # a rank that computes answers each of them
LOOK_EVERY_S = 0.25  # at the records, which takes nothing from a rank
GRACE_S = 2.0  # after a first failure: time for the others to show theirs, so that the cause is named, not an echo
FREE_S = 0.5  # for the ranks that live to leave their collective; they are ended anyway

Prepared = tuple[RankFunction, tuple[Any, ...], float]


class RayGroup:
    """Ranks as Ray actors. Use as a context manager, or call `close`."""

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
        self._start()

    def _start(self) -> None:
        """New ranks in a new placement group, and a process group of them."""
        self._actors: list[Any] = []
        self._bundles: Any = None
        self._beats: list[tuple[str, float, int]] = [("starting", 0.0, 0)] * self.world
        self._peers: list[Peer | None] = [None] * self.world
        self._heard = [time.monotonic()] * self.world
        self._other_nodes: OtherNodes | None = None
        self._asked_at = 0.0
        connect(self.spec)
        check_resources(max(self.world, self._largest), self.device, self.spec)
        self._watch_cluster = Watch(self.spec.silence_timeout_s)
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
        found = self._ask("where", self.spec.interface, timeout_s=self.spec.start_timeout_s)
        order = in_order(found)
        self._actors, self.places = [self._actors[n] for n in order], [found[n] for n in order]
        on_nodes = ranks_of_nodes(self.places)
        self.nodes = tuple(map(len, on_nodes))
        self._look_after()
        named = self.spec.interface is not None
        addresses = [LOOPBACK if len(on_nodes) == 1 and not named else place["address"] for place in self.places]
        timeout_s = self.spec.collective_timeout_s
        port = self._get([self._actors[0].serve.remote(addresses[0], timeout_s)], "serve", timeout_s)[0]
        given = addresses[0], port, self.nodes, timeout_s
        joining = [
            actor.join.remote(rank, own, named, *given)
            for rank, (actor, own) in enumerate(zip(self._actors, addresses, strict=True))
        ]
        self._get(joining, "join", self.spec.start_timeout_s + timeout_s)

    def _look_after(self) -> None:
        """The records of ranks on this node can be read. Those of others have heartbeats and their node, and a process
        here may have the same number as one of theirs."""
        own = ray.get_runtime_context().get_node_id()
        for rank, place in enumerate(self.places):
            if place["node"] == own:
                with suppress(OSError):
                    self._peers[rank] = Peer(rank, place["pid"], place["pulse"])
        self._other_nodes = OtherNodes(self.places, self.spec.silence_timeout_s)

    def _check_cluster(self, suspicious: bool = False) -> None:
        """Raise ClusterLost where the cluster is gone, RankFailure where a node with ranks is."""
        self._watch_cluster.check(self._beats[0][0], suspicious)
        if self._other_nodes is not None:
            self._other_nodes.check(self._beats, suspicious)

    def _patiently(self, wait: Callable[[float], Any], timeout_s: float, what: str) -> Any:
        """`wait(seconds)` again and again until it finds something or time is up; raises ClusterLost in between."""
        begin = time.monotonic()
        deadline = begin + timeout_s
        while True:
            remaining = deadline - time.monotonic()
            if (found := wait(max(0.0, min(1.0, remaining)))) or remaining <= 0:
                return found
            self._watch_cluster.check("starting ranks")
            if self._other_nodes is not None:
                self._other_nodes.check(self._beats)
            self._shown(f"waiting for {what}, {time.monotonic() - begin:.0f} of {timeout_s:.0f} s")

    def _ask(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        """Call a method on all ranks and wait for all."""
        futures = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        return self._get(futures, method, timeout_s)

    def _get(self, futures: Sequence[Any], op: str, timeout_s: float) -> list[Any]:
        pending = list(futures)

        stopped_at: dict[int, float] = {}

        def one(seconds: float) -> bool:
            nonlocal pending
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=seconds)
            self._raise_first_failure(done, futures)
            self._raise_stopped(op, stopped_at)
            return not pending

        if not self._patiently(one, timeout_s, f"{self.world} ranks ({op})"):
            rank = next(rank for rank, future in enumerate(futures) if future in pending)
            raise RankFailure(rank, f"starting ({op})", -1, f"no answer within {timeout_s:g} s")
        results: list[Any] = ray.get(list(futures))
        return results

    def _raise_stopped(self, op: str, stopped_at: dict[int, float]) -> None:
        """Where no heartbeats are asked for. `stopped_at`: when a rank was first seen so."""
        now = time.monotonic()
        for peer in filter(None, self._peers):
            if not (sight := peer.sight()).stopped or sight.traced:
                stopped_at.pop(peer.rank, None)
            elif now - stopped_at.setdefault(peer.rank, now) > STOPPED_S:
                raise RankFailure(peer.rank, f"starting ({op})", sight.sequence, STOPPED)

    def describe(self) -> Sequence[str]:
        several = len(self.nodes) > 1
        return [
            f"rank {rank}: {place['device']} {place['gpu'] or ''} pid {place['pid']}".replace("  ", " ")
            + (f" on {place['address']}" if several else "")
            for rank, place in enumerate(self.places)
        ]

    def run(self, function: RankFunction, *arguments: Any, timeout_s: float, shown: Callable[[str], None]) -> list[Any]:
        """See Group.run. On any failure the other ranks are freed and the whole group is given up."""
        if not self._actors:
            raise RankFailure(-1, "run", -1, "this group is closed, by itself after a failure: start another")
        try:
            futures = [actor.run.remote(function, arguments) for actor in self._actors]
            self._watch(futures, timeout_s, shown)
            return heard(unpacked(self._get(futures, "run", timeout_s), self._beats[0][0]))
        except BaseException as error:
            said_before(error)
            self._settle(error)
            failed_groups.failed(error)
            raise

    def prepare(self, function: RankFunction, *arguments: Any, timeout_s: float, shown: Callable[[str], None]) -> None:
        """As `run`, and again on the new ranks after each `recover`, in the order of these calls: what makes the state
        that later calls need, such as weights, layers and CUDA graphs in `context.memo`."""
        self.run(function, *arguments, timeout_s=timeout_s, shown=shown)
        self._prepared.append((function, arguments, timeout_s))

    def recover(self, shown: Callable[[str], None] | None = None) -> None:
        """Replace all ranks by new processes, in a new placement group and a new process group, and prepare them as the
        ones before were. What `run` gave before it gives again, bit by bit where the backend is deterministic; what a
        rank has kept since it was prepared is gone. Nothing of the old ranks is left when the new ones start.

        Takes `ray.start_timeout_s`, `ray.collective_timeout_s` and the time of each `prepare` at most. Raises
        ClusterLost where that is how the group ended, RankFailure where an old rank does not end, or a new one fails,
        ResourceError where the cluster has no place for the group any more. It may be called again after each."""
        if self._lost is not None:
            raise self._lost
        self.close()
        self._start()
        for function, arguments, timeout_s in self._prepared:
            self.run(function, *arguments, timeout_s=timeout_s, shown=shown or self._shown)

    def _watch(self, futures: list[Any], timeout_s: float, shown: Callable[[str], None]) -> None:
        """Return when all are done; raise when one fails, falls silent or time is up, or the cluster goes."""
        deadline = time.monotonic() + timeout_s
        self._heard = [time.monotonic()] * self.world
        beats: dict[Any, int] = {}
        pending, suspected = list(futures), None
        while pending:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=LOOK_EVERY_S)
            self._check_cluster()
            self._raise_first_failure(done, futures)
            self._listen(beats, patient=bool(pending))
            shown(self._beats[0][0])
            sights = self._sights(futures, pending)
            if (silent := silence(sights, self.spec.silence_timeout_s)) is not None:
                raise silent
            if pending and time.monotonic() > deadline:
                raise overdue(sights, timeout_s)
            if (late := stalled(sights)) is not None:
                raise late
            left = left_early(sights)
            if left is None:
                suspected = None
            elif suspected is None:
                suspected = time.monotonic()
            elif time.monotonic() - suspected > BEAT_EVERY_S:  # nobody is still on the way
                raise left

    def _listen(self, beats: dict[Any, int], patient: bool) -> None:
        """Ask each rank that has no question open for its heartbeat, once a second, and take the answers."""
        if time.monotonic() - self._asked_at > BEAT_EVERY_S:
            asked, self._asked_at = set(beats.values()), time.monotonic()
            beats |= {self._actors[r].beat.remote(): r for r in range(self.world) if r not in asked}
        if not beats:
            return
        answered, _ = ray.wait(list(beats), num_returns=len(beats), timeout=0.2 if patient else 0)
        for beat in answered:
            rank = beats.pop(beat)
            with suppress(RayError):  # its own future reports the death
                self._beats[rank] = ray.get(beat)
                self._heard[rank] = time.monotonic()

    def _sights(self, futures: Sequence[Any], pending: Sequence[Any]) -> list[Sight]:
        now, found = time.monotonic(), []
        for rank in range(self.world):
            finished, silent_s = futures[rank] not in pending, now - self._heard[rank]
            if (peer := self._peers[rank]) is not None:
                found.append(replace(peer.sight(finished), silent_s=silent_s))
            else:
                doing, since, sequence = self._beats[rank]
                found.append(Sight(rank, doing, "", sequence, silent_s, since, finished))
        return found

    def _raise_first_failure(self, done: Sequence[Any], futures: Sequence[Any]) -> None:
        """Wait briefly after a failure: a dead rank makes others fail too, and the first cause is what counts."""
        if not (found := [future for future in done if _failure(future)]):
            return
        for future in found:  # what is no echo needs no comparison
            error = _failure(future)
            if isinstance(error, RayTaskError) and not is_echo(own := self._raised(futures.index(future), error)):
                raise own
        settled, pending = ray.wait(list(futures), num_returns=len(futures), timeout=GRACE_S)
        failures = {futures.index(future): error for future in settled if (error := _failure(future))}
        died = {rank: error for rank, error in failures.items() if not isinstance(error, RayTaskError)}
        raised = {rank: self._raised(rank, error) for rank, error in failures.items() if rank not in died}
        for error in raised.values():
            if not is_echo(error):
                raise error
        if self._other_nodes is not None:
            self._other_nodes.check(self._beats, suspicious=True)
        if died:
            self._watch_cluster.check(self._beats[0][0], suspicious=True)
            raise self._death(*min(died.items()))
        if len(futures) < self.world:  # a question to one rank alone
            raise next(iter(raised.values()))
        echoes = [error for error in raised.values() if isinstance(error, RankFailure)]
        raise blamed(
            echoes, self._sights(futures, [f for f in futures if f in pending or futures.index(f) in failures])
        )

    def _raised(self, rank: int, error: Exception) -> MoeDistError:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, MoeDistError):
            return cause
        (doing, _, sequence), peer = self._beats[rank], self._peers[rank]
        if peer is not None:
            sight = peer.sight()
            doing, sequence = sight.doing, sight.sequence
        failure = RankFailure(rank, doing, sequence, said_by(cause))
        failure.own = True  # type: ignore[attr-defined]
        return failure

    def _death(self, rank: int, error: Exception) -> RankFailure:
        """A rank's end as its record, its process and its log tell it."""
        (doing, _, sequence), peer, place = self._beats[rank], self._peers[rank], getattr(self, "places", None)
        how = "its process died"
        if peer is not None:
            sight = peer.sight()
            doing, sequence, how = sight.doing, sight.sequence, sight.ended or how
            how += f", in {sight.op}" if sight.op else ""
        if isinstance(error, OutOfMemoryError):
            how += f", ended by Ray because the node ran out of memory: {str(error).strip().splitlines()[0]}"
        elif peer is None:
            how += f": {_detail(error)}"
        return RankFailure(rank, doing, sequence, how + said_last(place and place[rank]["log"]))

    def _settle(self, error: BaseException) -> None:
        """After a failure: free the ranks that still wait, and give the group up."""
        if isinstance(error, ClusterLost):
            self._lost = error
            self._watch_cluster.close()
        else:
            futures = [
                actor.abort.remote() for actor, peer in zip(self._actors, self._peers, strict=False) if _answers(peer)
            ]
            if futures:
                ray.wait(futures, num_returns=len(futures), timeout=FREE_S)
            with suppress(RankFailure):  # what it says is no cause of `error`; `recover` finds it again
                self.close()
        self._actors, self._bundles = [], None  # of a lost cluster nothing can be given back

    def close(self) -> None:
        """End the actors and give their place back. May be called twice. Raises RankFailure where the process of a rank
        of this machine does not end."""
        self._watch_cluster.close()
        if self._other_nodes is not None:
            self._other_nodes.close()
        for actor in self._actors:
            ray.kill(actor)
        if self._bundles is not None:
            remove_placement_group(self._bundles)
        self._actors, self._bundles = [], None
        left = ended(peer for peer in self._peers if peer is not None)
        for rank, peer in enumerate(self._peers):
            if peer is not None and rank not in left:  # those that are left are ended at the next call
                peer.close()
                self._peers[rank] = None
        if left:
            raise RankFailure(left[0], "ending", -1, "its process is still there after SIGKILL")


def _answers(peer: Peer | None) -> bool:
    """Whether a rank may still do what it is asked for; of another machine's nobody knows."""
    if peer is None:
        return True
    sight = peer.sight()
    return sight.ended is None and not sight.stopped


def _failure(future: Any) -> Exception | None:
    try:
        ray.get(future, timeout=0)
    except GetTimeoutError:
        return None
    except RayError as error:  # raised, died, killed for memory, lost
        return error
    return None


def _detail(error: Exception) -> str:
    """Ray's own words for a worker's end, without the advice around them."""
    text = " ".join(str(error).split())
    return text.rpartition("Worker exit detail: ")[2].partition(" Some common causes")[0][:300] or type(error).__name__
