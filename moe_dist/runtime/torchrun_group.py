"""The same ranks without Ray: every process that torchrun started runs this same program, one is each rank.

Nobody stands outside and watches, so the ranks watch each other: a thread in each looks at the others' records once a
second. When one has failed, stopped or left, or time is up, it notes that failure and breaks the process group under
its own main thread, which then raises what was noted instead of waiting for who will not come.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from itertools import groupby
from types import FrameType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from moe_dist.comm import Comm
from moe_dist.comm.network import LOOPBACK, use_network_of
from moe_dist.errors import ConfigError, MoeDistError, RankFailure
from moe_dist.exits.interrupted import is_signal
from moe_dist.machine.interfaces import address_towards
from moe_dist.messages.counts import count_of
from moe_dist.messages.notices import collecting
from moe_dist.runtime import failed_groups, voice
from moe_dist.runtime.blame import (
    as_failure,
    blamed,
    is_echo,
    left_early,
    log_failure,
    overdue,
    packed,
    said_by,
    silence,
    stalled,
    unpacked,
)
from moe_dist.runtime.context import RankContext, RankFunction, limit_threads
from moe_dist.runtime.heard import heard, said_before
from moe_dist.runtime.pulse import Peer, Sight, ranks_here, stopped
from moe_dist.runtime.sockets import break_sockets, open_sockets

LOOK_EVERY_S = 1.0
GRACE_S = 2.5  # after a collective broke: time to learn from the others what broke it
RETURNED, FAILED = "gathering results", "failed"  # in place of a collective's name in a rank's record
SPEAKS = "failed and speaks for all"
TOLD = (FAILED, SPEAKS)


class TorchrunGroup:
    """`run` is collective: each process works its own part and gets everybody's results."""

    runtime = "torchrun"

    def __init__(
        self, world: int, device: str = "cpu", timeout_s: float = 60.0, silence_timeout_s: float = 30.0
    ) -> None:
        self.rank, launched, local_rank, local_world = voice.launched()
        if launched != world:
            raise ConfigError(
                "world", world, f"torchrun started {count_of(launched, 'process', 'processes')}", (launched,)
            )
        self.world = world
        voice.together(True)
        place = torch.device("cpu")
        if device == "cuda":
            place = torch.device("cuda", local_rank)
            torch.cuda.set_device(place)
        limit_threads(local_world)
        master = os.environ["MASTER_ADDR"]
        use_network_of(LOOPBACK if local_world == world else address_towards(master))
        shared = self._reach_store(timeout_s)
        self._store = PrefixStore("moe_dist", shared)
        self._store.set(f"host{self.rank}", socket.gethostname())
        before = open_sockets()
        self.context = RankContext(self._join(shared, place, timeout_s), "torchrun")
        hosts = [self._store.get(f"host{rank}") for rank in range(world)]
        self.nodes = self.context.comm.nodes = tuple(len(list(ranks)) for _, ranks in groupby(hosts))
        try:  # the end of a rank that nobody sees yet could not be told from anything else
            # Of all ranks. Since torch 2.14 the type says that this one might not be in it.
            made = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            self._results: dist.ProcessGroup | None = cast(dist.ProcessGroup, made)
            self._watcher = _Watcher(self.context, self._store, silence_timeout_s, open_sockets() - before)
            dist.barrier(group=self._results)
        except Exception as error:
            raise (voice.death() or RankFailure(self.rank, "starting", 0, said_by(error))) from error

    def _reach_store(self, timeout_s: float) -> Store:
        try:
            store: Store = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))[0]
        except Exception as error:
            raise RankFailure(0, "starting", 0, f"its store does not answer: {said_by(error)}") from error
        return store

    def _join(self, shared: Store, device: torch.device, timeout_s: float) -> Comm:
        """Form the process group; when that fails, name who has not even come."""
        try:
            return Comm.join(self.rank, self.world, shared, device, timeout_s)
        except RankFailure as failure:
            missing = [rank for rank in range(self.world) if not self._store.check([f"host{rank}"])]
            if not missing:
                raise
            voice.mute(missing)
            for pid in (pid for rank, pids in ranks_here().items() if rank in missing for pid in pids):
                if stopped(pid):  # it would hold torchrun up for half a minute
                    atexit.register(_kill, pid)
            waited = f"did not come within {timeout_s:g} s; rank {self.rank} waited in {failure.op}"
            raise RankFailure(missing[0], "starting", 0, waited) from failure

    def run(self, function: RankFunction, *arguments: Any, timeout_s: float, shown: Callable[[str], None]) -> list[Any]:
        """See Group.run. A rank's exception is raised on every rank."""
        self.context.progress(getattr(function, "__name__", "run"))
        with self._watcher.watching(timeout_s):
            said: list[str] = []
            try:
                with torch.inference_mode(), collecting(self.context.watched_by, warned=True) as said:
                    outcome = function(self.context, *arguments)
                return heard(self._gather(outcome, said))
            except BaseException as error:
                if is_signal(error):
                    raise
                settled = self._watcher.settled(as_failure(error, self.context, said=said))
                said_before(settled)
                failed_groups.failed(settled)
                raise settled from error

    def _gather(self, outcome: Any, said: Sequence[str]) -> list[tuple[Any, tuple[str, ...]]]:
        sequence, result = self.context.comm.sequence, packed(outcome, self.context, said=said)
        self.context.pulse.note(RETURNED, sequence)
        results: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(results, result, group=self._results)
        except Exception as error:
            raise RankFailure(self.rank, RETURNED, sequence, said_by(error)) from error
        self.context.pulse.note("", sequence)
        return unpacked(results, self.context.status)

    def describe(self) -> Sequence[str]:
        return [f"rank {rank}: {self.context.device.type}" for rank in range(self.world)]

    def close(self) -> None:
        self._watcher.close()
        self._results = None  # an object of it, held until the process exits, can abort gloo
        self.context.comm.leave()


