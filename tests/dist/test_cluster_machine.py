"""Plans for the machines of a cluster's nodes, from a driver without a GPU. Ray is told that this machine has four."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray
from private_ray import private_ray

from moe_dist.commands import cli
from moe_dist.errors import ConfigError, ResourceError
from moe_dist.machine.machine import Machine
from moe_dist.machine.nodes import Nodes
from moe_dist.runtime import cluster_machine
from moe_dist.runtime.context import RaySpec

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # tasks can't import test modules


def h200() -> Machine:
    """What a node with four of them would answer."""
    return Machine.named("h200x4")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with private_ray(num_cpus=1, num_gpus=4):
        yield ray.get_runtime_context().gcs_address


def found(address: str, device: str = "auto", **spec: Any) -> Machine | None:
    return cluster_machine.cluster_machine(RaySpec(address=address, **spec), device, h200)


def test_the_machine_is_that_of_the_nodes(address: str) -> None:
    assert found(address) == replace(h200(), elsewhere=True, nodes=Nodes((4,), "STRICT_PACK"))
    assert found(address, "cuda", strategy="PACK", cpus_per_rank=0.5) == replace(
        h200(), devices=2, elsewhere=True, nodes=Nodes((2,), "PACK")
    )  # its one CPU is enough for two ranks
    assert found(address, "cpu") == replace(Machine.detect("cpu"), nodes=Nodes((4,), "STRICT_PACK"))


def test_without_an_address_ranks_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster_machine.cluster_machine(RaySpec(), "auto", h200) is None
    assert cluster_machine.cluster_machine(RaySpec(address="local"), "auto", h200) is None


def test_a_node_that_can_not_say_what_its_gpus_are_is_named(address: str) -> None:
    """Really asked: torch finds none there."""
    node = ray.nodes()[0]["NodeManagerAddress"]
    with pytest.raises(ResourceError, match=f"not enough GPUs on node {node}: .* CUDA devices: 1 needed, 0 available"):
        cluster_machine.cluster_machine(RaySpec(address=address), "auto")


def test_no_gpu_in_the_cluster(address: str) -> None:
    with pytest.raises(ResourceError, match="GPUs in the Ray cluster: 1 needed, 0 available"):
        found(address, "cuda", cpus_per_rank=2)  # of which no node can take one rank


def test_nodes_with_different_gpus_are_refused(address: str) -> None:
    machines = {"10.0.0.1": h200(), "10.0.0.2": Machine.named("h100x8")}
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1 has NVIDIA H200, 10\.0\.0\.2 has NVIDIA H100"):
        cluster_machine._alike(machines)
    less = replace(h200(), memory=1 << 30)
    assert cluster_machine._alike({"10.0.0.1": h200(), "10.0.0.2": less}).memory == 1 << 30


def test_plan_goes_by_the_cluster(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The backend that nobody names, the model, what fits: all as on such GPUs."""
    monkeypatch.setattr(cluster_machine, "seen_there", h200)
    code = cli.main(["plan", "--ep", "4", "--exchange", "nvlink", f"ray.address={address}", "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    made = json.loads(said.out)
    assert made["machine"]["name"] == "NVIDIA H200"
    assert (made["backend"], made["exchange"], made["model"]["name"]) == ("triton", "nvlink", "DeepSeek-V3")
