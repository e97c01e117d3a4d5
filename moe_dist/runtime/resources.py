"""Whether a Ray cluster can hold a group at all, and the end of a group's processes."""

from __future__ import annotations

import time
from collections.abc import Iterable

import ray

from moe_dist.errors import ResourceError
from moe_dist.runtime.context import RaySpec
from moe_dist.runtime.pulse import Peer

LEAVE_S = 0.5  # for ranks that Ray has told to end
KILLED_S = 20.0  # for the kernel to end a process: it gives a large one's memory back first, on a busy machine late


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


def ended(peers: Iterable[Peer], within_s: float) -> list[int]:
    """End these ranks' processes, all of this machine, and return the ranks of those that are still there so long
    later. Ray tells a rank to end in its own time, and never reaches a stopped one."""
    left, deadline = [], time.monotonic() + LEAVE_S
    for peer in peers:
        if peer.sight().stopped or not peer.gone(deadline - time.monotonic()):
            peer.kill()
            left.append(peer)
    deadline = time.monotonic() + within_s
    return [peer.rank for peer in left if not peer.gone(deadline - time.monotonic())]
