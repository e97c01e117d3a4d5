"""The RayJobs of launch/ hold keys that KubeRay's RayJob has, with values of its types, and run what can run there.

The list of keys is ours, of what these files use, read from KubeRay's types (v1, 1.5): its schema is not in this
repository, and neither a cluster nor its operator has seen these files."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_dist.bench.case import Experiment
from moe_dist.commands.config import override, resolve_models
from moe_dist.engine.plan import Plan
from moe_dist.machine.machine import Machine
from moe_dist.machine.nodes import Nodes

LAUNCH = Path(__file__).parents[2] / "launch"
FILES = ("rayjob.yaml", "rayjob-nodes.yaml")
QUANTITY = re.compile(r"[1-9][0-9]*(Ki|Mi|Gi)?")

QUANTITIES = {"cpu": str, "memory": str, "nvidia.com/gpu": str}
POD: dict[str, Any] = {
    "spec": {
        "containers": [{
            "name": str, "image": str, "env": [{"name": str, "value": str}],
            "ports": [{"containerPort": int, "name": str}],
            "resources": {"requests": QUANTITIES, "limits": QUANTITIES},
            "volumeMounts": [{"name": str, "mountPath": str}],
        }],
        "volumes": [{"name": str, "emptyDir": {"medium": str, "sizeLimit": str}}],
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": str, "labelSelector": {"matchLabels": {"ray.io/group": str}}}
        ]}},
    }
}  # fmt: skip
RAYJOB: dict[str, Any] = {
    "apiVersion": str, "kind": str, "metadata": {"name": str},
    "spec": {
        "entrypoint": str, "backoffLimit": int, "activeDeadlineSeconds": int, "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int, "runtimeEnvYAML": str,
        "rayClusterSpec": {
            "rayVersion": str, "authOptions": {"mode": str},
            "headGroupSpec": {"rayStartParams": {"num-cpus": str}, "template": POD},
            "workerGroupSpecs": [{
                "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "rayStartParams": {},
                "template": POD,
            }],
        },
    },
}  # fmt: skip


def wrong(found: Any, legal: Any, place: str = "") -> list[str]:
    """Where something has a key or a type that the legal shape does not have."""
    if isinstance(legal, dict):
        if not isinstance(found, dict):
            return [f"{place}: is no mapping"]
        unknown = [f"{place}.{key}: unknown" for key in found.keys() - legal.keys()]
        return unknown + [each for key in found.keys() & legal.keys()
                          for each in wrong(found[key], legal[key], f"{place}.{key}")]  # fmt: skip
    if isinstance(legal, list):
        if not isinstance(found, list) or not found:
            return [f"{place}: is no list of something"]
        return [each for number, item in enumerate(found) for each in wrong(item, legal[0], f"{place}[{number}]")]
    return [] if type(found) is legal else [f"{place}: {found!r} is no {legal.__name__}"]


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((LAUNCH / name).read_text())
    return found


def groups(job: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """How many pods, and the template of each, the head's first."""
    cluster = job["spec"]["rayClusterSpec"]
    workers = [(group["replicas"], group["template"]["spec"]) for group in cluster.get("workerGroupSpecs", [])]
    return [(1, cluster["headGroupSpec"]["template"]["spec"]), *workers]


@pytest.mark.parametrize("name", FILES)
def test_keys_and_types(name: str) -> None:
    job = read(name)
    assert wrong(job, RAYJOB) == []
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["rayClusterSpec"]["authOptions"]["mode"] == "token"
    assert re.fullmatch("[a-z0-9]([a-z0-9-]{0,45}[a-z0-9])?", job["metadata"]["name"])  # names of pods are made of it
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert all(isinstance(value, str) for value in environment["env_vars"].values())


def test_a_key_that_is_not_there_and_a_wrong_type_are_found() -> None:
    job = read("rayjob-nodes.yaml")
    worker = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    worker["replica"], worker["maxReplicas"] = 2, "2"
    assert sorted(wrong(job, RAYJOB)) == [
        ".spec.rayClusterSpec.workerGroupSpecs[0].maxReplicas: '2' is no int",
        ".spec.rayClusterSpec.workerGroupSpecs[0].replica: unknown",
    ]


@pytest.mark.parametrize("name", FILES)
def test_pods_fit_together(name: str) -> None:
    for count, pod in groups(read(name)):
        assert count >= 1
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            resources = container["resources"]
            assert resources["requests"] == resources["limits"]  # nothing takes a rank's cores or memory away
            assert all(QUANTITY.fullmatch(value) for value in resources["limits"].values())
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
            if "nvidia.com/gpu" in resources["limits"]:
                assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
    workers = read(name)["spec"]["rayClusterSpec"].get("workerGroupSpecs", [])
    assert all(group["minReplicas"] == group["replicas"] == group["maxReplicas"] for group in workers)


@pytest.mark.parametrize("name", FILES)
def test_what_it_runs_can_run_on_its_gpus(name: str) -> None:
    """Every case of the command gets a plan for H200s on these nodes, with a GPU for each rank."""
    job = read(name)
    python, dash, package, command, flag, model, *rest = shlex.split(job["spec"]["entrypoint"])
    assert (python, dash, package, command, flag) == ("python", "-m", "moe_dist", "compare", "--model")
    config = override({"models": [model]}, [word for word in rest if "=" in word])
    assert [word for word in rest if "=" not in word] == ["--json"]
    experiment = Experiment(**resolve_models(config))
    limits = [(count, pod["containers"][0]["resources"]["limits"]) for count, pod in groups(job)]
    gpus = [int(limit.get("nvidia.com/gpu", 0)) for count, limit in limits for _ in range(count)]
    assert experiment.worlds == (sum(gpus),)
    nodes = Nodes(tuple(count for count in gpus if count), experiment.ray.strategy)
    machine = replace(Machine.named("h200x8"), devices=sum(gpus), nodes=nodes)
    plans = [case.with_changes(backend="triton").plan(machine) for case in experiment.cases("cuda")]
    assert plans
    assert all(isinstance(plan, Plan) and plan.placement.world == sum(gpus) for plan in plans)
