"""What `doctor` judges: each check with what was found and, where something is wrong, what to do about it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moe_dist.machine.binaries import check_packages, release_tried_with
from moe_dist.machine.gpus import Topology
from moe_dist.machine.interfaces import Interface, own_addresses
from moe_dist.machine.loaded import Nccl
from moe_dist.machine.machine import SHARED_MEMORY, Driver, shared_memory
from moe_dist.machine.network import gloos_choice, settings, wrong_settings
from moe_dist.messages.counts import count_of

NO_GPU = "no GPU here: nothing to look at"
FREE_SHARE = 0.9  # of a GPU's memory; `run` and its like leave a tenth
LEAST_SHARED = 1 << 30  # bytes: NCCL takes some tens of MiB for each pair of ranks, torch's loaders more


@dataclass(frozen=True)
class Check:
    """`ok`: None where there was nothing to look at. `remedy` is "" unless `ok` is False."""

    name: str
    ok: bool | None
    found: str
    remedy: str = ""


def checks(driver: Driver | None, gpus: Topology | None, nccl: Nccl, here: list[Interface]) -> list[Check]:
    """All that can be judged in this process alone."""
    return [
        _torch(driver),
        *_packages(),
        _nccl(nccl),
        _memory(gpus),
        _nvlink(gpus),
        _shared_memory(),
        _network(here),
    ]


def _torch(driver: Driver | None) -> Check:
    found = f"torch {torch.__version__}, " + (
        f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    )
    there = len(driver.gpus) if driver else 0
    if not there:
        return Check("torch", True, f"{found}; no GPU here")
    if not torch.version.cuda:
        return Check("torch", False, f"{found}; {count_of(there, 'GPU')}", "install torch's build for CUDA")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen == there:
        return Check("torch", True, f"{found}; {count_of(seen, 'GPU')}")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        shown = os.environ["CUDA_VISIBLE_DEVICES"]
        told = f"{found}; it sees {seen} of {count_of(there, 'GPU')}: CUDA_VISIBLE_DEVICES is {shown!r}"
        return Check("torch", seen > 0, told, "" if seen else "unset CUDA_VISIBLE_DEVICES, or name GPUs in it")
    version = driver.version if driver else "?"
    remedy = f"a driver that knows CUDA {torch.version.cuda} (this one is {version}), or torch for an older CUDA"
    return Check("torch", False, f"{found}; it sees {seen} of {count_of(there, 'GPU')}", remedy)


def _packages() -> Iterator[Check]:
    try:
        fits = check_packages()
    except ImportError as error:
        yield Check("package", False, f"not looked at: {error}", "pip install pyelftools, or this package again")
        return
    for fit in fits:
        found = f"{fit.package} {fit.version}: " + (fit.problem() or f"{fit.files} libraries fit this torch")
        remedy = fit.remedy(torch.__version__, release_tried_with(fit.package))
        yield Check("package", fit.ok, found, remedy)
    if not fits:
        yield Check("package", None, "no package is installed whose libraries are linked with torch")


def _nccl(nccl: Nccl) -> Check:
    if nccl.loaded is None:
        return Check("NCCL", None, "none is loaded: this torch has no CUDA, or is not the one that ranks use")
    found = f"{nccl.loaded}, loaded from {nccl.path}"
    if nccl.also:
        rule = "leave one: take the others out of LD_PRELOAD and LD_LIBRARY_PATH"
        return Check("NCCL", False, f"{found}; beside it {', '.join(nccl.also)}", rule)
    if nccl.compiled is not None and _release(nccl.loaded) != _release(nccl.compiled):
        remedy = "take what comes first out of LD_PRELOAD and LD_LIBRARY_PATH, or install nvidia-nccl as torch asks"
        return Check("NCCL", False, f"{found}; torch was compiled against {nccl.compiled}", remedy)
    return Check("NCCL", True, found)


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


def _memory(gpus: Topology | None) -> Check:
    if gpus is None or not gpus.gpus:
        return Check("GPU memory", None, NO_GPU)
    found = ", ".join(f"GPU {gpu.index} {_gib(gpu.free)} of {_gib(gpu.total)} GiB free" for gpu in gpus.gpus)
    lost = [gpu.index for gpu in gpus.gpus if gpu.free is None]
    if lost:
        return Check("GPU memory", False, found, f"GPU {', '.join(map(str, lost))} does not answer: `dmesg` says why")
    full = [gpu for gpu in gpus.gpus if (gpu.free or 0) < FREE_SHARE * (gpu.total or 0)]
    if not full:
        return Check("GPU memory", True, found)
    owners = sorted({process for gpu in full for process in gpu.processes})
    whose = f"processes {', '.join(map(str, owners))}" if owners else "processes outside of this container"
    others = f"end {whose} if they are yours, or choose other GPUs by CUDA_VISIBLE_DEVICES"
    return Check("GPU memory", False, found, others)


def _nvlink(gpus: Topology | None) -> Check:
    if gpus is None or not gpus.gpus:
        return Check("NVLink", None, NO_GPU)
    if len(gpus.gpus) == 1:
        return Check("NVLink", None, "one GPU: there is no pair")
    links = ", ".join(f"GPU {gpu.index} {gpu.links or 0} links up" for gpu in gpus.gpus)
    others: dict[str, list[str]] = {}
    for (i, j), path in gpus.paths.items():
        if path != "NVLink":
            others.setdefault(path, []).append(f"{i}-{j}")
    if not others:
        return Check("NVLink", True, f"between all pairs; {links}")
    found = "; ".join(f"{path}: GPUs {' '.join(pairs)}" for path, pairs in others.items())
    remedy = "exchange nvlink needs NVLink between all ranks' GPUs: choose such by CUDA_VISIBLE_DEVICES; on hosts with"
    return Check("NVLink", False, f"not between all pairs: {found}; {links}", f"{remedy} NVSwitch see that"
                 " nvidia-fabricmanager runs")  # fmt: skip


def _shared_memory() -> Check:
    size = shared_memory()
    if size is None:
        return Check("shared memory", False, f"no {SHARED_MEMORY}", f"mount a tmpfs at {SHARED_MEMORY}")
    found = f"{_gib(size)} GiB in {SHARED_MEMORY}"
    if size >= LEAST_SHARED:
        return Check("shared memory", True, found)
    return Check("shared memory", False, found, "NCCL and Ray need 1 GiB and more: docker run --shm-size 8g")


def _network(here: list[Interface]) -> Check:
    if wrong := wrong_settings(here):
        listed = ", ".join(f"{variable}={value}" for variable, value in wrong.items())
        names = ", ".join(each.name for each in here) or "none"
        return Check("network", False, f"{listed}: no interface here has that name", f"one of {names}, or unset it")
    outside = [each for each in here if each.up and not each.loopback]
    found = "; ".join(f"{each.name} {' '.join(each.addresses)}{_speed(each)}" for each in here if each.up) or "none"
    chosen = gloos_choice(here, own_addresses())
    if os.environ.get("GLOO_SOCKET_IFNAME") or (chosen is not None and not chosen.loopback) or not outside:
        return Check("network", True, found)
    said = "this host's name resolves to no interface" if chosen is None else "this host's name is the loopback's"
    set_them = " ".join(f"{name}={value}" for name, value in settings(outside[0].name, [i.name for i in here]).items())
    remedy = f"nothing on one host; for ranks on several: export {set_them} (`doctor --pairs` tests which one)"
    return Check("network", True, f"{found}; {said}; {remedy}")


def _speed(each: Interface) -> str:
    return f" {each.mbits / 1000:g} Gbit/s" if each.mbits else ""


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**30:.1f}"


def as_documents(found: list[Check]) -> list[dict[str, Any]]:
    return [{"name": each.name, "ok": each.ok, "found": each.found, "remedy": each.remedy} for each in found]
