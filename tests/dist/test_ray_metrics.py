"""Metrics of a layer in an actor, as the node's agent exports them to Prometheus."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Iterator

import pytest
import ray

pytestmark = pytest.mark.slow
EXPORTED_S = 90.0  # agents collect every few seconds, and start slowly on a busy machine


@pytest.fixture(scope="module")
def metrics_url() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, logging_level="error",
        log_to_driver=False, configure_logging=False, _metrics_export_port=port,
    )  # fmt: skip
    yield f"http://127.0.0.1:{port}/metrics"
    ray.shutdown()


@ray.remote(num_cpus=0)
class Engine:
    """A program's own actor with a layer of its own."""

    def serve(self, steps: int) -> None:
        import torch

        from moe_dist import Comm, Metrics, MoELayer, MoESpec, ParallelSpec, make_plan
        from moe_dist.workloads.random_weights import random_weights
        from moe_dist.workloads.skews import synthetic_routing

        spec = MoESpec(hidden=128, intermediate=128, num_experts=4, top_k=2)
        plan = make_plan(spec, ParallelSpec(), exchange="local", backend="torch")
        layer = MoELayer(plan, random_weights(spec, 0), Comm.single())
        self.metrics = Metrics(layer)
        for step in range(steps):
            layer(torch.randn(3, 128).bfloat16(), synthetic_routing(spec, 3, "uniform", step))


def exported(url: str, name: str) -> str:
    """The line of a metric, when it is there."""
    deadline = time.monotonic() + EXPORTED_S
    while time.monotonic() < deadline:
        try:
            text = urllib.request.urlopen(url, timeout=5).read().decode()
        except OSError:
            text = ""
        if found := [line for line in text.splitlines() if line.startswith(name)]:
            return found[0]
        time.sleep(1.0)
    pytest.fail(f"{name} was not exported within {EXPORTED_S:.0f} s")


def test_an_actors_metrics_are_exported_by_its_node(metrics_url: str) -> None:
    engine = Engine.remote()
    ray.get(engine.serve.remote(5), timeout=120)
    line = exported(metrics_url, "ray_moe_dist_tokens_total{")
    assert line.endswith(" 15.0")
    for label in ('rank="0"', 'layer="0"', 'exchange="local"', 'backend="torch"'):
        assert label in line
    assert exported(metrics_url, "ray_moe_dist_stage_seconds_count{").endswith(" 5.0")
    assert exported(metrics_url, "ray_moe_dist_rows{").endswith(" 6.0")
