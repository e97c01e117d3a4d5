"""What is asked of the machine: memory, containers, the GPUs' driver."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pynvml
import pytest

from moe_dist.commands import examined
from moe_dist.commands.doctor import print_doctor
from moe_dist.commands.terminal import Terminal
from moe_dist.errors import ConfigError
from moe_dist.machine import machine
from moe_dist.machine.machine import Driver, Gpu, Machine, available_memory, container_memory, cpu_name, nvidia_driver


def test_a_machine_without_a_gpu():
    found = Machine.detect("cpu")
    assert (found.device, found.device_name, found.devices) == ("cpu", "cpu", 1)
    assert found.name == cpu_name()
    assert 1 << 20 < found.room <= psutil.virtual_memory().total


def test_a_gpu_has_the_memory_that_it_has():
    assert Machine("cuda", 4, "NVIDIA H200", (9, 0), 141 << 30).room == 141 << 30
    assert Machine("cuda", 4, "NVIDIA H200").room == 0


def test_an_unknown_device():
    with pytest.raises(ConfigError, match="device = 'tpu': unknown"):
        Machine.detect("tpu")


def test_a_containers_limit_is_memory_s_limit(monkeypatch):
    monkeypatch.setattr(machine, "container_memory", lambda: [1000, 2000])
    assert available_memory() == 1000
    monkeypatch.setattr(machine, "container_memory", list)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=7))
    assert available_memory() == 7


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/pod/container\n")
    inner = tmp_path / "pod" / "container"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("10\n")
    assert container_memory(tmp_path, membership) == []
    (inner.parent / "memory.max").write_text("1000\n")
    (inner.parent / "memory.current").write_text("600\n")
    (inner.parent / "memory.stat").write_text("anon 1\ninactive_file 250\n")
    assert container_memory(tmp_path, membership) == [650]
    membership.write_text("5:cpu:/x\n4:memory:/pod\n")
    first = tmp_path / "memory" / "pod"
    first.mkdir(parents=True)
    (first / "memory.limit_in_bytes").write_text("500\n")
    (first / "memory.usage_in_bytes").write_text("450\n")
    (first / "memory.stat").write_text("total_inactive_file 0\n")
    assert container_memory(tmp_path, membership) == [50]


class Nvml:
    """Stands in for the driver's library: three GPUs, of which the last has fallen off the bus."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = 0
        answers = {
            "nvmlInit": lambda: self.count(1),
            "nvmlShutdown": lambda: self.count(-1),
            "nvmlSystemGetDriverVersion": lambda: "580.159.04",
            "nvmlDeviceGetCount": lambda: 3,
            "nvmlDeviceGetHandleByIndex": self.handle,
            "nvmlDeviceGetName": lambda _: "NVIDIA H200",
            "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=141 << 30, free=140 << 30),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, name, answer)

    def count(self, step: int) -> None:
        self.open += step

    def handle(self, index: int) -> int:
        if index == 2:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index


class TestDriver:
    def test_none(self, monkeypatch):
        def missing():
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

        monkeypatch.setattr(pynvml, "nvmlInit", missing)
        assert nvidia_driver() is None

    def test_a_gpu_that_does_not_answer_hides_no_other(self, monkeypatch):
        nvml = Nvml(monkeypatch)
        good = Gpu("NVIDIA H200", 141 << 30)
        assert nvidia_driver() == Driver("580.159.04", (good, good, Gpu("GPU 2: GPU is lost", None)))
        assert nvml.open == 0

    def test_one_that_stops_answering(self, monkeypatch):
        def unknown():
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

        nvml = Nvml(monkeypatch)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", unknown)
        assert nvidia_driver() is None
        assert nvml.open == 0

    def test_doctor_says_what_it_has(self, monkeypatch, capsys):
        Nvml(monkeypatch)
        found = examined.examine()
        assert found["driver"]["version"] == "580.159.04"
        assert [gpu["memory_gib"] for gpu in found["driver"]["gpus"]] == [141.0, 141.0, None]
        print_doctor(Terminal(), found)
        said = "NVIDIA driver 580.159.04 with 2 × NVIDIA H200 of 141.0 GiB, GPU 2: GPU is lost"
        assert said in " ".join(capsys.readouterr().out.split())
