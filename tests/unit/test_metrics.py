"""Metrics of layers as Prometheus reads them, and that a layer which nobody watches does nothing for them."""

from __future__ import annotations

import copy
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from moe_dist import Metrics
from moe_dist.comm import Comm
from moe_dist.engine import graph, replays
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.engine.stack import MoEStack
from moe_dist.errors import ConfigError, RankFailure
from moe_dist.machine.machine import Machine
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.runtime import failed_groups, metric_sinks
from moe_dist.runtime.metrics import _Watched
from moe_dist.step import NO_STAGES, Stages
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

SPEC = MoESpec(hidden=128, intermediate=128, num_experts=8, top_k=2)
COMM = Comm.single()
OF = {"rank": "0", "layer": "0", "exchange": "local", "backend": "torch"}


def layer_of(seed: int = 0) -> MoELayer:
    plan = make_plan(SPEC, ParallelSpec(), exchange="local", backend="torch", machine=Machine.detect("cpu"))
    return MoELayer(plan, random_weights(SPEC, seed), COMM)


def tokens(count: int) -> torch.Tensor:
    return Stream("tokens of a test", 0).normal(count, 128).bfloat16()


def routing_of(count: int) -> Routing:
    return synthetic_routing(SPEC, count, "uniform", 1)


@pytest.fixture
def registry() -> prometheus_client.CollectorRegistry:
    return prometheus_client.CollectorRegistry()


@pytest.fixture
def value(registry) -> Callable[..., float | None]:
    def read(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"moe_dist_{name}", OF | labels)

    return read


class TestOfALayer:
    def test_what_is_counted(self, registry, value):
        layer, routing = layer_of(), routing_of(5)
        with Metrics(layer, registry=registry):
            for _ in range(3):
                layer(tokens(5), routing)
            counts = routing.ids_TK.flatten().bincount(minlength=8)
            assert value("steps_total") == 3
            assert value("tokens_total") == 15
            assert value("rows") == 10
            assert value("expert_imbalance_ratio") == pytest.approx(float(counts.max() / counts.float().mean()))
            for stage in ("gemm1", "gemm2", "activation"):
                assert value("stage_seconds_count", stage=stage) == 3
                assert 0 < value("stage_seconds_sum", stage=stage) < 30

    def test_rows_that_no_expert_gets_are_none(self, registry, value):
        layer, routing = layer_of(), routing_of(5)
        routing.ids_TK[0], routing.ids_TK[1, 0] = -1, -1
        with Metrics(layer, registry=registry):
            layer(tokens(5), routing)
            assert value("rows") == 7

    def test_every_third_step(self, registry, value):
        layer = layer_of()
        with Metrics(layer, registry=registry, every=3):
            for _ in range(7):
                layer(tokens(2), routing_of(2))
            assert value("steps_total") == 7
            assert value("stage_seconds_count", stage="gemm1") == 2

    def test_results_are_the_same(self, registry):
        layer = layer_of()
        plain = layer(tokens(5), routing_of(5))
        with Metrics(layer, registry=registry):
            assert torch.equal(layer(tokens(5), routing_of(5)), plain)

    def test_a_clock_of_the_callers_own_is_left_alone(self, registry, value):
        layer, own = layer_of(), Stages(True)
        with Metrics(layer, registry=registry):
            layer(tokens(2), routing_of(2), stages=own)
        assert own.totals_us()["gemm1"] > 0
        assert value("stage_seconds_count", stage="gemm1") is None

    def test_steps_of_a_graph_are_not_counted(self, registry, value):
        layer = layer_of()
        with Metrics(layer, registry=registry):
            layer(tokens(2), routing_of(2), max_tokens_per_rank=2, captured=True)
            assert value("steps_total") is None

    def test_an_error_is_counted_and_raised(self, registry):
        layer = layer_of()
        with Metrics(layer, registry=registry):
            with pytest.raises(ConfigError):
                layer(tokens(5), routing_of(4))
            told = {"rank": "0", "failed_rank": "", "operation": "", "error": "ConfigError"}
            assert registry.get_sample_value("moe_dist_failures_total", told) == 1

    def test_a_copy_of_a_watched_layer(self, registry, value):
        layer = layer_of()
        with Metrics(layer, registry=registry):
            copied = copy.deepcopy(layer)
            copied(tokens(2), routing_of(2))
            assert value("steps_total") == 1
        copied(tokens(2), routing_of(2))  # goes on where nobody counts any more


