"""benchmarks/local_backends.py without a GPU: a part is timed as the whole is, and a row is right as rows elsewhere
are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from sinks import Scaled

from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.bench import tune
from moe_dist.engine.planning import make_plan
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import shard
from moe_dist.workloads.random_weights import random_weights

SPEC = MoESpec(hidden=128, intermediate=256, num_experts=4, top_k=2)


class Off(TorchBackend):
    """Off by a part of what is right; its step is the whole of it."""

    by = 0.0

    def forward(self, step, rows, sink):
        super().forward(step, rows, Scaled(sink, 1 + self.by))

    def pipeline(self, step, rows):
        return SimpleNamespace(prepare=lambda: (None, None), gemm1=lambda *_: None, gemm2=lambda *_: None)


@pytest.fixture
def benchmark(monkeypatch):
    path = Path(__file__).parents[2] / "benchmarks" / "local_backends.py"
    spec = importlib.util.spec_from_file_location("local_backends", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "kernels_us", lambda call: call() is None or {})
    monkeypatch.setattr(module, "rest", lambda: None)
    monkeypatch.setattr(module, "SEEDS", 2)
    monkeypatch.setattr(module, "OURS", ("torch",))
    return module


@pytest.fixture
def clocked(benchmark, monkeypatch):
    """(calls, iterations) of every timing; a call takes 10 us."""
    found = []

    def clock(calls, warm_up, count, device, iters, capturable=True):
        calls()
        found.append((count, iters))
        return 10.0

    monkeypatch.setattr(tune, "calls_us", clock)
    monkeypatch.setattr(benchmark, "calls_us", clock)
    return found


def measured(benchmark, by: float, rows: int = 64):
    plan = make_plan(
        SPEC, ParallelSpec(ep=2), exchange="ag_rs", backend="torch", payload="unquantized",
        machine=Machine("cpu", 1, "a test's CPU"),
    )  # fmt: skip
    weights = shard(random_weights(SPEC, seed=1), plan.placement, 0)
    backend = Off(plan.problem(0))
    backend.by = by
    backend.prepare(weights)
    return benchmark.measured(plan, plan.parts()[0], weights, backend, rows, {})


def test_gemms_alone_are_timed_as_the_whole_is(benchmark, clocked):
    row = measured(benchmark, 0.0)
    assert clocked == [(tune.FORWARDS, benchmark.ITERS)] * 4  # the whole and its GEMMs, for two seeds
    assert row["gemms_us"] == row["p50_us"] == 10.0


@pytest.mark.parametrize(
    ("rows", "by", "ok"),
    [(64, 0.0, True), (64, 0.009, True), (64, 0.012, False), (8, 0.012, True), (8, 0.017, False)],
)
def test_only_few_pairs_have_a_wider_tolerance(benchmark, clocked, rows, by, ok):
    """1e-2, and half as much again below 16 pairs."""
    row = measured(benchmark, by, rows)
    assert (row["pairs"] < 16) is (rows == 8)
    assert row["err_oracle"] == pytest.approx(by, abs=3e-3)
    assert row["ok"] is ok
