"""Where metrics go: to Ray's own, which its agents export, or to a registry and an endpoint of prometheus_client."""

from __future__ import annotations

import errno
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from moe_dist.errors import ConfigError, InstallationError

OF_LAYERS = ("rank", "layer", "exchange", "backend")
# Stages last from microseconds (decode) to tenths of a second (prefill, or a CPU).
SECONDS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5)
MOST_PORT = 65535
HOSTS = "127.0.0.1, or another address or name of this machine"


@dataclass(frozen=True)
class Metric:
    kind: Literal["counter", "gauge", "histogram"]
    name: str
    says: str
    labels: tuple[str, ...]


METRICS = {
    "steps": Metric("counter", "moe_dist_steps_total", "Steps of a layer on this rank.", OF_LAYERS),
    "graph_replays": Metric(
        "counter", "moe_dist_graph_replays_total", "Steps of a layer that were replays of a CUDA graph.", OF_LAYERS
    ),
    "tokens": Metric("counter", "moe_dist_tokens_total", "Tokens of this rank that a layer was given.", OF_LAYERS),
    "stage_seconds": Metric(
        "histogram", "moe_dist_stage_seconds", "Seconds that a stage of a step took.", (*OF_LAYERS, "stage")
    ),
    "rows": Metric(
        "gauge", "moe_dist_rows", "Pairs of a token and an expert that this rank computed in the last step.", OF_LAYERS
    ),
    "expert_imbalance_ratio": Metric(
        "gauge", "moe_dist_expert_imbalance_ratio", "Pairs of this rank's busiest expert over their mean.", OF_LAYERS
    ),
    "failures": Metric(
        "counter", "moe_dist_failures_total", "Errors that a step or a group of ranks ended with.",
        ("rank", "failed_rank", "operation", "error"),
    ),
    "restarts": Metric("counter", "moe_dist_restarts_total", "Groups of ranks started after one had failed.", ()),
}  # fmt: skip


class Sink(Protocol):
    port: int | None

    def add(self, key: str, labels: dict[str, str], amount: float) -> None: ...

    def observe(self, key: str, labels: dict[str, str], value: float) -> None: ...

    def set(self, key: str, labels: dict[str, str], value: float) -> None: ...

    def close(self) -> None: ...


def make_sink(port: int | None, host: str, registry: Any) -> Sink:
    """Ray's where this process is connected to a cluster, else prometheus_client's. See Metrics."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        if port is not None or registry is not None:
            field, value = ("port", port) if port is not None else ("registry", type(registry).__name__)
            raise ConfigError(field, value, "Ray exports the metrics of its processes itself", "None")
        return RaySink()
    return PrometheusSink(port, host, registry)


class RaySink:
    """ray.util.metrics: the agent of each node exports what its processes count."""

    port: int | None = None

    def __init__(self) -> None:
        from ray.util import metrics

        self._made: dict[str, Any] = {}
        for key, metric in METRICS.items():
            given: dict[str, Any] = {"description": metric.says, "tag_keys": metric.labels}
            if metric.kind == "histogram":
                given["boundaries"] = list(SECONDS)
            kinds = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}
            self._made[key] = kinds[metric.kind](metric.name, **given)

    def add(self, key: str, labels: dict[str, str], amount: float) -> None:
        if amount:  # Ray's counters refuse 0
            self._made[key].inc(amount, tags=labels)

    def observe(self, key: str, labels: dict[str, str], value: float) -> None:
        self._made[key].observe(value, tags=labels)

    def set(self, key: str, labels: dict[str, str], value: float) -> None:
        self._made[key].set(value, tags=labels)

    def close(self) -> None:
        pass


class PrometheusSink:
    """A registry of its own and an HTTP endpoint, or the registry of a program that has one already."""

    def __init__(self, port: int | None, host: str, registry: Any) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise InstallationError(
                f"{error}; metrics need the extra `metrics`: pip install moe_dist[metrics]"
            ) from None
        self._registry = prometheus_client.CollectorRegistry() if registry is None else registry
        kinds = {"counter": prometheus_client.Counter, "gauge": prometheus_client.Gauge}
        self._made: dict[str, Any] = {}
        for key, metric in METRICS.items():
            given = metric.name, metric.says, metric.labels
            if metric.kind == "histogram":
                self._made[key] = prometheus_client.Histogram(*given, registry=self._registry, buckets=SECONDS)
            else:
                self._made[key] = kinds[metric.kind](*given, registry=self._registry)
        self.port: int | None = None
        self._server: Any = None
        if port is not None:
            self._serve(prometheus_client, port, host)

    def _serve(self, client: Any, port: int, host: str) -> None:
        local_rank = os.environ.get("LOCAL_RANK", "0")
        offset = int(local_rank) if local_rank.isdecimal() else 0
        if type(port) is not int or not 0 <= port <= MOST_PORT - offset:
            raise ConfigError("port", port, "is none for this rank's metrics", f"0 (any) to {MOST_PORT - offset}")
        if not isinstance(host, str):
            raise ConfigError("host", host, f"is {type(host).__name__}", HOSTS)
        try:
            self._server, _ = client.start_http_server(port + offset if port else 0, host, self._registry)
        except OSError as error:
            self._forget()
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                rule = f"is no address of this machine: {error.strerror or error}"
                raise ConfigError("host", host, rule, HOSTS) from None
            place = f"{host}:{port + offset}"
            raise ConfigError("port", place, f"can't be listened on: {error.strerror or error}", "a free one") from None
        self.port = self._server.server_port

    def _with(self, key: str, labels: dict[str, str]) -> Any:
        return self._made[key].labels(**labels) if labels else self._made[key]

    def add(self, key: str, labels: dict[str, str], amount: float) -> None:
        self._with(key, labels).inc(amount)

    def observe(self, key: str, labels: dict[str, str], value: float) -> None:
        self._with(key, labels).observe(value)

    def set(self, key: str, labels: dict[str, str], value: float) -> None:
        self._with(key, labels).set(value)

    def _forget(self) -> None:
        for made in self._made.values():
            self._registry.unregister(made)
        self._made.clear()

    def close(self) -> None:
        """End the endpoint, and take what was counted out of a registry that others go on with."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        self._forget()