@pytest.mark.usefixtures("stand_in_graphs")
class TestReplays:
    def test_each_is_a_step_with_the_tokens_of_the_last_inputs(self, registry, value):
        layer = layer_of()
        with Metrics(layer, registry=registry):
            step = graph.StepGraph(layer, 8, tokens(8), routing_of(8))
            assert value("steps_total") is None  # neither warming up nor the capture
            step(tokens(3), routing_of(3))
            step.replay()
            layer(tokens(5), routing_of(5))
            assert [value(f"{name}_total") for name in ("steps", "graph_replays", "tokens")] == [3, 2, 3 + 3 + 5]
            assert value("stage_seconds_count", stage="gemm1") == 1

    def test_of_a_stack_and_of_copies(self, registry, value):
        stack = MoEStack([layer_of(0), layer_of(1)])
        with Metrics(stack, registry=registry):
            for each in (stack, copy.deepcopy(stack)):
                graph.StepGraph(each, 4, tokens(4), [routing_of(4)] * 2).replay()
            assert [value("graph_replays_total", layer=str(number)) for number in (0, 1, 2)] == [2, 2, None]

    def test_layers_that_are_not_watched(self, registry, value):
        with Metrics(layer_of(), registry=registry):
            graph.StepGraph(layer_of(), 4, tokens(4), routing_of(4)).replay()
            assert value("steps_total") is None

    def test_one_that_fails_is_a_failure_and_no_step(self, registry, value, monkeypatch):
        stack = MoEStack([layer_of(0), layer_of(1)])
        with Metrics(stack, registry=registry):
            step = graph.StepGraph(stack, 4, tokens(4), [routing_of(4)] * 2)
            with pytest.raises(ConfigError):
                step(tokens(5), [routing_of(5)] * 2)
            lost = RankFailure(1, "nvlink, rows", 7, "on purpose")

            def check_window() -> None:
                raise lost

            monkeypatch.setattr(step._layer.comm, "check_window", check_window, raising=False)
            with pytest.raises(RankFailure):
                step.replay()
            refused = {"rank": "0", "failed_rank": "", "operation": "", "error": "ConfigError"}
            failed = {"rank": "0", "failed_rank": "1", "operation": "nvlink, rows", "error": "RankFailure"}
            assert registry.get_sample_value("moe_dist_failures_total", refused) == 1
            assert registry.get_sample_value("moe_dist_failures_total", failed) == 1
            assert value("graph_replays_total") is None

    def test_nobody_is_told_after_the_end(self, registry):
        layer = layer_of()
        step = graph.StepGraph(layer, 4, tokens(4), routing_of(4))
        Metrics(layer, registry=registry).close()
        assert replays.listeners == []
        step.replay()


def test_layers_of_a_stack_have_numbers(registry, value):
    stack = MoEStack([layer_of(0), layer_of(1)])
    with Metrics(stack, registry=registry):
        stack(tokens(3), [routing_of(3), routing_of(3)])
        assert [value("tokens_total", layer=str(number)) for number in (0, 1, 2)] == [3, 3, None]


def test_nothing_is_left_in_a_step_when_it_is_off(registry, value, monkeypatch):
    """Neither a hook nor a clock; the one look at `stages.on` is what a step pays."""
    layer = layer_of()
    before = dict(layer.__dict__), len(layer._forward_hooks), len(layer._forward_pre_hooks)
    metrics = Metrics(layer, registry=registry)
    assert layer._forward_pre_hooks
    metrics.close()
    assert (dict(layer.__dict__), len(layer._forward_hooks), len(layer._forward_pre_hooks)) == before
    monkeypatch.setattr(type(NO_STAGES), "saw", lambda *_: pytest.fail("a step that nobody watches was looked at"))
    monkeypatch.setattr(type(NO_STAGES), "_mark", lambda *_: pytest.fail("a step that nobody watches has a clock"))
    layer(tokens(2), routing_of(2))
    assert value("steps_total") is None


def test_an_unfinished_step_of_a_device_is_not_waited_for():
    watched = _Watched(None, 0, layer_of())
    done = SimpleNamespace(query=lambda: True)
    watched.marks = [("gemm1", done), ("gemm1", SimpleNamespace(query=lambda: False))]
    assert not watched.ready()
    watched.marks[-1] = ("gemm1", done)
    assert watched.ready()
    watched._copied = SimpleNamespace(query=lambda: False)
    assert not watched.ready()


