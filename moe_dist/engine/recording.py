"""Recording where tokens go in a real run, for `--skew file:PATH`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_dist.engine.layer import MoELayer
from moe_dist.engine.router import Router
from moe_dist.engine.stack import MoEStack
from moe_dist.errors import ConfigError
from moe_dist.model.routing import Routing
from moe_dist.workloads.traces import save_trace


class Recorder:
    """What this rank's tokens are routed to, layer by layer and step by step, from now until `close`.

        with Recorder(stack) as recorder:
            for x in batches:
                stack(x)
        recorder.save("routing.pt")

    It is attached to layers, stacks or routers, whose layers are numbered in the order in which they are given. `add`
    takes routings from elsewhere. Each step is copied to host memory, so the host waits for a GPU. A step that runs in
    a CUDA graph calls no Python when it is replayed: a layer that is captured while it is recorded raises ConfigError.
    """

    def __init__(self, *modules: MoELayer | MoEStack | Router) -> None:
        """Raises ConfigError for a module of another kind."""
        self._layers: list[list[Routing]] = []
        self._routed: set[int] = set()  # layers whose own router is about to decide
        self._handles: list[RemovableHandle] = []
        for module in modules:
            self._attach(module)

    def _attach(self, module: nn.Module) -> None:
        if isinstance(module, MoEStack):
            for layer in module.layers:
                self._attach(layer)
            return
        if not isinstance(module, (MoELayer, Router)):
            raise ConfigError("recorder", type(module).__name__, "can't be recorded", "MoELayer, MoEStack, Router")
        number = len(self._layers)
        self._layers.append([])
        if isinstance(module, Router):
            self._handles.append(module.register_forward_hook(partial(self._after_router, number, True)))
            return
        self._handles.append(module.register_forward_pre_hook(partial(self._before_layer, number), with_kwargs=True))
        if module.router is not None:
            self._handles.append(module.router.register_forward_hook(partial(self._after_router, number, False)))

    def _before_layer(self, number: int, layer: MoELayer, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if named.get("captured"):
            rule = "a graph's replays run no Python, so its steps can't be recorded"
            raise ConfigError("captured", True, rule, "Recorder.close() before the capture, or Recorder.add")
        routing = given[1] if len(given) > 1 else named.get("routing")
        if isinstance(routing, Routing):
            self.add(routing, number)
        elif routing is None:
            self._routed.add(number)

    def _after_router(self, number: int, always: bool, router: nn.Module, given: Any, routing: Routing) -> None:
        """A layer asks its router for other things than steps too, such as warming up."""
        if always or number in self._routed:
            self._routed.discard(number)
            self.add(routing, number)

    def add(self, routing: Routing, layer: int = 0) -> None:
        """One step of a layer, of any number of tokens. Layers are numbered from 0; one behind the last is a new one.
        Raises ConfigError for what is no Routing, and for a number beyond that."""
        if not isinstance(routing, Routing):
            raise ConfigError("routing", type(routing).__name__, "is no Routing", "Routing(ids_TK, weights_TK)")
        if type(layer) is not int or not 0 <= layer <= len(self._layers):
            raise ConfigError("layer", layer, "layers are numbered without gaps", f"0 to {len(self._layers)}")
        if layer == len(self._layers):
            self._layers.append([])
        ids_TK, weights_TK = routing.ids_TK.detach(), routing.weights_TK.detach()
        self._layers[layer].append(Routing(ids_TK.to("cpu", copy=True), weights_TK.to("cpu", copy=True)))

    def save(self, path: Path | str) -> None:
        """A new file that `file:PATH` reads. Of several ranks each saves its own, and `traces.join_traces` makes one of
        them. Raises as `traces.save_trace`."""
        save_trace(path, self._layers)

    def close(self) -> None:
        """Record nothing more; what was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
