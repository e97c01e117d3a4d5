"""Metrics of layers for Prometheus: through Ray's own metrics in a process of Ray, else at an endpoint of the process.

They hang on a layer as hooks, so that a layer which nobody watches has none of it in its step. Names, units and labels
are described in docs/metrics.md.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from moe_dist.engine import replays
from moe_dist.engine.layer import MoELayer, Path
from moe_dist.engine.stack import MoEStack
from moe_dist.errors import ConfigError, RankFailure
from moe_dist.runtime import failed_groups
from moe_dist.runtime.metric_sinks import Sink, make_sink
from moe_dist.step import LayerRows, Stages, TokenRows
from moe_dist.step.stages import Marks, totals_us

MOST_PENDING = 16  # steps that a GPU has not finished; more are dropped, since the host waits for none
LABELS = ("rank", "layer", "exchange", "backend")

Labels = dict[str, str]


class Metrics:
    """Counts and times of these layers from now on, until `close`.

        with Metrics(stack, port=9400):
            serve(stack)

    Layers are numbered in the order in which they are given, those of a stack in theirs. Without any it has failures
    and restarts of groups of ranks alone, for the program that starts them. Replays of a StepGraph are counted where
    the host launches them; what happens in them, stages and rows, is not seen. Graphs of a program's own are not.
    """

    def __init__(
        self,
        *modules: MoELayer | MoEStack,
        every: int = 1,
        port: int | None = None,
        host: str = "127.0.0.1",
        registry: Any = None,
    ) -> None:
        """Stages and rows are taken of each `every`-th step of a layer, which costs some microseconds a stage; tokens,
        steps and failures of all. In a process that Ray knows they go to ray.util.metrics, which takes neither port nor
        registry. In any other they are at http://HOST:PORT/metrics, the port of this machine's first rank; rank r of
        the machine has PORT + r. `registry`: one of prometheus_client that the program serves itself.

        Raises ConfigError for another kind of module, for an `every` or a port that can't be and for a port that is
        taken, InstallationError without prometheus_client.
        """
        if type(every) is not int or every < 1:
            raise ConfigError("every", every, "is the number of steps from one to the next that is looked at", "1 …")
        layers = [layer for module in modules for layer in _layers_of(module)]
        self._every, self._layers = every, layers
        self._seen = [0] * len(layers)
        self._pending: deque[_Watched] = deque(maxlen=MOST_PENDING)
        self._sink: Sink = make_sink(port, host, registry)
        self._handles: list[RemovableHandle] = []
        for number, layer in enumerate(layers):
            self._handles += [
                layer.register_forward_pre_hook(partial(self._before, number), with_kwargs=True),
                layer.register_forward_hook(partial(self._after, number), with_kwargs=True, always_call=True),
            ]
        failed_groups.listeners.append(self)
        if layers:
            replays.listeners.append(self)

    @property
    def port(self) -> int | None:
        """Where this process's endpoint listens; None where it has none."""
        return self._sink.port

    def _before(self, number: int, layer: MoELayer, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Put a clock into this step, if it is one to be looked at and has none of its own."""
        stages = named.get("stages")
        if named.get("captured") or (stages is not None and stages.on) or not self._handles:
            return None
        self._seen[number] += 1
        if self._seen[number] % self._every == 0:
            return given, {**named, "stages": _Watched(self, number, layer)}
        return None

    def _after(self, number: int, layer: MoELayer, given: Any, named: Mapping[str, Any], y_TH: Any) -> None:
        error = sys.exception()
        if not self._handles:  # closed; a copy of the layer has kept the hooks
            return
        if y_TH is None and error is not None:
            self._failed(error, str(layer.comm.rank))
            return
        if named.get("captured"):
            return
        stages = named.get("stages")
        watched = stages if isinstance(stages, _Watched) and stages.owner is self else None
        labels = _labels(number, layer, None if watched is None else watched.path)
        self._sink.add("steps", labels, 1)
        self._sink.add("tokens", labels, len(y_TH))
        if watched is not None:
            self._pending.append(watched)
        self._take()

    def replayed(self, layer: Any, tokens: int, bucket: int) -> None:
        """Count a replay of a layer or a stack, on the host."""
        for number, each in self._watched_in(layer):
            labels = _labels(number, each, each.path(bucket))
            for key, amount in (("steps", 1), ("graph_replays", 1), ("tokens", tokens)):
                self._sink.add(key, labels, amount)

    def replay_failed(self, layer: Any, error: Exception) -> None:
        """Count it once, however many layers there are in it."""
        for _, each in self._watched_in(layer)[:1]:
            self._failed(error, str(each.comm.rank))

    def _watched_in(self, layer: Any) -> list[tuple[int, MoELayer]]:
        """The layers of it that are watched, each with its number, which their hooks know; a copy has its
        original's."""
        found = []
        for each in layer.layers if isinstance(layer, MoEStack) else [layer]:
            hooks = each._forward_hooks.values() if isinstance(each, MoELayer) else ()
            own = [hook for hook in hooks if isinstance(hook, partial) and hook.func == self._after]
            found += [(hook.args[0], each) for hook in own[:1]]
        return found

    def _take(self) -> None:
        """What has become known of earlier steps; never waits for a device."""
        while self._pending and self._pending[0].ready():
            watched = self._pending.popleft()
            labels = _labels(watched.number, watched.layer, watched.path)
            for stage, microseconds in totals_us(watched.marks).items():
                if microseconds:
                    self._sink.observe("stage_seconds", labels | {"stage": stage}, microseconds * 1e-6)
            if (counts := watched.counts()) is None:
                continue
            self._sink.set("rows", labels, sum(counts))
            if sum(counts):
                self._sink.set("expert_imbalance_ratio", labels, max(counts) * len(counts) / sum(counts))

    def failed(self, error: BaseException) -> None:
        """Count a failure that no watched layer has raised."""
        self._failed(error, "")

    def _failed(self, error: BaseException, rank: str) -> None:
        told = (str(error.rank), error.op) if isinstance(error, RankFailure) else ("", "")
        labels = {"rank": rank, "failed_rank": told[0], "operation": told[1], "error": type(error).__name__}
        self._sink.add("failures", labels, 1)

    def restarted(self) -> None:
        """Count a group of ranks that was started after one had failed."""
        self._sink.add("restarts", {}, 1)

    def close(self) -> None:
        """Take the hooks away and end the endpoint. May be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for listeners in (failed_groups.listeners, replays.listeners):
            if self in listeners:
                listeners.remove(self)
        self._take()
        self._sink.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Metrics:
        """A copy of a watched layer is counted with the original."""
        return self


class _Watched(Stages):
    """The clock of one step, and the pairs of a token and an expert that came to this rank."""

    def __init__(self, owner: Metrics, number: int, layer: MoELayer) -> None:
        super().__init__(True, layer.comm.device)
        self.owner, self.number, self.layer = owner, number, layer
        self.path: Path | None = None
        self.marks: Marks = []
        self._counts: Tensor | None = None
        self._copied: Any = None

    def saw(self, path: Any, rows: TokenRows) -> None:
        """Count each local expert's pairs, on the device. Slots of -1 are no expert of this rank. Of a whole layer's
        kernel nobody knows what came to it."""
        self.path = path
        if isinstance(rows, LayerRows):
            return
        experts = len(self.layer.plan.placement.experts_of(self.layer.comm.rank))
        places = rows.slots_RK.flatten().long() + 1
        # Not bincount, which makes the host wait for the device.
        counts = places.new_zeros(experts + 1).scatter_add_(0, places, torch.ones_like(places))[1:]
        if counts.is_cuda:
            here = torch.empty(counts.shape, dtype=counts.dtype, device="cpu", pin_memory=True)
            counts = here.copy_(counts, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._counts = counts

    def ready(self) -> bool:
        self.marks = self.marks or self.take()
        last = self.marks[-1][1] if self.marks else None
        events: list[Any] = [event for event in (last, self._copied) if hasattr(event, "query")]
        return all(event.query() for event in events)

    def counts(self) -> list[int] | None:
        """By local expert; None where nobody has counted."""
        return None if self._counts is None else [int(count) for count in self._counts.tolist()]


def _layers_of(module: Any) -> list[MoELayer]:
    if isinstance(module, MoELayer):
        return [module]
    if isinstance(module, MoEStack):
        return list(module.layers)
    raise ConfigError("module", type(module).__name__, "has no metrics", "MoELayer, MoEStack")


def _labels(number: int, layer: MoELayer, path: Path | None) -> Labels:
    """What ran is known where it was looked at; else it is what runs in the largest steps."""
    place = -1 if path is None else next(i for i, each in enumerate(layer.paths) if each is path)
    choice = layer.plan.choices[place]
    names = (str(layer.comm.rank), str(number), choice.exchange, choice.backend)
    return dict(zip(LABELS, names, strict=True))
