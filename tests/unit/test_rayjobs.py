"""The RayJobs of launch/ are what KubeRay takes, as far as can be told without a cluster, and run what can run there.

MOE_DIST_RAYJOB_CRD names a file with KubeRay's own CustomResourceDefinition of RayJob (of its Helm chart, say, or what
`kubectl get crd rayjobs.ray.io -o yaml` prints): then they are validated by it too, but for its rules in CEL."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from kuberay import RAYJOB, amount, schema_of, wrong

from moe_dist.bench.case import Experiment
from moe_dist.commands.config import override, resolve_models
from moe_dist.engine.plan import Plan
from moe_dist.machine.machine import Machine
from moe_dist.machine.nodes import Nodes

LAUNCH = Path(__file__).parents[2] / "launch"
FILES = ("rayjob.yaml", "rayjob-nodes.yaml")
CRD = os.environ.get("MOE_DIST_RAYJOB_CRD")


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((LAUNCH / name).read_text())
    return found


def groups(job: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """How many pods, and the template of each, the head's first."""
    cluster = job["spec"]["rayClusterSpec"]
    workers = [(group["replicas"], group["template"]["spec"]) for group in cluster.get("workerGroupSpecs", [])]
    return [(1, cluster["headGroupSpec"]["template"]["spec"]), *workers]


@pytest.mark.parametrize("name", FILES)
def test_shape(name: str) -> None:
    job = read(name)
    assert wrong(job, RAYJOB) == []
    spec = job["spec"]
    assert spec["rayClusterSpec"]["authOptions"]["mode"] == "token"
    version = tuple(map(int, spec["rayClusterSpec"]["rayVersion"].split(".")))
    assert version >= (2, 52)  # the operator refuses tokens before
    assert spec["shutdownAfterJobFinishes"] or not spec["ttlSecondsAfterFinished"]  # nor does it take the one alone
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    assert all(isinstance(value, str) for value in environment["env_vars"].values())


