"""The clock on a device that tests play: which iterations count, and behind which sleep."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from moe_dist.bench import clock
from moe_dist.bench.clock import (
    CHAINED,
    EMPTY_STEPS,
    FEWEST_CHAINED,
    MOST_CYCLES,
    SLEEP_CYCLES,
    chain_length,
    time_chain,
    time_nothing,
    time_steps,
)
from moe_dist.comm import Comm
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

    def idle(self) -> bool:
        """Whether the stream has nothing to do."""
        return False

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
    assert ["some times of theirs hold its launches" in text for text in said] == [True]
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


def played(monkeypatch, launching: int) -> Device:
    device = Device(launching)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "_sleep", device.sleep)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(query=device.idle))
    return device


class TestQueue:
    def test_its_steps_are_launched_one_behind_another(self, monkeypatch):
        """One alignment for all of them, and a time that is divided by their number."""
        device = played(monkeypatch, 0)
        assert time_chain(device, device.step, 32, queued=True) == 32 * 1000 / 32
        assert device.sleeps == [SLEEP_CYCLES]
        assert device.calls == 32
        assert time_chain(device, device.step, 4, queued=False) == 36 * 1000 / 4
        assert device.sleeps == [SLEEP_CYCLES, 0]

    def test_its_first_step_is_launched_before_the_stream_gets_there(self, monkeypatch):
        device = played(monkeypatch, 3 * SLEEP_CYCLES)
        time_chain(device, device.step, 32, queued=True)
        assert device.sleeps == [SLEEP_CYCLES, 2 * SLEEP_CYCLES, 4 * SLEEP_CYCLES]

    def test_a_stream_that_runs_dry_between_two_steps_counts_only_where_that_is_told(self, monkeypatch):
        """A longer sleep gives the host time to get ahead."""
        device = played(monkeypatch, 0)
        device.idle = lambda: device.sleeps[-1] < 3 * SLEEP_CYCLES and device.calls % 32 == 7  # once in a queue
        time_chain(device, device.step, 32, queued=True)
        assert device.sleeps == [SLEEP_CYCLES, 2 * SLEEP_CYCLES, 4 * SLEEP_CYCLES]
        device.idle = lambda: device.calls % 32 == 31
        with collecting() as said:
            time_chain(device, device.step, 32, queued=True)
        assert ["some chained_us hold its launches" in text for text in said] == [True]
        device.sleeps.clear()
        time_chain(device, device.step, 32, queued=False)  # launches are part of an eager step
        assert device.sleeps == [0]

    def test_on_a_cpu_it_is_the_mean_of_its_steps(self, monkeypatch):
        now = iter([10.0, 10.5])
        monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
        calls = []
        assert time_chain(Comm.single("cpu"), lambda: calls.append(1), 8, queued=False) == pytest.approx(5e5 / 8)
        assert len(calls) == 8

    @pytest.mark.parametrize(
        ("kind", "step_us", "steps"),
        [
            ("cuda", 50.0, CHAINED), ("cuda", 62_500.0, CHAINED), ("cuda", 100_000.0, 20),
            ("cuda", 1e9, FEWEST_CHAINED),
            ("cpu", 0.0, CHAINED), ("cpu", 900.0, CHAINED), ("cpu", 3_000.0, 10), ("cpu", 14_000.0, FEWEST_CHAINED),
        ],
    )  # fmt: skip
    def test_it_is_shorter_where_steps_are_long(self, kind, step_us, steps):
        device = Device(0)
        device.device = torch.device(kind)
        device.agree_max = lambda value: max(value, 2)
        assert chain_length(device, step_us) == steps

    def test_the_slowest_rank_decides(self):
        device = Device(0)
        device.agree_max = lambda value: max(value, 100_000)
        assert chain_length(device, 50.0) == 20


def test_a_step_that_does_nothing_takes_what_the_clock_takes(monkeypatch):
    now = iter([0.0, 1e-6] * (EMPTY_STEPS - 1) + [0.0, 1.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    assert time_nothing(Comm.single("cpu"), queued=False) == pytest.approx(1.0)  # the median
    assert next(now, None) is None
