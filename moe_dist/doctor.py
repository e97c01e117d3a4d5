"""What this machine has, and which backends and exchanges can run on it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch.distributed as dist

from moe_dist.backends import BACKENDS
from moe_dist.errors import MoeDistError
from moe_dist.exchange import EXCHANGES
from moe_dist.kernels.cutlass.library import find_nvcc
from moe_dist.plan import Machine

PACKAGES = ("torch", "numpy", "ray", "safetensors", "pydantic", "triton", "flashinfer-python", "sgl-deep-gemm")


def examine() -> dict[str, Any]:
    """Looks, starts nothing: no Ray, no process group, no compilation."""
    machine = Machine.detect()
    return {
        "python": platform.python_version(),
        "machine": {
            "device": machine.device,
            "name": machine.name,
            "devices": machine.devices if machine.device == "cuda" else 0,
            "capability": machine.capability,
            "memory_gib": machine.memory and round(machine.memory / 2**30, 1),
            "cores": os.cpu_count(),
        },
        "packages": {package: _version(package) for package in PACKAGES},
        "nvcc": _nvcc(),
        "collectives": {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()},
        "backends": {name: _answer(*_backend(name, machine.device)) for name in BACKENDS.names()},
        "exchanges": {name: _answer(*_exchange(name)) for name in EXCHANGES.names()},
    }


def _backend(name: str, device: str) -> tuple[bool, str]:
    try:
        return tuple(BACKENDS.get(name).available(device))  # type: ignore[return-value]
    except ImportError as error:
        return False, f"can't be imported: {error}"


def _exchange(name: str) -> tuple[bool, str]:
    cls = EXCHANGES.get(name)
    if name != "local" and not dist.is_available():
        return False, "this torch was built without torch.distributed"
    return True, f"for {cls.token_layout} tokens" + ("" if cls.capturable else "; not capturable in a CUDA graph")


def _nvcc() -> bool:
    try:
        find_nvcc()
    except MoeDistError:
        return False
    return True


def _answer(ok: bool, reason: str) -> dict[str, Any]:
    return {"ok": ok, "reason": reason}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
