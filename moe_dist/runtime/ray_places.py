"""Places for ranks in a Ray cluster: whether there can be enough, and the order of ranks in them."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import ray

from moe_dist.errors import ResourceError
from moe_dist.messages.counts import count_of, verb
from moe_dist.runtime.context import RaySpec

BEHIND = 7  # the versions of IP addresses
WHERE = {
    "STRICT_PACK": "on one node (strategy STRICT_PACK)",
    "PACK": "in the cluster",
    "SPREAD": "in the cluster (strategy SPREAD)",
}


def bundle_of(device: str, spec: RaySpec) -> dict[str, float]:
    """What one rank takes of the cluster."""
    return {"CPU": spec.cpus_per_rank} | ({"GPU": 1} if device == "cuda" else {})


def check_resources(world: int, device: str, spec: RaySpec) -> None:
    """Raise ResourceError at once if the cluster can never hold the group: a placement group would stay pending."""
    bundle = bundle_of(device, spec)
    wanted = {name: count * world for name, count in bundle.items()}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if spec.strategy != "STRICT_PACK":
        if sum(room_of(node, bundle) for node in nodes) >= world:
            return
        nodes = [{name: sum(node.get(name, 0.0) for node in nodes) for name in wanted}]
    short = [[name for name, needed in wanted.items() if node.get(name, 0.0) < needed] for node in nodes]
    if spec.strategy == "STRICT_PACK" and any(not names for names in short):
        return
    best = min(range(len(nodes)), key=lambda node: len(short[node]))
    names = short[best] or list(wanted)  # enough in sum, in pieces that are too small for whole ranks
    needed = ", ".join(f"{wanted[name]:g} {name}" for name in names)
    available = ", ".join(f"{nodes[best].get(name, 0.0):g} {name}" for name in names)
    pieces = "" if short[best] else ", in whole ranks on each node"
    asked = f"{count_of(world, 'rank')} {verb(world, 'ask')} for"
    hint = f"{asked} {needed} {WHERE[spec.strategy]}{pieces}; use fewer ranks or a larger cluster."
    raise ResourceError(f"{' and '.join(f'{name}s' for name in names)} in the Ray cluster", needed, available, hint)


def room_of(resources: dict[str, float], bundle: dict[str, float]) -> int:
    """How many ranks a node can take, from what it has and what one rank takes."""
    return min(int(resources.get(name, 0.0) / count + 1e-6) for name, count in bundle.items())


def in_order(places: Sequence[dict[str, Any]]) -> list[int]:
    """Which of these places each rank gets, as numbers of places: node after node, by their addresses, and on a node by
    the numbers of its GPUs. So a run of ranks, which a TP group is, crosses nodes only where it must."""

    def key(number: int) -> tuple[Any, ...]:
        place = places[number]
        return *_numbered(place["address"]), place["node"], _index(place["device"]), number

    return sorted(range(len(places)), key=key)


def _numbered(address: str) -> tuple[int, int, str]:
    """Addresses as numbers, so that 10.0.0.9 comes before 10.0.0.10; names, which a node may be given, behind them."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return BEHIND, 0, address
    return found.version, int(found), address


def _index(device: str) -> int:
    """Of cuda:3 it is 3; CPUs have none."""
    number = device.partition(":")[2]
    return int(number) if number else 0


def ranks_of_nodes(places: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The ranks of each node. `places`: in the order of ranks."""
    return [list(ranks) for _, ranks in groupby(range(len(places)), key=lambda rank: places[rank]["node"])]
