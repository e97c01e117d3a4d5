"""The clock on a device that tests play: which iterations count, and behind which sleep."""

from __future__ import annotations

import warnings

import pytest
import torch

from moe_dist.bench import clock
from moe_dist.bench.clock import MOST_CYCLES, SLEEP_CYCLES, time_steps
from moe_dist.messages.notices import collecting


class Device:
    """A stream whose host needs `launching` cycles, and one more rank, which needs `other`."""

    device = torch.device("cuda")

    def __init__(self, launching: int, other: int = 0) -> None:
        self.launching, self.other = launching, other
        self.sleeps: list[int] = []
        self.calls = 0

    def barrier(self) -> None:
        self.sleeps.append(0)

    def align(self) -> None:
        pass

    def sleep(self, cycles: int) -> None:
        self.sleeps[-1] = cycles

    def step(self) -> None:
        self.calls += 1

    def agree_max(self, value: int) -> int:
        return max(value, int(self.sleeps[-1] < self.other))

    def event(self, enable_timing: bool) -> Device:
        assert enable_timing
        return self

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return self.sleeps[-1] < self.launching

    def elapsed_time(self, _: Device) -> float:
        return float(self.calls)


def timed(monkeypatch, device: Device, queued: bool = True, iters: int = 3) -> list[float]:
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "_sleep", device.sleep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return time_steps(device, device.step, iters, queued)


def test_an_early_host_is_timed_at_once(monkeypatch):
    device = Device(SLEEP_CYCLES)
    assert timed(monkeypatch, device) == [1000, 2000, 3000]
    assert device.sleeps == [SLEEP_CYCLES] * 3


@pytest.mark.parametrize("late", ["this rank", "another"])
def test_iterations_count_where_every_host_was_early(monkeypatch, late):
    device = Device(3 * SLEEP_CYCLES) if late == "this rank" else Device(0, other=3 * SLEEP_CYCLES)
    assert timed(monkeypatch, device) == [3000, 4000, 5000]
    assert device.sleeps == [SLEEP_CYCLES, 2 * SLEEP_CYCLES, *[4 * SLEEP_CYCLES] * 3]


def test_what_comes_before_is_not_timed_and_comes_again_where_an_iteration_is_repeated(monkeypatch):
    device, numbers = Device(3 * SLEEP_CYCLES), []
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "_sleep", device.sleep)

    def before(number: int) -> None:
        numbers.append((number, device.calls, len(device.sleeps)))  # the ranks have not met yet

    time_steps(device, device.step, 3, queued=True, before=before)
    assert numbers == [(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 3, 3), (2, 4, 4)]
    device.device, device.calls = torch.device("cpu"), 0
    numbers.clear()
    time_steps(device, device.step, 2, queued=True, before=before)
    assert [(number, calls) for number, calls, _ in numbers] == [(0, 0), (1, 1)]


def test_a_host_that_is_always_late_is_told_of(monkeypatch):
    device = Device(MOST_CYCLES + 1)
    with collecting() as said:
        assert len(timed(monkeypatch, device)) == 3
    assert ["too late to time graphs" in text for text in said] == [True]
    assert max(device.sleeps) == MOST_CYCLES


def test_eager_steps_hold_their_launches(monkeypatch):
    device = Device(SLEEP_CYCLES)
    assert timed(monkeypatch, device, queued=False) == [1000, 2000, 3000]
    assert device.sleeps == [0, 0, 0]


def test_a_cpu_has_no_sleep(monkeypatch):
    monkeypatch.setattr(clock, "_on_device", None)
    device = Device(0)
    device.device = torch.device("cpu")
    assert len(time_steps(device, device.step, 2, queued=True)) == 2
    assert device.calls == 2
