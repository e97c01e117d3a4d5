"""What this machine has: every question to its CPU, its container, its GPUs and their driver."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from moe_dist.errors import ConfigError, ResourceError, did_you_mean
from moe_dist.machine.nodes import Nodes

SHARED_MEMORY = "/dev/shm"
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
HOPPER = (9, 0)  # compute capability
# GPUs by short names: torch's name, as tuning tables have it, and memory in GiB.
GPUS = {"h100": ("NVIDIA H100 80GB HBM3", 79), "h200": ("NVIDIA H200", 139)}
GPUS_OF_A_HOST = 8  # at most, of those that NVLink joins
# A limit, what is used of it, and the part of that which the kernel takes back when it is needed: version 2, then 1.
CGROUP_FILES = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True)
class Machine:
    """What the ranks run on: `device` cpu or cuda, the GPUs' compute capability and memory in bytes each. `elsewhere`:
    one that is only planned for, of which nobody can ask what is installed there. `nodes`: of a cluster; None: all
    ranks are on one node."""

    device: str
    devices: int
    name: str
    capability: tuple[int, int] | None = None
    memory: int | None = None
    elsewhere: bool = False
    nodes: Nodes | None = None

    def nodes_of(self, world: int) -> tuple[int, ...]:
        """How many of `world` ranks are on each node; ranks are numbered node by node."""
        return (world,) if self.nodes is None else self.nodes.of(world)

    @property
    def device_name(self) -> str:
        """As tuning tables name the device."""
        return self.name if self.device == "cuda" else self.device

    @property
    def room(self) -> int:
        """Bytes that tensors may take: a GPU's memory, or what is left of the CPU's for all ranks together."""
        return (self.memory or 0) if self.device == "cuda" else available_memory()

    @classmethod
    def named(cls, text: str) -> Machine:
        """One that is not here: h200x4 is a host with four NVIDIA H200s."""
        kind, _, count = text.lower().rpartition("x")
        if kind not in GPUS or not re.fullmatch("[1-9][0-9]{0,2}", count) or int(count) > GPUS_OF_A_HOST:
            hosts = [f"{each}x{number}" for each in GPUS for number in range(1, GPUS_OF_A_HOST + 1)]
            # Of a number that is wrong no other one is meant.
            rule = "is no host that is known" + (did_you_mean(text, hosts) if kind not in GPUS else "")
            raise ConfigError("machine", text, rule, ", ".join(f"{each}x1 to {each}x{GPUS_OF_A_HOST}" for each in GPUS))
        name, gib = GPUS[kind]
        return cls("cuda", int(count), name, HOPPER, gib << 30, elsewhere=True)

    @classmethod
    def detect(cls, device: str = "auto") -> Machine:
        """This process's machine. Raises ConfigError for an unknown device, ResourceError for cuda without one."""
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError("device", device, "unknown", ("auto", "cpu", "cuda"))
        if device == "cuda" and not torch.cuda.is_available():
            raise ResourceError("CUDA devices", 1, 0, "Take device auto or cpu.")
        if device == "cpu" or not torch.cuda.is_available():
            return cls("cpu", 1, cpu_name())
        # By torch, not by the driver: CUDA_VISIBLE_DEVICES counts, and torch's names are those of tuning tables.
        properties = torch.cuda.get_device_properties(0)
        capability = (properties.major, properties.minor)
        return cls("cuda", torch.cuda.device_count(), properties.name, capability, properties.total_memory)


def cpu_name() -> str:
    """As Linux has it; "CPU" where it has no name, as on many Arm machines."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"


def cores() -> int:
    """Of the machine, whatever part of them this process may use."""
    return os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its container's limit."""
    import psutil  # here: who only runs a layer needs no memory counted

    return min([psutil.virtual_memory().available, *container_memory()])


def shared_memory() -> int | None:
    """Bytes of the file system through which processes of a machine share memory; None where there is none."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize


def container_memory(root: Path = CGROUPS, membership: Path = OWN_CGROUP) -> list[int]:
    """Bytes left under the limit of this process's control group and of each one around it; none where none is set."""
    try:
        groups = [line.strip().split(":", 2)[1:] for line in membership.read_text().splitlines()]
    except (OSError, ValueError):
        groups = []
    found = []
    for controller, limit, usage, reclaimable in CGROUP_FILES:
        base = root / controller
        inside = next((path for kinds, path in groups if controller in kinds.split(",")), "/")
        place = base / inside.lstrip("/")
        for folder in {base, place, *place.parents}:
            if folder == base or base in folder.parents:
                found += _left(folder, limit, usage, reclaimable)
    return found


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> list[int]:
    try:
        bound, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        if bound == "max" or int(bound) >= 1 << 62:  # version 1's way to say that there is none
            return []
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [max(0, int(bound) - used + int(stat.get(reclaimable, 0)))]


class Gpu(NamedTuple):
    """As the driver sees it; `memory` in bytes. One that does not answer has the reason as its name."""

    name: str
    memory: int | None


class Driver(NamedTuple):
    """NVIDIA's driver and its GPUs: all of the machine or container, whatever CUDA_VISIBLE_DEVICES shows of them."""

    version: str
    gpus: tuple[Gpu, ...]


def nvidia_driver() -> Driver | None:
    """Asked through NVML, which starts no CUDA on a GPU. None where there is no driver, or none that answers."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        version, count = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlDeviceGetCount()
        return Driver(version, tuple(_gpu(index) for index in range(count)))
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int) -> Gpu:
    import pynvml

    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        return Gpu(pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError as error:  # fallen off the bus, or another user's
        return Gpu(f"GPU {index}: {error}", None)


def check_machine(planned: Machine, device: torch.device) -> None:
    """Raise ConfigError where a rank on `device` is not on a machine as the plan was made for: another kind of device,
    or another GPU, for which other configs and other limits count."""
    here = Machine.detect(device.type)
    if (here.device_name, here.capability) != (planned.device_name, planned.capability):
        rule = "this rank's device is not what the plan was made for"
        raise ConfigError("machine", here.device_name, rule, planned.device_name)