class _Watcher:
    """Looks after the other ranks of this machine while `watching`. Ranks of other machines are out of its sight: of
    them only a broken or timed-out collective tells."""

    def __init__(self, context: RankContext, store: Store, silence_timeout_s: float, sockets: set[str]) -> None:
        self._context, self._store, self._silence_s, self._sockets = context, store, silence_timeout_s, sockets
        here = json.dumps([socket.gethostname(), os.getpid(), context.pulse.fd])
        store.set(f"pulse{context.rank}", here)
        self._peers: list[Peer] = []
        self._hosts: list[str] = []
        for rank in range(context.world):
            host, pid, fd = json.loads(store.get(f"pulse{rank}"))
            self._hosts.append(host)
            if host == socket.gethostname():
                with suppress(OSError):
                    self._peers.append(Peer(rank, pid, fd))
        self._deadline, self._timeout_s = float("inf"), float("inf")
        self._noted: MoeDistError | None = None
        self._suspected = self._over = self._settling = self._ending = False
        self._stop = threading.Event()
        self._before = self._take_sigterm()
        threading.Thread(target=self._look_again, name="moe-dist-rank-watch", daemon=True).start()

    def watching(self, timeout_s: float) -> _Watcher:
        self._timeout_s, self._deadline = timeout_s, time.monotonic() + timeout_s
        return self

    def __enter__(self) -> None:
        self._suspected = False

    def __exit__(self, *_: object) -> None:
        self._deadline = float("inf")
        self._context.lift_limit()

    def settled(self, own: MoeDistError) -> MoeDistError:
        """What is to be raised here for `own`: another rank's failure, if that is what broke this rank's collective."""
        failure, self._over, self._settling = own, True, True
        if is_echo(own):
            self._store.set(f"echo{self._context.rank}", pickle.dumps(own).hex())
            failure = self._learned() or blamed(self._echoes(), self._sights())
        else:
            log_failure(own)
        if isinstance(failure, RankFailure):
            failure.locate(self._hosts)
        with suppress(Exception):
            self._store.set(f"failure{self._context.rank}", pickle.dumps(failure).hex())
        self._context.pulse.note(FAILED, self._context.comm.sequence)
        self._mute(failure)
        self._settling = False
        if voice.speaks():
            if self._first_to_speak():
                self._context.pulse.note(SPEAKS, self._context.comm.sequence)
            else:
                voice.mute([self._context.rank])
        if self._ending and not voice.speaks():
            signal.raise_signal(signal.SIGTERM)  # as torchrun wished while it was not known who speaks
        return failure

    def _first_to_speak(self) -> bool:
        """Two ranks may pass each other over at the same moment, each before it has seen what the other notes. So who
        comes first to the store is the one."""
        own = str(self._context.rank)
        with suppress(Exception):
            return bool(self._store.compare_set("speaks", "", own).decode() == own)
        return True

    def _learned(self) -> MoeDistError | None:
        """What another rank's failure was, if that shows within a short time."""
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            if (found := self._noted or self._failed() or self._died()) is not None:
                return found
            time.sleep(0.1)
        return None

    def _echoes(self) -> list[RankFailure]:
        """Every rank's collective that broke, as far as they have said so."""
        keys = [key for rank in range(self._context.world) if self._store.check([key := f"echo{rank}"])]
        return [self._read(key) for key in keys]

    def _read(self, key: str) -> Any:
        return pickle.loads(bytes.fromhex(self._store.get(key).decode()))

    def _mute(self, failure: MoeDistError) -> None:
        """Who can't speak, is passed over: also a rank that is named because it does not come. What heeds no SIGTERM
        would hold torchrun up for half a minute at the end."""
        self._heed()
        for peer in self._peers:
            sight = peer.sight()
            if sight.rank == self._context.rank or sight.op in TOLD:  # that one has spoken for itself
                continue
            named = isinstance(failure, RankFailure) and failure.rank == sight.rank
            if named or sight.ended or sight.stopped or sight.silent_s > self._silence_s:
                voice.mute([sight.rank])
                atexit.register(_end_deaf, peer)

    def _heed(self) -> None:
        """A rank that a higher one speaks for was passed over itself, and is silent from now on."""
        if any(peer.rank > self._context.rank and peer.sight().op == SPEAKS for peer in self._peers):
            voice.mute([self._context.rank])

    def close(self) -> None:
        self._stop.set()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _sights(self) -> list[Sight]:
        sights = [peer.sight() for peer in self._peers]
        return [
            replace(sight, op="", finished=sight.op == RETURNED) if sight.op in (RETURNED, *TOLD) else sight
            for sight in sights
        ]

    def _look_again(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            self._context.pulse.beat()
            if self._deadline == float("inf") or self._noted is not None:
                continue
            found = self._failure()
            if found is not None and not self._stop.is_set():
                self._noted = found
                self._mute(found)
                self._free_main_thread()

    def _free_main_thread(self) -> None:
        """End the collective that it may be in."""
        break_sockets(self._sockets)
        if self._context.device.type == "cuda":
            with suppress(Exception):
                self._context.comm.leave()

    def _failed(self) -> MoeDistError | None:
        """The failure of a rank that has told it."""
        for peer in self._peers:
            if peer.rank != self._context.rank and peer.sight().op in TOLD:
                with suppress(Exception):
                    failure: MoeDistError = self._read(f"failure{peer.rank}")
                    return failure
        return None

    def _died(self) -> MoeDistError | None:
        """The failure of a rank whose process ended before it could tell anything."""
        for peer in self._peers:
            sight = peer.sight()
            if sight.ended and sight.rank != self._context.rank and sight.op not in TOLD:
                return _death(sight)
        return None

    def _failure(self) -> MoeDistError | None:
        if (told := self._failed() or self._died()) is not None:
            return told
        sights = self._sights()
        # One that has returned still has its result to give, so its silence counts too; this one's own does not.
        heard = [
            replace(sight, finished=False, silent_s=sight.silent_s * (sight.rank != self._context.rank))
            for sight in sights
        ]
        if (quiet := silence(heard, self._silence_s)) is not None:
            return quiet
        if (late := stalled(sights)) is not None:
            return late
        if time.monotonic() > self._deadline:
            return overdue(sights, self._timeout_s)
        left, before = left_early(sights), self._suspected
        self._suspected = left is not None
        return left if before else None

    def _take_sigterm(self) -> Any:
        """torchrun sends SIGTERM to all as soon as one has ended: who speaks then tells which one that was, and how."""
        if threading.current_thread() is not threading.main_thread():
            return None
        before = signal.getsignal(signal.SIGTERM)

        def ended(number: int, frame: FrameType | None) -> None:
            if self._settling:  # who speaks is not settled yet
                self._ending = True
                return
            if self._over and voice.speaks():
                return  # this process is about to say what happened, and ends by itself
            self._heed()
            if not self._over and (death := self._died()) is not None:
                self._over = True
                self._mute(death)
                raise death
            if callable(before):
                before(number, frame)
            else:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.raise_signal(signal.SIGTERM)

        signal.signal(signal.SIGTERM, ended)
        return before


def _death(sight: Sight) -> RankFailure:
    where = f", in {sight.op}" if sight.op else ""
    failure = RankFailure(sight.rank, sight.doing, sight.sequence, f"{sight.ended}{where}")
    failure.own = True  # type: ignore[attr-defined]
    return failure


def _end_deaf(peer: Peer) -> None:
    """End a rank whose main thread won't hear of SIGTERM: it is stopped, or in code that lets no other thread run."""
    sight = peer.sight()
    if sight.stopped or (sight.ended is None and sight.silent_s > 2 * LOOK_EVERY_S):
        peer.kill()


def _kill(pid: int) -> None:
    if stopped(pid):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