class TestEndpoint:
    def test_prometheus_reads_it(self):
        layer = layer_of()
        with Metrics(layer, port=0) as metrics:
            layer(tokens(2), routing_of(2))
            address = f"http://127.0.0.1:{metrics.port}/metrics"
            with urllib.request.urlopen(address, timeout=10) as answer:
                families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
        assert {"moe_dist_tokens", "moe_dist_stage_seconds", "moe_dist_rows", "moe_dist_failures"} <= set(families)
        (sample,) = (each for each in families["moe_dist_tokens"].samples if each.name.endswith("_total"))
        assert (sample.labels, sample.value) == (OF, 2)
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(address, timeout=10)

    def test_ranks_of_one_machine_have_ports_of_their_own(self, monkeypatch):
        asked: list[int] = []

        def serve(port: int, host: str, registry: Any) -> tuple[Any, None]:
            asked.append(port)
            return SimpleNamespace(server_port=port, shutdown=lambda: None, server_close=lambda: None), None

        monkeypatch.setattr(prometheus_client, "start_http_server", serve)
        monkeypatch.setenv("LOCAL_RANK", "3")
        Metrics(port=9400).close()
        assert asked == [9403]

    def test_a_port_that_is_taken(self, registry):
        with Metrics(port=0) as first, pytest.raises(ConfigError, match=rf"127.0.0.1:{first.port}.*listened on"):
            Metrics(port=first.port, registry=registry)
        Metrics(registry=registry).close()  # the one that failed has left nothing in it

    @pytest.mark.parametrize("given", [{"every": 0}, {"every": True}, {"port": 70000}, {"port": "9400"}, {"port": -1}])
    def test_what_can_not_be(self, given):
        with pytest.raises(ConfigError, match=next(iter(given))):
            Metrics(**given)

    def test_another_module(self):
        for host in ("nosuch.invalid", "192.0.2.1", "", 3):
            with pytest.raises(ConfigError, match=rf"^host = {host!r}: is "):
                Metrics(port=0, host=host)
        with pytest.raises(ConfigError, match=r"Linear.*MoELayer, MoEStack"):
            Metrics(torch.nn.Linear(1, 1))


def test_failures_and_restarts_of_groups(registry, monkeypatch):
    monkeypatch.setattr(failed_groups, "_given_up", False)  # whatever failed in other tests
    with Metrics(registry=registry):
        failed_groups.started()
        assert registry.get_sample_value("moe_dist_restarts_total") == 0
        failed_groups.failed(RankFailure(3, "all_gather", 7, "on purpose"))
        failed_groups.started()
        failed_groups.started()
        told = {"rank": "", "failed_rank": "3", "operation": "all_gather", "error": "RankFailure"}
        assert registry.get_sample_value("moe_dist_failures_total", told) == 1
        assert registry.get_sample_value("moe_dist_restarts_total") == 1
    assert failed_groups.listeners == []


def test_under_ray_it_takes_rays_metrics(monkeypatch):
    """Its own client, with the tags that each metric was made with, and no port."""
    from ray.util import metrics as rays

    seen: dict[str, list[Any]] = {}

    def kind(name: str) -> type:
        class Fake:
            def __init__(self, metric: str, description: str, tag_keys: tuple[str, ...], **_: Any) -> None:
                self.metric, self.tag_keys = metric, tag_keys

            def note(self, amount: float, tags: dict[str, str]) -> None:
                assert set(tags) == set(self.tag_keys)
                seen.setdefault(self.metric, []).append(amount)

            inc = observe = set = note

        return Fake

    for name in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(rays, name, kind(name))
    monkeypatch.setitem(metric_sinks.sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    layer = layer_of()
    with Metrics(layer):
        layer(tokens(4), routing_of(4))
    assert seen["moe_dist_tokens_total"] == [4]
    assert seen["moe_dist_rows"] == [8]
    assert seen["moe_dist_stage_seconds"]
    with pytest.raises(ConfigError, match="port = 9400: Ray exports"):
        Metrics(layer, port=9400)


def test_the_page_has_each_metric_with_its_kind_and_labels():
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "`moe_dist_" in line]
    described = {row[0].strip("`"): row for row in rows if len(row) == 5}
    assert set(described) == {metric.name for metric in metric_sinks.METRICS.values()}
    for metric in metric_sinks.METRICS.values():
        _, kind, _, labels, _ = described[metric.name]
        told = labels.replace("the same and stage", "rank, layer, exchange, backend, stage")
        assert (kind, told) == (metric.kind, ", ".join(metric.labels))
