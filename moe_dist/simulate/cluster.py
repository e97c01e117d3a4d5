"""Machines that are not here: hosts of GPUs joined by NVLink, and a network between them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moe_dist.errors import ConfigError
from moe_dist.machine.machine import GPUS, GPUS_OF_A_HOST, HOPPER, Machine
from moe_dist.simulate.cost import Link

MOST_GPUS = 64
RINGS = ("ag_rs", "all_reduce")  # exchanges of NCCL's ring collectives; the others send pairwise
CROSSINGS = 2  # of a step: to the experts and back
FORM = f"h200xGPUS of one host, or NODESxh200xGPUS; up to {GPUS_OF_A_HOST} GPUs a host, 2 to {MOST_GPUS} in all"


@dataclass(frozen=True)
class Network:
    """Between hosts: GB/s that each GPU's adapter carries one way, and µs that a collective takes longer for crossing
    it."""

    gbps: float
    latency_us: float


@dataclass(frozen=True)
class Cluster:
    """`gpu`: a key of machine.GPUS. `network` is None on one host."""

    gpu: str
    nodes: int
    per_node: int
    network: Network | None = None

    @classmethod
    def named(cls, text: str, network: Network | None) -> Cluster:
        """`h200x8` is one host with eight, `4xh200x8` four such hosts. Raises ConfigError for what is none, for hosts
        without a network between them, and for a network of one host."""
        form = re.fullmatch(r"(?:([1-9][0-9]?)x)?([a-z][a-z0-9]*)x([1-9][0-9]?)", text.lower())
        nodes, gpu, per_node = (int(form[1] or 1), form[2], int(form[3])) if form else (0, "", 0)
        if gpu not in GPUS or per_node > GPUS_OF_A_HOST or not 2 <= nodes * per_node <= MOST_GPUS:
            raise ConfigError("machine", text, "is no machine that can be simulated", FORM)
        if (network is None) == (nodes > 1):
            rule = "has hosts and no network between them" if nodes > 1 else "is one host, and a network is given"
            legal = "--network-gbps and --network-us with several hosts, neither with one"
            raise ConfigError("machine", text, rule, legal)
        return cls(gpu, nodes, per_node, network)

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    @property
    def machine(self) -> Machine:
        """For plans."""
        name, gib = GPUS[self.gpu]
        return Machine("cuda", self.world, name, HOPPER, gib << 30, elsewhere=True)

    @property
    def text(self) -> str:
        hosts = "" if self.nodes == 1 else f"{self.nodes} hosts of "
        return f"{hosts}{self.per_node} × {GPUS[self.gpu][0]}"

    def exchange_us(self, exchange: str, link: Link, sent_bytes: float) -> float:
        """NVLink and network carry their bytes at the same time, and the slower one counts. A pairwise exchange sends
        the network what goes to other hosts: (world - GPUs a host) / (world - 1) of all. A ring collective passes each
        byte once from host to host, spread over the adapters of a host: a GPU's share of what it sends (as NCCL's tests
        count bus bandwidth, github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md)."""
        inside = link.byte_us * sent_bytes
        if self.network is None:
            return link.latency_us + inside
        pairwise = (self.world - self.per_node) / (self.world - 1)
        outside = sent_bytes * (1 / self.per_node if exchange in RINGS else pairwise) / (1e3 * self.network.gbps)
        return link.latency_us + CROSSINGS * self.network.latency_us + max(inside, outside)
