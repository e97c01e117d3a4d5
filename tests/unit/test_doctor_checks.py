"""What `doctor` judges, with faked drivers: each check that fails says what to do."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from moe_dist.commands import checks
from moe_dist.commands.checks import Check
from moe_dist.machine import loaded
from moe_dist.machine.gpus import GpuState, Topology, topology
from moe_dist.machine.interfaces import Interface
from moe_dist.machine.loaded import Nccl, loaded_files, loaded_nccl, version_text
from moe_dist.machine.machine import Driver, Gpu

GIB = 1 << 30
H200 = Gpu("NVIDIA H200", 141 * GIB)


def gpu(index: int, free: int | None = 140 * GIB, processes: tuple[int, ...] = ()) -> GpuState:
    return GpuState(index, "NVIDIA H200", free, None if free is None else 141 * GIB, 18, processes)


def joined(*paths: str) -> Topology:
    """Two GPUs for each path, between the first and each further one."""
    pairs = {(0, number): path for number, path in enumerate(paths, 1)}
    return Topology(tuple(gpu(index) for index in range(len(paths) + 1)), pairs, dict.fromkeys(pairs, True))


def fails(check: Check, *texts: str) -> None:
    assert check.ok is False
    assert check.remedy
    for text in texts:
        assert text in f"{check.found}|{check.remedy}"


def test_without_a_gpu_it_says_so():
    for check in (checks._memory(None), checks._nvlink(None)):
        assert (check.ok, check.found, check.remedy) == (None, "no GPU here: nothing to look at", "")
    assert checks._nccl(loaded_nccl(Path("/nowhere"))).ok is None
    assert checks._torch(None).ok is True


class TestTorch:
    def test_a_build_without_cuda(self, monkeypatch):
        monkeypatch.setattr(checks.torch.version, "cuda", None)
        fails(checks._torch(Driver("580", (H200,))), "without CUDA; 1 GPU", "build for CUDA")

    def test_a_driver_that_is_too_old(self, monkeypatch):
        monkeypatch.setattr(checks.torch.version, "cuda", "13.0")
        monkeypatch.setattr(checks.torch.cuda, "is_available", lambda: False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        fails(checks._torch(Driver("470.1", (H200,))), "sees 0 of 1", "knows CUDA 13.0 (this one is 470.1)")

    def test_hidden_gpus(self, monkeypatch):
        monkeypatch.setattr(checks.torch.version, "cuda", "13.0")
        monkeypatch.setattr(checks.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(checks.torch.cuda, "device_count", lambda: 1)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        assert checks._torch(Driver("580", (H200, H200))).ok is True
        monkeypatch.setattr(checks.torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        fails(checks._torch(Driver("580", (H200, H200))), "CUDA_VISIBLE_DEVICES is ''", "unset CUDA_VISIBLE_DEVICES")


class TestNccl:
    def test_another_than_torch_was_compiled_against(self):
        fails(checks._nccl(Nccl("2.21.5", "/opt/libnccl.so.2", "2.28.9")), "/opt/libnccl.so.2", "LD_PRELOAD")

    def test_a_newer_patch_is_fine(self):
        assert checks._nccl(Nccl("2.28.12", "/x/libnccl.so.2", "2.28.9")).ok is True

    def test_two_at_once(self):
        fails(checks._nccl(Nccl("2.28.9", "/a/libnccl.so.2", "2.28.9", ("/b/libnccl.so.2",))), "/b/libnccl.so.2")

    def test_it_is_the_library_in_the_process_that_is_asked(self, tmp_path, monkeypatch):
        maps = tmp_path / "maps"
        lines = [
            f"7f0-7f1 r-xp 00000000 00:00 0   {path}"
            for path in ("/usr/lib/libnccl.so.2", "/usr/lib/libc.so.6", "/usr/lib/libnccl.so.2", "/opt/libnccl.so.2")
        ]
        maps.write_text("\n".join([*lines, "7f0-7f1 rw-p 0000 00:00 0", "7f2-7f3 rw-p 00 00:00 0   [heap]"]))
        assert loaded_files("libnccl.so", maps) == ["/usr/lib/libnccl.so.2", "/opt/libnccl.so.2"]

        def library(path: str) -> SimpleNamespace:
            assert path == "/usr/lib/libnccl.so.2"

            def version(pointer: object) -> int:
                pointer._obj.value = 22809
                return 0

            return SimpleNamespace(ncclGetVersion=version)

        monkeypatch.setattr(loaded.ctypes, "CDLL", library)
        found = loaded_nccl(maps)
        assert (found.loaded, found.path) == ("2.28.9", "/usr/lib/libnccl.so.2")
        assert found.also == ("/opt/libnccl.so.2",)

    def test_versions(self):
        assert [version_text(code) for code in (2804, 22809, 21903)] == ["2.8.4", "2.28.9", "2.19.3"]


class TestMemory:
    def test_free(self):
        assert checks._memory(joined("NVLink")).ok is True

    def test_taken(self):
        found = Topology((gpu(0), gpu(1, 20 * GIB, (77,))), {}, {})
        fails(checks._memory(found), "GPU 1 20.0 of 141.0 GiB free", "end processes 77")

    def test_lost(self):
        fails(checks._memory(Topology((gpu(0), gpu(1, None)), {}, {})), "GPU 1 does not answer")


class TestNvlink:
    def test_all_joined(self):
        check = checks._nvlink(joined("NVLink", "NVLink"))
        assert check.ok is True
        assert "GPU 0 18 links up" in check.found

    def test_not_all(self):
        fails(checks._nvlink(joined("NVLink", "between CPUs")), "between CPUs: GPUs 0-2", "nvidia-fabricmanager")

    def test_one_gpu(self):
        assert checks._nvlink(Topology((gpu(0),), {}, {})).ok is None


def test_little_shared_memory(monkeypatch):
    monkeypatch.setattr(checks, "shared_memory", lambda: 64 << 20)
    fails(checks._shared_memory(), "0.1 GiB in /dev/shm", "--shm-size")
    monkeypatch.setattr(checks, "shared_memory", lambda: None)
    fails(checks._shared_memory(), "tmpfs")


class TestNetwork:
    HERE = (Interface("eth0", ("10.0.0.1",), True, 25000, False), Interface("lo", ("127.0.0.1",), True, 0, True))

    def test_a_name_that_is_not_here(self, monkeypatch):
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
        fails(checks._network(list(self.HERE)), "NCCL_SOCKET_IFNAME=ib0", "one of eth0, lo")

    def test_a_host_whose_name_is_the_loopbacks(self, monkeypatch):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(checks, "own_addresses", lambda: ["127.0.1.1"])
        check = checks._network(list(self.HERE))
        assert "export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0" in check.found
        assert "eth0 10.0.0.1 25 Gbit/s" in check.found


class Nvml:
    """Stands in for the driver's library: three GPUs, 0 and 1 joined by NVLink, 2 behind the other CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lost: int | None = None) -> None:
        answers = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: 3,
            "nvmlDeviceGetHandleByIndex": self.handle,
            "nvmlDeviceGetName": lambda _: "NVIDIA H200",
            "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=141 * GIB, free=9 * GIB),
            "nvmlDeviceGetComputeRunningProcesses": lambda gpu: [SimpleNamespace(pid=100 + gpu)],
            "nvmlDeviceGetNvLinkState": self.link,
            "nvmlDeviceGetP2PStatus": self.status,
            "nvmlDeviceGetTopologyCommonAncestor": lambda one, other: pynvml.NVML_TOPOLOGY_SYSTEM,
        }
        self.lost = lost
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, name, answer)

    def handle(self, index: int) -> int:
        if index == self.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    def link(self, gpu: int, link: int) -> int:
        if gpu == 2 or link >= 4:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return pynvml.NVML_FEATURE_ENABLED if link < 3 else pynvml.NVML_FEATURE_DISABLED

    def status(self, one: int, other: int, kind: int) -> int:
        # The driver's library takes a number, and pynvml hands on what it got: a tuple ended `doctor` on two GPUs.
        near = {one, other} == {0, 1} or ctypes.c_uint(kind).value == 0  # which reads peers' memory
        return pynvml.NVML_P2P_STATUS_OK if near else pynvml.NVML_P2P_STATUS_NOT_SUPPORTED


def test_topology(monkeypatch):
    Nvml(monkeypatch)
    found = topology()
    assert found.paths == {(0, 1): "NVLink", (0, 2): "between CPUs", (1, 2): "between CPUs"}
    assert found.peers == dict.fromkeys(found.paths, True)
    assert [each.links for each in found.gpus] == [3, 3, None]
    assert [each.processes for each in found.gpus] == [(100,), (101,), (102,)]


def test_a_lost_gpu_hides_no_other(monkeypatch):
    Nvml(monkeypatch, lost=1)
    found = topology()
    assert found.gpus[1].free is None
    assert set(found.paths) == {(0, 2)}
    fails(checks._memory(found), "GPU 1 does not answer")


def test_no_driver(monkeypatch):
    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert topology() is None


def test_without_a_reader_no_library_is_called_damaged(monkeypatch):
    monkeypatch.setitem(sys.modules, "elftools.elf.elffile", None)
    (check,) = checks._packages()
    fails(check, "not looked at", "pip install pyelftools")
