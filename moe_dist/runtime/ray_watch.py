"""What the driver sees of a group of Ray actors: their answers, their records, their heartbeats. From these it tells
which rank has failed first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError, RayTaskError

from moe_dist.errors import MoeDistError, RankFailure
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
)
from moe_dist.runtime.cluster import Watch
from moe_dist.runtime.logs import said_last
from moe_dist.runtime.other_nodes import OtherNodes
from moe_dist.runtime.pulse import Peer, Sight

BEAT_EVERY_S = 1.0  # a rank that computes answers each of them
LOOK_EVERY_S = 0.25  # at the records, which takes nothing from a rank
GRACE_S = 2.0  # after a first failure: time for the others to show theirs, so that the cause is named, not an echo


class Lookout:
    """`actors` is the group's own list, in the order of ranks. `places`: what each said of its place; `peers`: the
    records of those on this node, and None for others, of which `beats` alone tell: status, its seconds, sequence
    number."""

    def __init__(self, world: int, actors: list[Any], cluster: Watch, silence_timeout_s: float) -> None:
        self.world, self._actors, self._cluster, self._silence_s = world, actors, cluster, silence_timeout_s
        self.places: list[dict[str, Any]] = []
        self.peers: list[Peer | None] = [None] * world
        self.beats: list[tuple[str, float, int]] = [("starting", 0.0, 0)] * world
        self._heard = [time.monotonic()] * world
        self._asked_at = 0.0
        self._other_nodes: OtherNodes | None = None

    def meet(self, places: list[dict[str, Any]]) -> None:
        """The records of ranks on this node can be read. Those of others have heartbeats and their node, and a process
        here may have the same number as one of theirs."""
        self.places = places
        own = ray.get_runtime_context().get_node_id()
        for rank, place in enumerate(places):
            if place["node"] == own:
                with suppress(OSError):
                    self.peers[rank] = Peer(rank, place["pid"], place["pulse"])
        self._other_nodes = OtherNodes(places, self._silence_s)

    def check_cluster(self, doing: str, suspicious: bool = False) -> None:
        """Raise ClusterLost where the cluster is gone, RankFailure where a node with ranks is."""
        self._cluster.check(doing, suspicious)
        if self._other_nodes is not None:
            self._other_nodes.check(self.beats, suspicious)

    def close(self) -> None:
        """Watch no longer."""
        self._cluster.close()
        if self._other_nodes is not None:
            self._other_nodes.close()

    def answer(self) -> list[Any]:
        """The actors that may still do what they are asked for; of another machine's nobody knows."""
        return [actor for actor, peer in zip(self._actors, self.peers, strict=False) if _answers(peer)]

    def watch(self, futures: list[Any], timeout_s: float, shown: Callable[[str], None]) -> None:
        """Return when all are done; raise when one fails, falls silent or time is up, or the cluster goes."""
        deadline = time.monotonic() + timeout_s
        self._heard = [time.monotonic()] * self.world
        beats: dict[Any, int] = {}
        pending, suspected = list(futures), None
        while pending:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=LOOK_EVERY_S)
            self.check_cluster(self.beats[0][0])
            self.raise_first_failure(done, futures)
            self._listen(beats, patient=bool(pending))
            shown(self.beats[0][0])
            sights = self._sights(futures, pending)
            if (silent := silence(sights, self._silence_s)) is not None:
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
                self.beats[rank] = ray.get(beat)
                self._heard[rank] = time.monotonic()

    def _sights(self, futures: Sequence[Any], pending: Sequence[Any]) -> list[Sight]:
        now, found = time.monotonic(), []
        for rank in range(self.world):
            finished, silent_s = futures[rank] not in pending, now - self._heard[rank]
            if (peer := self.peers[rank]) is not None:
                found.append(replace(peer.sight(finished), silent_s=silent_s))
            else:
                doing, since, sequence = self.beats[rank]
                found.append(Sight(rank, doing, "", sequence, silent_s, since, finished))
        return found

    def raise_first_failure(self, done: Sequence[Any], futures: Sequence[Any]) -> None:
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
            self._other_nodes.check(self.beats, suspicious=True)
        if died:
            self._cluster.check(self.beats[0][0], suspicious=True)
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
        (doing, _, sequence), peer = self.beats[rank], self.peers[rank]
        if peer is not None:
            sight = peer.sight()
            doing, sequence = sight.doing, sight.sequence
        failure = RankFailure(rank, doing, sequence, said_by(cause))
        failure.own = True  # type: ignore[attr-defined]
        return failure

    def _death(self, rank: int, error: Exception) -> RankFailure:
        """A rank's end as its record, its process and its log tell it."""
        (doing, _, sequence), peer = self.beats[rank], self.peers[rank]
        how = "its process died"
        if peer is not None:
            sight = peer.sight()
            doing, sequence, how = sight.doing, sight.sequence, sight.ended or how
            how += f", in {sight.op}" if sight.op else ""
        if isinstance(error, OutOfMemoryError):
            how += f", ended by Ray because the node ran out of memory: {str(error).strip().splitlines()[0]}"
        elif peer is None:
            how += f": {_detail(error)}"
        return RankFailure(rank, doing, sequence, how + said_last(self.places[rank]["log"] if self.places else None))

    def raise_stopped(self, op: str, stopped_at: dict[int, float]) -> None:
        """Where no heartbeats are asked for. `stopped_at`: when a rank was first seen so."""
        now = time.monotonic()
        for peer in filter(None, self.peers):
            if not (sight := peer.sight()).stopped or sight.traced:
                stopped_at.pop(peer.rank, None)
            elif now - stopped_at.setdefault(peer.rank, now) > STOPPED_S:
                raise RankFailure(peer.rank, f"starting ({op})", sight.sequence, STOPPED)


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
