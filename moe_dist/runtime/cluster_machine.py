"""What the nodes of a running Ray cluster have. Plans are for the machines of the ranks, and the driver's may be
another one, such as a head node without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moe_dist.errors import ConfigError, MoeDistError, ResourceError
from moe_dist.machine.machine import Machine
from moe_dist.machine.nodes import Nodes
from moe_dist.runtime.cluster import connect, first_line
from moe_dist.runtime.context import RaySpec
from moe_dist.runtime.own_actors import ALL_GPUS_VISIBLE
from moe_dist.runtime.ray_places import bundle_of, room_of

HINT = "Take device auto or cpu, or join a cluster with GPUs."


def cluster_machine(spec: RaySpec, device: str, detect: Callable[[], Machine] | None = None) -> Machine | None:
    """The machine of ranks on `device` (auto, cpu or cuda) of the cluster that `spec` or RAY_ADDRESS names; None where
    none is named. `detect`: what a node with GPUs is asked for its machine with.

    Joins the cluster. Raises as `connect`; ResourceError for cuda without a GPU in it and for a node that gives no
    answer within `spec.start_timeout_s`, ConfigError for nodes with different GPUs.
    """
    if (spec.address or os.environ.get("RAY_ADDRESS") or "local") == "local":
        return None
    connect(spec)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    with_gpus = [node for node in nodes if room_of(node["Resources"], bundle_of("cuda", spec))]
    if device == "cuda" and not with_gpus:
        raise ResourceError("GPUs in the Ray cluster", 1, 0, HINT)
    if device == "cpu" or not with_gpus:
        return replace(Machine.detect("cpu"), nodes=_nodes(nodes, "cpu", spec))
    there = _alike(_asked(with_gpus, detect or seen_there, spec.start_timeout_s))
    here = Machine.detect()
    found = _nodes(with_gpus, "cuda", spec)
    count = max(found.room) if spec.strategy == "STRICT_PACK" else sum(found.room)
    elsewhere = (here.device_name, here.capability) != (there.device_name, there.capability)
    return replace(there, devices=count, elsewhere=elsewhere, nodes=found)


def seen_there() -> Machine:
    """Asked on a node with GPUs."""
    return Machine.detect("cuda")


def _nodes(nodes: Sequence[dict[str, Any]], device: str, spec: RaySpec) -> Nodes:
    bundle = bundle_of(device, spec)
    rooms = (room_of(node["Resources"], bundle) for node in nodes)
    return Nodes(tuple(room for room in rooms if room), spec.strategy)


def _asked(nodes: Sequence[dict[str, Any]], detect: Callable[[], Machine], timeout_s: float) -> dict[str, Machine]:
    """What each node answers, by its address. It takes none of the node's GPUs, which may all be busy, and its process
    ends with the answer, because it has held some of their memory."""
    remote = ray.remote(num_cpus=0, max_calls=1, max_retries=0, runtime_env=ALL_GPUS_VISIBLE)(detect)
    futures = {
        node["NodeManagerAddress"]: remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in nodes
    }
    ray.wait(list(futures.values()), num_returns=len(futures), timeout=timeout_s)
    return {address: _answer(address, future, timeout_s) for address, future in futures.items()}


def _answer(address: str, future: Any, timeout_s: float) -> Machine:
    try:
        found: Machine = ray.get(future, timeout=0)
        return found
    except GetTimeoutError:
        why = f"no answer within {timeout_s:g} s (ray.start_timeout_s)"
    except RayTaskError as error:
        if not isinstance(error.cause, MoeDistError):
            raise
        why = str(error.cause)
    except RayError as error:
        why = first_line(error)
    raise ResourceError(f"GPUs on node {address}", "what its GPUs are", why, HINT)


def _alike(machines: dict[str, Machine]) -> Machine:
    """One for all of them, with the least memory of any."""
    first = next(iter(machines.values()))
    if len({(each.name, each.capability) for each in machines.values()}) > 1:
        told = ", ".join(f"{address} has {each.name}" for address, each in machines.items())
        rule = f"its nodes have different GPUs ({told}), and a plan is for one kind"
        raise ConfigError("ray.address", ray.get_runtime_context().gcs_address, rule, "a cluster with GPUs of one kind")
    return replace(first, memory=min(each.memory or 0 for each in machines.values()))