CLUSTER = ".spec.rayClusterSpec"
GROUP = f"{CLUSTER}.workerGroupSpecs[0]"
POD = f"{GROUP}.template.spec.containers[0]"


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (f"{GROUP}.replica", 2, f"{GROUP}.replica: unknown"),
        (f"{GROUP}.maxReplicas", "2", f"{GROUP}.maxReplicas: '2' is no whole number from 0 to 2147483647"),
        (f"{GROUP}.minReplicas", None, f"{GROUP}.minReplicas: missing"),
        (f"{CLUSTER}.authOptions.mode", "tokens", f"{CLUSTER}.authOptions.mode: 'tokens' is none of disabled, token"),
        (f"{CLUSTER}.rayVersion", 2.6, f"{CLUSTER}.rayVersion: 2.6 is no str"),
        (f"{CLUSTER}.headGroupSpec", None, f"{CLUSTER}.headGroupSpec: missing"),
        (f"{CLUSTER}.headGroupSpec.rayStartParams.num-cpus", 0,
         f"{CLUSTER}.headGroupSpec.rayStartParams.num-cpus: 0 is no str"),
        (f"{POD}.resources.limits.memory", "256GiB", f"{POD}.resources.limits.memory: '256GiB' has another form"),
        (f"{POD}.name", "ray_worker", f"{POD}.name: 'ray_worker' has another form"),
        (".metadata.name", "n" * 48, f".metadata.name: {'n' * 48!r} has another form"),
        (".spec.backoffLimit", False, ".spec.backoffLimit: False is no whole number from 0 to 2147483647"),
        (".apiVersion", "ray.io/v1alpha1", ".apiVersion: 'ray.io/v1alpha1' is none of ray.io/v1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(place: str, value: Any, said: str) -> None:
    """`value` None: the key is not there."""
    job = read("rayjob-nodes.yaml")
    at: Any = job
    *keys, last = place.removeprefix(".").replace("[0]", ".0").split(".")
    for key in keys:
        at = at[int(key) if key.isdecimal() else key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    assert wrong(job, RAYJOB) == [said]


def test_quantities() -> None:
    read_as = {"500m": "0.5", "4": "4", 4: "4", "16Gi": str(16 << 30), "1e3": "1000", "2k": "2000", ".5": "0.5"}
    assert {text: amount(text) for text in read_as} == {text: Decimal(is_) for text, is_ in read_as.items()}
    for text in ("16GiB", "16 Gi", "", "Gi", "1e", "x"):
        with pytest.raises(ValueError, match="is no quantity"):
            amount(text)


@pytest.mark.parametrize("name", FILES)
def test_pods_fit_together(name: str) -> None:
    for count, pod in groups(read(name)):
        assert count >= 1
        in_memory = {each["name"]: each["emptyDir"].get("sizeLimit") for each in pod.get("volumes", [])
                     if each["emptyDir"].get("medium") == "Memory"}  # fmt: skip
        volumes = [volume["name"] for volume in pod.get("volumes", [])]
        assert len(set(volumes)) == len(volumes)
        for container in pod["containers"]:
            resources, mounts = container["resources"], container.get("volumeMounts", [])
            assert resources["requests"] == resources["limits"]  # nothing takes a rank's cores or memory away
            limits = {resource: amount(quantity) for resource, quantity in resources["limits"].items()}
            assert all(limit > 0 for limit in limits.values())
            assert {mount["name"] for mount in mounts} <= set(volumes)
            # What is written there counts as the container's memory.
            assert sum(amount(in_memory[mount["name"]]) for mount in mounts) <= limits["memory"] / 2
            ports = [port["containerPort"] for port in container.get("ports", [])]
            assert len(set(ports)) == len(ports)
            if "nvidia.com/gpu" in limits:
                assert limits["nvidia.com/gpu"] % 1 == 0  # Kubernetes gives whole ones
                assert "/dev/shm" in {mount["mountPath"] for mount in mounts}


@pytest.mark.parametrize("name", FILES)
def test_groups_of_workers_are_of_one_size_and_know_themselves(name: str) -> None:
    for group in read(name)["spec"]["rayClusterSpec"].get("workerGroupSpecs", []):
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
        apart = group["template"]["spec"]["affinity"]["podAntiAffinity"]
        (term,) = apart["requiredDuringSchedulingIgnoredDuringExecution"]
        # The operator labels a pod with the name of its group.
        assert term["labelSelector"]["matchLabels"] == {"ray.io/group": group["groupName"]}


if CRD:

    @pytest.mark.parametrize("name", FILES)
    def test_kuberays_own_schema(name: str) -> None:
        assert by_schema(read(name), yaml.safe_load(Path(CRD).read_text())) == []


def by_schema(job: dict[str, Any], crd: dict[str, Any]) -> list[str]:
    """What is wrong with it by the schema of a CRD."""
    jsonschema = pytest.importorskip("jsonschema")  # comes with Ray
    found = jsonschema.Draft4Validator(schema_of(crd, "v1")).iter_errors(job)
    return sorted(f"{each.json_path}: {each.message}" for each in found)


def test_a_schema_is_taken_strictly() -> None:
    """By a small CRD of our own, in the forms that KubeRay's has."""
    text, quantity = {"type": "string"}, {"anyOf": [{"type": "integer"}, {"type": "string"}], "pattern": "^[0-9]+Gi$",
                                          "x-kubernetes-int-or-string": True}  # fmt: skip
    limits = {"type": "object", "additionalProperties": quantity}
    spec = {"type": "object", "required": ["mode"], "properties": {
        "mode": {"type": "string", "enum": ["on", "off"]}, "limits": limits,
        "any": {"type": "object", "x-kubernetes-preserve-unknown-fields": True, "properties": {"known": text}},
    }}  # fmt: skip
    top = {"type": "object", "properties": {"metadata": {"type": "object"}, "spec": spec}}
    crd = {"spec": {"versions": [{"name": "v1alpha1"}, {"name": "v1", "schema": {"openAPIV3Schema": top}}]}}
    good = {"metadata": {"name": "x"}, "spec": {"mode": "on", "limits": {"memory": "4Gi"}, "any": {"other": 1}}}
    assert by_schema(good, crd) == []
    bad = {"metadata": {}, "spec": {"limits": {"memory": "4GiB"}, "Mode": "on"}}
    said = by_schema(bad, crd)
    assert len(said) == 3
    assert sorted(line.partition(":")[0] for line in said) == ["$.spec", "$.spec", "$.spec.limits.memory"]
    assert "additionalProperties" not in spec  # the CRD itself is left as it was


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
