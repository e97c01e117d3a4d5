"""A process group for Ray actors of a program's own."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError

from moe_dist.comm import Comm, Meeting
from moe_dist.comm.meeting import check_timeout
from moe_dist.comm.network import LOOPBACK
from moe_dist.errors import ConfigError, RankFailure

NOSET = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
HINT = "; it may still wait for a place in the cluster: `ray list actors` shows that"
ALL_GPUS_VISIBLE: dict[str, Any] = {"env_vars": {NOSET: "1"}}


def join_actors(actors: Sequence[Any], *, timeout_s: float = 60.0) -> None:
    """Form one process group of Ray actors and give each the attribute `comm`, its Comm: actor r is rank r. Called by
    the program that holds their handles.

    Actors that share a node stand together in the list: only so can an exchange make use of that (`Comm.nodes`).
    An actor of `num_gpus=1` is on its GPU, which becomes the current one, the others on their CPUs. Exchange nvlink
    needs all GPUs in sight: `runtime_env=ALL_GPUS_VISIBLE`. An actor runs its methods on one thread, as Ray's do unless
    they are asynchronous or have a `max_concurrency`. `timeout_s` bounds each wait here and every collective later.

    Raises ConfigError for what are no actors, for actors of both kinds and for a timeout that can't be; RankFailure for
    an actor that does not answer in time; what Ray raises for an actor that has died.
    """
    check_timeout(timeout_s)
    handles = list(actors)
    for number, actor in enumerate(handles):
        if not isinstance(actor, ray.actor.ActorHandle):
            raise ConfigError(f"actors[{number}]", type(actor).__name__, "is no handle of a Ray actor", "ActorHandle")
    if not handles:
        raise ConfigError("actors", "none", "a group has at least one rank", "handles of Ray actors")
    places = _all(handles, [()] * len(handles), _place, "its place", timeout_s)
    kinds = [kind for kind, _, _ in places]
    if len(set(kinds)) > 1:
        raise ConfigError("actors", ", ".join(kinds), "ranks of one group have one kind of device", "all cuda, all cpu")
    nodes = tuple(len(list(run)) for _, run in groupby(node for _, node, _ in places))
    host, world = LOOPBACK if len(nodes) == 1 else places[0][2], len(handles)
    address = _all(handles[:1], [(world, host, timeout_s)], _open, "the meeting", timeout_s)[0]
    given = [(rank, world, address, nodes, timeout_s) for rank in range(world)]
    _all(handles, given, _join, "joining", 2 * timeout_s)  # it meets, and forms a second group beside NCCL's


def _all(handles: Sequence[Any], given: Sequence[tuple[Any, ...]], function: Any, what: str, timeout_s: float) -> Any:
    """`function(the actor's object, *given)` in each actor."""
    futures = [actor.__ray_call__.remote(function, *each) for actor, each in zip(handles, given, strict=True)]
    deadline, found = time.monotonic() + timeout_s, []
    for rank, future in enumerate(futures):
        try:
            found.append(ray.get(future, timeout=max(0.0, deadline - time.monotonic())))
        except GetTimeoutError:
            raise RankFailure(rank, what, 0, f"its actor did not answer within {timeout_s:g} s{HINT}") from None
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
    return found


def _place(_: Any) -> tuple[str, str, str]:
    """Kind of device, node and address."""
    kind = "cuda" if ray.get_gpu_ids() else "cpu"
    return kind, ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()


def _open(actor: Any, world: int, host: str, timeout_s: float) -> str:
    actor.meeting = Meeting(world, host, timeout_s)  # stays as long as the actor
    return str(actor.meeting.address)


def _join(actor: Any, rank: int, world: int, address: str, nodes: tuple[int, ...], timeout_s: float) -> None:
    actor.comm = Comm.join(rank, world, address, _device(), timeout_s)
    actor.comm.nodes = nodes


def _device() -> torch.device:
    """Of this actor; a GPU becomes the current one."""
    gpus = ray.get_gpu_ids()
    if not gpus:
        return torch.device("cpu")
    device = torch.device("cuda", int(gpus[0]) if os.environ.get(NOSET) == "1" else 0)
    torch.cuda.set_device(device)
    return device
