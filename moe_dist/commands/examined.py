"""What this machine has, and which backends and exchanges can run on it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch.distributed as dist

from moe_dist.backends import BACKENDS, Backend
from moe_dist.bench.peaks import PEAKS, Peaks, measured
from moe_dist.commands.checks import as_documents, checks
from moe_dist.engine.together import WHOLE, go_together
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.exchange import EXCHANGES, Exchange
from moe_dist.kernels.cutlass.library import find_nvcc
from moe_dist.machine.gpus import Topology, topology
from moe_dist.machine.interfaces import interfaces
from moe_dist.machine.loaded import loaded_nccl
from moe_dist.machine.machine import Machine, cores, nvidia_driver
from moe_dist.messages.printable import one_line
from moe_dist.model.placement import Placement
from moe_dist.model.spec import BLOCK, MoESpec, ParallelSpec, TokenLayout
from moe_dist.peers import PEERS, Peer
from moe_dist.registry import Registry

PACKAGES = ("torch", "numpy", "ray", "safetensors", "pydantic", "triton", "flashinfer-python", "sgl-deep-gemm")


def examine() -> dict[str, Any]:
    """Looks, starts nothing: no Ray, no process group, no compilation."""
    machine, driver = Machine.detect(), nvidia_driver()
    gpus, nccl, here = topology(), loaded_nccl(), interfaces()
    judged = checks(driver, gpus, nccl, here)
    return {
        "python": platform.python_version(),
        "machine": {
            "device": machine.device,
            "name": machine.name,
            "devices": machine.devices if machine.device == "cuda" else 0,
            "capability": machine.capability,
            "memory_gib": _gib(machine.memory),
            "cores": cores(),
        },
        "driver": {
            "version": driver.version if driver else None,
            "gpus": [{"name": gpu.name, "memory_gib": _gib(gpu.memory)} for gpu in (driver.gpus if driver else ())],
        },
        "packages": {package: _version(package) for package in PACKAGES},
        "peaks": {"recorded": _peaks(PEAKS, machine.name), "measured": _peaks(measured(), machine.name)},
        "nvcc": _nvcc(),
        "collectives": {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()},
        "nccl": asdict(nccl),
        "gpus": _gpus(gpus),
        "interfaces": [asdict(each) for each in here],
        "checks": as_documents(judged),
        "backends": {name: _asked(BACKENDS, name, _backend, machine.device) for name in BACKENDS.names()},
        "exchanges": {name: _asked(EXCHANGES, name, _exchange, machine.device) for name in EXCHANGES.names()},
        "peers": {name: _asked(PEERS, name, _peer, machine.device) for name in PEERS.names()},
    }


def _peaks(known: dict[str, Peaks], device: str) -> dict[str, float] | None:
    return asdict(known[device]) if device in known else None


def _gpus(found: Topology | None) -> dict[str, Any]:
    """As NVML has them: all of the machine, whatever CUDA_VISIBLE_DEVICES shows of them."""
    if found is None:
        return {"each": [], "pairs": []}
    each = [
        {
            "index": gpu.index,
            "name": gpu.name,
            "free_gib": _gib(gpu.free),
            "nvlinks": gpu.links,
            "processes": gpu.processes,
        }
        for gpu in found.gpus
    ]
    pairs = [{"gpus": pair, "path": path, "peers": found.peers[pair]} for pair, path in found.paths.items()]
    return {"each": each, "pairs": pairs}


def _gib(size: int | None) -> float | None:
    return size and round(size / 2**30, 1)


def _asked(
    registry: Registry[Any], name: str, question: Callable[..., tuple[bool, str]], *given: str
) -> dict[str, Any]:
    """A third party's that can't be used is an answer too."""
    try:
        ok, reason = question(registry.get(name), *given)
    except Exception as error:
        if not isinstance(error, ImportError) and not registry.is_foreign(name):
            raise
        said = error.rule if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        ok, reason = False, one_line(said)
    return {"ok": ok, "reason": reason}


def _backend(cls: type[Backend], device: str) -> tuple[bool, str]:
    ok, reason = cls.available(device)
    return ok, reason


def _peer(cls: type[Peer], device: str) -> tuple[bool, str]:
    ok, reason = cls.available(device)
    return ok, reason or cls.label()


def _exchange(cls: type[Exchange[Any, Any]], device: str) -> tuple[bool, str]:
    """Asked about a layer of one rank and about one of two, of which every exchange serves one that works on this
    machine at all."""
    spec, machine = MoESpec(hidden=BLOCK, intermediate=BLOCK, num_experts=2, top_k=1), Machine.detect(device)
    grids = (ParallelSpec(), ParallelSpec(ep=2))
    answers = [cls.supports(spec, Placement.build(spec, parallel), machine) for parallel in grids]
    if not any(answer.ok for answer in answers):
        return False, answers[0].reason
    if cls is not EXCHANGES.get("local") and not dist.is_available():
        return False, "this torch was built without torch.distributed"
    layouts: tuple[TokenLayout, ...] = ("sharded", "replicated")
    served = [layout for layout in layouts if cls.for_layout(layout).token_layout == layout]
    partners = [name for name, each in BACKENDS.usable() if go_together(cls, each)] if WHOLE in cls.makes else []
    said = [f"for {' and '.join(served)} tokens", f"with backend {' or '.join(partners)}" if partners else ""]
    said.append("" if cls.capturable else "not capturable in a CUDA graph")
    return True, "; ".join(filter(None, said))


def _nvcc() -> bool:
    try:
        find_nvcc()
    except MoeDistError:
        return False
    return True


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
