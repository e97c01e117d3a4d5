"""A group of Ray actors, one a rank, in one placement group; every wait is bounded, and work is watched."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to anyone, unless the user asked for them

import ray
from ray.exceptions import AuthenticationError, GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moe_dist.errors import ConfigError, MoeDistError, RankFailure, ResourceError
from moe_dist.runtime.actor import RankActor
from moe_dist.runtime.context import RankFunction, RaySpec
from moe_dist.runtime.rendezvous import LOOPBACK

BEAT_EVERY_S = 1.0
GRACE_S = 2.0  # after a first failure: time for the others to show theirs, so that the cause is named, not an echo


def connect(spec: RaySpec) -> None:
    """Join a running Ray cluster, or start a private one on this machine that ends with this process."""
    if ray.is_initialized():
        return
    address = spec.address or os.environ.get("RAY_ADDRESS")
    if address:
        _join_cluster(address)
        return
    ray.init(
        address="local",  # without it Ray would join any cluster that `ray start` left a note of on this machine
        include_dashboard=False, object_store_memory=100 << 20, logging_level=logging.ERROR, log_to_driver=False,
        configure_logging=False,
    )  # fmt: skip


def _join_cluster(address: str) -> None:
    legal = "host:port of a running head, or auto"
    host, _, port = address.rpartition(":")
    try:
        if "://" not in address and port.isdigit():
            socket.create_connection((host, int(port)), timeout=5).close()  # Ray itself would try for minutes
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, ValueError, RuntimeError, AuthenticationError) as error:
        raise ConfigError("ray.address", address, f"can't be joined: {str(error).splitlines()[0]}", legal) from error


def check_resources(world: int, device: str, spec: RaySpec) -> None:
    """Raise ResourceError at once if the cluster can never hold the group: a placement group would stay pending."""
    wanted = {"CPU": spec.cpus_per_rank * world}
    if device == "cuda":
        wanted["GPU"] = float(world)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    where = "on one node (strategy STRICT_PACK)"
    if spec.strategy != "STRICT_PACK":
        where = "in the cluster"
        nodes = [{name: sum(node.get(name, 0.0) for node in nodes) for name in wanted}]
    short = [[name for name, needed in wanted.items() if node.get(name, 0.0) < needed] for node in nodes]
    if any(not names for names in short):
        return
    best = min(range(len(nodes)), key=lambda node: len(short[node]))
    needed = ", ".join(f"{wanted[name]:g} {name}" for name in short[best])
    available = ", ".join(f"{nodes[best].get(name, 0.0):g} {name}" for name in short[best])
    names = " and ".join(f"{name}s" for name in short[best])
    hint = f"{world} ranks ask for {needed} {where}; use fewer ranks or a larger cluster."
    raise ResourceError(f"{names} in the Ray cluster", needed, available, hint)


class RayGroup:
    """Ranks as Ray actors. Use as a context manager, or call `close`."""

    runtime = "ray"

    def __init__(self, world: int, device: str = "cpu", spec: RaySpec | None = None) -> None:
        self.world, self.device, self.spec = world, device, spec or RaySpec()
        self._actors: list[Any] = []
        self._bundles: Any = None
        self._beats: list[tuple[str, float, int]] = [("starting", 0.0, 0)] * world
        connect(self.spec)
        check_resources(world, device, self.spec)
        try:
            self._place()
            self._rendezvous()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RayGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _place(self) -> None:
        bundle = {"CPU": self.spec.cpus_per_rank} | ({"GPU": 1} if self.device == "cuda" else {})
        self._bundles = placement_group([bundle] * self.world, strategy=self.spec.strategy)
        if not self._bundles.wait(self.spec.start_timeout_s):
            free = {name: f"{ray.available_resources().get(name, 0):g}" for name in bundle}
            hint = f"{self.world} bundles of {bundle} were not free within {self.spec.start_timeout_s:g} s."
            raise ResourceError("free resources in the Ray cluster", bundle, free, hint)
        environment = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"} if self.device == "cuda" else {}
        remote = ray.remote(RankActor)
        for rank in range(self.world):
            options = remote.options(
                num_cpus=self.spec.cpus_per_rank,
                num_gpus=1 if self.device == "cuda" else 0,
                max_concurrency=2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._bundles, rank),
                runtime_env={"env_vars": environment} if environment else None,
            )
            self._actors.append(options.remote(rank, self.world, self.device))

    def _rendezvous(self) -> None:
        self.places = self._ask("where", timeout_s=self.spec.start_timeout_s)
        one_node = len({place["node"] for place in self.places}) == 1
        host = LOOPBACK if one_node else self.places[0]["address"]
        timeout_s = self.spec.collective_timeout_s
        port = self._get([self._actors[0].serve.remote(host, timeout_s)], "serve", timeout_s)[0]
        here = max(sum(place["node"] == own["node"] for place in self.places) for own in self.places)
        self._ask("join", host, port, here, timeout_s, timeout_s=self.spec.start_timeout_s + timeout_s)

    def _ask(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        """Call a method on all ranks and wait for all."""
        futures = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        return self._get(futures, method, timeout_s)

    def _get(self, futures: Sequence[Any], op: str, timeout_s: float) -> list[Any]:
        try:
            results: list[Any] = ray.get(list(futures), timeout=timeout_s)
            return results
        except GetTimeoutError:
            ready, _ = ray.wait(list(futures), num_returns=len(futures), timeout=0)
            rank = next(rank for rank, future in enumerate(futures) if future not in ready)
            raise RankFailure(rank, op, -1, f"no answer within {timeout_s:g} s") from None
        except RayError as error:
            raise self._named(0 if len(futures) == 1 else None, op, error) from error

    def describe(self) -> Sequence[str]:
        return [
            f"rank {rank}: {place['device']} {place['gpu'] or ''} pid {place['pid']}".replace("  ", " ")
            for rank, place in enumerate(self.places)
        ]

    def run(self, function: RankFunction, *arguments: Any, timeout_s: float, shown: Callable[[str], None]) -> list[Any]:
        """See Group.run. On any failure the other ranks are freed and the whole group is given up."""
        if not self._actors:
            raise RankFailure(-1, "run", -1, "this group is closed, by itself after a failure: start another")
        futures = [actor.run.remote(function, arguments) for actor in self._actors]
        try:
            self._watch(futures, timeout_s, shown)
            return self._get(futures, "run", timeout_s)
        except BaseException:
            self._free_survivors()
            self.close()
            raise

    def _watch(self, futures: list[Any], timeout_s: float, shown: Callable[[str], None]) -> None:
        """Return when all are done; raise when one fails, falls silent or time is up."""
        deadline = time.monotonic() + timeout_s
        heard = [time.monotonic()] * self.world
        beats: dict[Any, int] = {}
        pending = list(futures)
        while pending:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=BEAT_EVERY_S)
            self._raise_first_failure(done, futures)
            asked = set(beats.values())
            beats |= {self._actors[r].beat.remote(): r for r in range(self.world) if r not in asked}
            answered, _ = ray.wait(list(beats), num_returns=len(beats), timeout=0 if not pending else 0.2)
            for beat in answered:
                rank = beats.pop(beat)
                try:
                    self._beats[rank] = ray.get(beat)
                    heard[rank] = time.monotonic()
                except RayError:
                    continue  # its own future reports the death
            shown(self._beats[0][0])
            for rank in (futures.index(future) for future in pending):
                silent = time.monotonic() - heard[rank]
                if silent > self.spec.silence_timeout_s:
                    raise RankFailure(rank, "heartbeat", self._beats[rank][2], f"silent for {silent:.0f} s")
                if time.monotonic() > deadline:
                    status, since, sequence = self._beats[rank]
                    raise RankFailure(
                        rank, status, sequence, f"not done within {timeout_s:g} s, here for {since:.0f} s"
                    )

    def _raise_first_failure(self, done: list[Any], futures: list[Any]) -> None:
        """Wait briefly after a failure: a dead rank makes others fail too, and the first cause is what counts."""
        if not any(_failure(future) for future in done):
            return
        settled, _ = ray.wait(futures, num_returns=len(futures), timeout=GRACE_S)
        failures = [(future, _failure(future)) for future in settled]
        named = [
            self._named(futures.index(future), self._beats[futures.index(future)][0], error)
            for future, error in failures
            if error is not None
        ]
        raise min(named, key=_is_echo)

    def _named(self, rank: int | None, op: str, error: Exception) -> Exception:
        """A Ray error as ours: a rank's own exception as it was, a death as RankFailure."""
        if isinstance(error, RayTaskError):
            cause = error.cause
            if isinstance(cause, MoeDistError):
                return cause
            said = f"{type(cause).__name__}: {cause}"
            return RankFailure(-1 if rank is None else rank, op, self._sequence(rank), said)
        if rank is None:
            dead = getattr(error, "actor_id", None)
            rank = next((r for r, actor in enumerate(self._actors) if actor._actor_id.hex() == dead), -1)
        return RankFailure(rank, op, self._sequence(rank), f"the actor died: {str(error).strip().splitlines()[0]}")

    def _sequence(self, rank: int | None) -> int:
        return -1 if rank is None or rank < 0 else self._beats[rank][2]

    def _free_survivors(self) -> None:
        futures = [actor.abort.remote() for actor in self._actors]
        ray.wait(futures, num_returns=len(futures), timeout=GRACE_S)

    def close(self) -> None:
        """End the actors and give their place back. May be called twice."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._bundles is not None:
            remove_placement_group(self._bundles)
            self._bundles = None


def _failure(future: Any) -> Exception | None:
    try:
        ray.get(future, timeout=0)
    except GetTimeoutError:
        return None
    except RayError as error:  # raised, died, killed for memory, lost
        return error
    return None


def _is_echo(error: Exception) -> int:
    """Rank causes: a rank's own error first, then a death, then a collective that broke because of another rank."""
    if not isinstance(error, RankFailure):
        return 0
    return 1 if "died" in error.cause or error.seq < 0 else 2
