"""What the GPUs of this machine have free, and how they reach each other: asked through NVML, which starts no CUDA."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

MOST_LINKS = 18  # of NVLink that a GPU has, up to Hopper and Blackwell
READS, NVLINK = 0, 2  # of NVML's nvmlGpuP2PCapsIndex_t: pynvml 13.615 has a tuple where READS should be

T = TypeVar("T")


@dataclass(frozen=True)
class GpuState:
    """Of one GPU: memory in bytes, and how many links of NVLink are up. `processes`: ids of those that compute on it,
    which a container may number otherwise. What the driver does not tell is None: all of it for one that does not
    answer."""

    index: int
    name: str
    free: int | None
    total: int | None
    links: int | None
    processes: tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """`paths[i, j]`, i < j: how two GPUs reach each other, such as "NVLink", "PCIe switch" or "through the CPU".
    `peers[i, j]`: whether one may read the other's memory; None where the driver does not tell."""

    gpus: tuple[GpuState, ...]
    paths: dict[tuple[int, int], str]
    peers: dict[tuple[int, int], bool | None]


def topology() -> Topology | None:
    """None where there is no driver, or none that answers."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        count = pynvml.nvmlDeviceGetCount()
        handles = [_told(pynvml, partial(pynvml.nvmlDeviceGetHandleByIndex, index)) for index in range(count)]
        gpus = tuple(_state(pynvml, index, handle) for index, handle in enumerate(handles))
        there = [index for index, handle in enumerate(handles) if handle is not None]
        pairs = [(i, j) for j in there for i in there if i < j]
        return Topology(
            gpus,
            {(i, j): _path(pynvml, handles[i], handles[j]) for i, j in pairs},
            {(i, j): _may_read(pynvml, handles[i], handles[j]) for i, j in pairs},
        )
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _told(nvml: Any, ask: Callable[[], T]) -> T | None:
    """What the driver answers; None where it refuses or the call is not there."""
    try:
        return ask()
    except (nvml.NVMLError, AttributeError):
        return None


def _state(nvml: Any, index: int, handle: Any) -> GpuState:
    if handle is None:
        return GpuState(index, f"GPU {index} does not answer", None, None, None, ())
    memory = _told(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    processes = _told(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or ()
    return GpuState(
        index,
        _told(nvml, lambda: nvml.nvmlDeviceGetName(handle)) or f"GPU {index}",
        memory and memory.free,
        memory and memory.total,
        _links(nvml, handle),
        tuple(process.pid for process in processes),
    )


def _links(nvml: Any, handle: Any) -> int | None:
    """How many are up; None for a GPU without NVLink."""
    up, known = 0, False
    for link in range(MOST_LINKS):
        with suppress(nvml.NVMLError, AttributeError):
            up += nvml.nvmlDeviceGetNvLinkState(handle, link) == nvml.NVML_FEATURE_ENABLED
            known = True
    return up if known else None


def _path(nvml: Any, one: Any, other: Any) -> str:
    status = _told(nvml, lambda: nvml.nvmlDeviceGetP2PStatus(one, other, NVLINK))
    if status is not None and status == nvml.NVML_P2P_STATUS_OK:
        return "NVLink"
    level = _told(nvml, lambda: nvml.nvmlDeviceGetTopologyCommonAncestor(one, other))
    if level is None:
        return "unknown"
    switch = (nvml.NVML_TOPOLOGY_INTERNAL, nvml.NVML_TOPOLOGY_SINGLE, nvml.NVML_TOPOLOGY_MULTIPLE)
    if level in switch:
        return "PCIe switch"
    return "between CPUs" if level == nvml.NVML_TOPOLOGY_SYSTEM else "through the CPU"


def _may_read(nvml: Any, one: Any, other: Any) -> bool | None:
    status = _told(nvml, lambda: nvml.nvmlDeviceGetP2PStatus(one, other, READS))
    return None if status is None else bool(status == nvml.NVML_P2P_STATUS_OK)
