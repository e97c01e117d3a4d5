"""What we know of KubeRay's RayJob (ray.io/v1), in our own words: the fields that the manifests of launch/ use.

KubeRay's own schema is a megabyte and not in this repository. Types, enumerations and required fields were compared
with the CRD that it generates, in November 2026: that of its development after v1.6.2, which says that v1alpha1 goes in
1.9. `authOptions` is there since v1.5.1. Earlier versions required `rayStartParams`; so do we.
"""

from __future__ import annotations

import copy
import re
from decimal import Decimal
from typing import Any

# A shape is: a type; a dict of keys, where "*" is any key and "!" marks a required one; a list with the shape of its
# items; a tuple of the only legal texts; a pattern that a text, or a whole number, must have; a range of whole numbers.
QUANTITY = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(([KMGTPE]i)|[numkMGTPE]|[eE][+-]?[0-9]+)?")
UNITS = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
INT32, NATURAL, POSITIVE, PORT = range(-(2**31), 2**31), range(2**31), range(1, 2**31), range(1, 2**16)
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # RFC 1123: names of containers and volumes
JOB_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,45}[a-z0-9])?")  # the operator refuses longer ones: pods are named by it
PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?")
TEXTS = {"*": str}

CONTAINER = {
    "name!": LABEL, "image": str, "env": [{"name!": str, "value": str}],
    "ports": [{"containerPort!": PORT, "name": PORT_NAME}],
    "resources": {"requests": {"*": QUANTITY}, "limits": {"*": QUANTITY}},
    "volumeMounts": [{"name!": LABEL, "mountPath!": str}],
}  # fmt: skip
TEMPLATE = {
    "spec": {
        "containers!": [CONTAINER],
        "volumes": [{"name!": LABEL, "emptyDir": {"medium": ("", "Memory", "HugePages"), "sizeLimit": QUANTITY}}],
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey!": str, "labelSelector": {"matchLabels": TEXTS}}
        ]}},
    }
}  # fmt: skip
CLUSTER = {
    "rayVersion": str, "authOptions": {"mode": ("disabled", "token")},
    "headGroupSpec!": {"rayStartParams!": TEXTS, "template!": TEMPLATE},
    "workerGroupSpecs": [{
        "groupName!": LABEL, "replicas": NATURAL, "minReplicas!": NATURAL, "maxReplicas!": NATURAL,
        "rayStartParams!": TEXTS, "template!": TEMPLATE,
    }],
}  # fmt: skip
RAYJOB = {
    "apiVersion!": ("ray.io/v1",), "kind!": ("RayJob",), "metadata!": {"name!": JOB_NAME},
    "spec!": {
        "entrypoint": str, "backoffLimit": NATURAL, "activeDeadlineSeconds": POSITIVE,
        "shutdownAfterJobFinishes": bool, "ttlSecondsAfterFinished": NATURAL, "runtimeEnvYAML": str,
        "rayClusterSpec": CLUSTER,
    },
}  # fmt: skip


def wrong(found: Any, shape: Any, place: str = "") -> list[str]:
    """Where something is not of this shape."""
    if isinstance(shape, dict):
        return _wrong_keys(found, shape, place)
    if isinstance(shape, list):
        if not isinstance(found, list) or not found:
            return [f"{place}: is no list of something"]
        return [each for number, item in enumerate(found) for each in wrong(item, shape[0], f"{place}[{number}]")]
    if isinstance(shape, tuple):
        return [] if found in shape else [f"{place}: {found!r} is none of {', '.join(shape)}"]
    if isinstance(shape, re.Pattern):
        text = str(found) if type(found) is int and shape is QUANTITY else found
        fits = isinstance(text, str) and shape.fullmatch(text)
        return [] if fits else [f"{place}: {found!r} has another form"]
    if isinstance(shape, range):
        fits = type(found) is int and found in shape
        return [] if fits else [f"{place}: {found!r} is no whole number from {shape.start} to {shape.stop - 1}"]
    return [] if type(found) is shape else [f"{place}: {found!r} is no {shape.__name__}"]


def _wrong_keys(found: Any, shape: dict[str, Any], place: str) -> list[str]:
    if not isinstance(found, dict):
        return [f"{place}: is no mapping"]
    legal = {key.rstrip("!"): value for key, value in shape.items()}
    missing = [f"{place}.{key[:-1]}: missing" for key in shape if key.endswith("!") and key[:-1] not in found]
    unknown = [f"{place}.{key}: unknown" for key in found if key not in legal and "*" not in legal]
    return missing + unknown + [
        each
        for key, value in found.items()
        if key in legal or "*" in legal
        for each in wrong(value, legal.get(key, legal.get("*")), f"{place}.{key}")
    ]  # fmt: skip


def amount(quantity: str | int) -> Decimal:
    """What a quantity of Kubernetes is in its base unit: cores, bytes, GPUs."""
    match = re.fullmatch(r"([+-]?[0-9.]+)([A-Za-z]*)([+-]?[0-9]*)", str(quantity))
    if not match or not QUANTITY.fullmatch(str(quantity)):
        raise ValueError(f"{quantity!r} is no quantity")
    number, unit, exponent = match.groups()
    if exponent:
        return Decimal(f"{number}e{exponent}")
    if unit.endswith("i"):
        return Decimal(number) * 1024 ** ("KMGTPE".index(unit[0]) + 1)
    return Decimal(number).scaleb(UNITS[unit])


def schema_of(crd: dict[str, Any], version: str) -> dict[str, Any]:
    """The JSON schema that a CustomResourceDefinition has for this version of its objects, and none of its own: in it
    a field that it does not know is wrong, as `kubectl apply` has it, where the API server would only drop it."""
    (found,) = (each for each in crd["spec"]["versions"] if each["name"] == version)
    schema: dict[str, Any] = copy.deepcopy(found["schema"]["openAPIV3Schema"])
    _close(schema)
    return schema


def _close(schema: Any) -> None:
    if isinstance(schema, list):
        for each in schema:
            _close(each)
    elif isinstance(schema, dict):
        closed = "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields")
        if closed and isinstance(schema["properties"], dict):
            schema.setdefault("additionalProperties", False)
        for each in list(schema.values()):
            _close(each)
