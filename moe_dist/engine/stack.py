"""MoE layers one behind another, each added to what it was given: what serving runs, and one CUDA graph can hold."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from moe_dist.comm import Comm
from moe_dist.engine.agreement import of_stack, stack_facts
from moe_dist.engine.inputs import (
    NOT_TRACED,
    check_bucket,
    check_gradient,
    check_not_exported,
    check_routing,
    check_tokens,
)
from moe_dist.engine.layer import MoELayer
from moe_dist.errors import ConfigError
from moe_dist.machine.surroundings import settled
from moe_dist.messages.counts import count_of
from moe_dist.model.routing import Routing
from moe_dist.step import NO_STAGES, Stages, Support

Runs = Callable[[MoELayer, Tensor, Routing | None], Tensor]

FORM = "one Routing for each layer, or None where every layer has a router"


class MoEStack(nn.Module):
    """x_{l+1} = x_l + layer_l(x_l, routing_l), the sum in the spec's dtype. Forward is collective.

    The layers share one communicator, the hidden size, the dtype and the token layout; placements, exchanges, backends
    and experts may differ. All of them use the one workspace of their thread, so a stack needs the scratch of its
    largest layer.
    """

    def __init__(self, layers: Iterable[MoELayer]) -> None:
        """Raises ConfigError for no layer, for what is none, and for the first layer that does not go with layer 0."""
        super().__init__()
        if isinstance(layers, MoELayer):
            raise ConfigError("layers", "one layer", "a stack is made of several or of a list with one", "[layer]")
        if not isinstance(layers, Iterable):
            raise ConfigError("layers", type(layers).__name__, "is no list of them", "a list of MoELayer")
        given = list(layers)
        _check_alike(given)
        self.layers: Sequence[MoELayer] = nn.ModuleList(given)  # type: ignore[assignment]
        self.comm: Comm = given[0].comm

    def forward(
        self,
        x_TH: Tensor,
        routings: Sequence[Routing] | None = None,
        *,
        max_tokens_per_rank: int | None = None,
        captured: bool = False,
        stages: Stages = NO_STAGES,
    ) -> Tensor:
        """[T, H] in the spec's dtype to [T, H], the last layer's sum. `routings`: one for each layer; without them each
        layer's own router decides, from that layer's input.

        Without `max_tokens_per_rank` the ranks agree on a bucket for all layers at once, if any layer needs one. The
        rest is as for MoELayer.forward, with the layer's number in the field of a ConfigError about a routing. In a
        `captured` step the routers send rows of zeros nowhere: those are a graph's padding, and their sums are zeros.
        """
        check_not_exported()
        dynamo = sys.modules.get("torch._dynamo")  # see MoELayer.forward
        forward = self._forward if dynamo is None else dynamo.disable(self._forward, reason=NOT_TRACED)
        y_TH: Tensor = forward(x_TH, routings, max_tokens_per_rank, captured, stages)
        return y_TH

    def _forward(
        self, x_TH: Tensor, routings: Sequence[Routing] | None, bucket: int | None, captured: bool, stages: Stages
    ) -> Tensor:
        self.comm.check_thread()
        self.comm.begin_step()  # one of its own: its ranks may meet before any layer begins
        check_gradient("x", x_TH)
        for number, routing in enumerate(self._one_each(routings) or ()):
            check_gradient(f"routings[{number}].weights", routing.weights_TK)
        with torch.no_grad(), settled(self.comm.device):
            self._check(x_TH, routings, bucket)
            bucket = self._agreed(len(x_TH), bucket)

            def run(layer: MoELayer, x_TH: Tensor, routing: Routing | None) -> Tensor:
                y_TH: Tensor = layer(x_TH, routing, max_tokens_per_rank=bucket, captured=captured, stages=stages)
                return y_TH

            return self._chained(x_TH, routings, captured, run)

    def _agreed(self, tokens: int, bucket: int | None) -> int | None:
        """The bucket of all layers. Layers whose ranks meet at each step find it there."""
        if bucket is not None or not any(layer.needs_bucket and not layer.meets for layer in self.layers):
            return bucket
        alike = self.layers[0].plan.token_layout == "replicated"
        agreements, numbers = [layer.agreement for layer in self.layers], [layer.number for layer in self.layers]
        agreed = self.comm.meet(
            tokens, None, alike, lambda: of_stack(agreements, numbers), lambda: stack_facts(agreements)
        )
        for layer in self.layers:
            layer.met = True
        return agreed

    def _chained(self, x_TH: Tensor, routings: Sequence[Routing] | None, captured: bool, run: Runs) -> Tensor:
        # A row of zeros stays one in every layer, so it is enough to look once.
        padding_T1 = (x_TH == 0).all(1, keepdim=True) if captured and routings is None else None
        for number, layer in enumerate(self.layers):
            routing = None if routings is None else routings[number]
            if padding_T1 is not None and layer.router is not None:
                own: Routing = layer.router(x_TH)
                routing = Routing(own.ids_TK.masked_fill(padding_T1, -1), own.weights_TK)
            try:
                x_TH = x_TH + run(layer, x_TH, routing)
            except ConfigError as error:
                if routings is None or not error.field.startswith("routing."):
                    raise
                raise error.of(error.field.replace("routing", f"routings[{number}]", 1)) from None
        return x_TH

    def warm_up(
        self,
        x_TH: Tensor,
        routings: Sequence[Routing] | None,
        max_tokens_per_rank: int,
        captured: bool = False,
    ) -> None:
        """See MoELayer.warm_up: each layer's, on its real input."""
        bucket = max_tokens_per_rank
        self.comm.check_thread()
        with torch.no_grad(), settled(self.comm.device):
            x_TH, routings = self.checked(x_TH, routings, bucket)

            def run(layer: MoELayer, x_TH: Tensor, routing: Routing | None) -> Tensor:
                layer.warm_up(x_TH, routing, bucket, captured)
                y_TH: Tensor = layer(x_TH, routing, max_tokens_per_rank=bucket, captured=captured)
                return y_TH

            self._chained(x_TH, routings, captured, run)

    def checked(
        self, x_TH: Tensor, routings: Sequence[Routing] | None, bucket: int | None
    ) -> tuple[Tensor, tuple[Routing, ...] | None]:
        """What came in, checked as each layer checks it; no router has been asked."""
        self._check(x_TH, routings, bucket)
        if routings is None:
            return x_TH.detach(), None
        for layer, routing in zip(self.layers, routings, strict=True):
            x_TH, _ = layer.checked(x_TH, routing, bucket)
        return x_TH, tuple(routings)

    def _check(self, x_TH: Tensor, routings: Sequence[Routing] | None, bucket: int | None) -> None:
        """All that needs no look at values, before any layer runs."""
        check_tokens(x_TH, self.layers[0].plan.spec, self.comm.device)
        check_bucket(bucket, len(x_TH))
        for number, routing in enumerate(self._one_each(routings) or ()):
            try:
                check_routing(routing, len(x_TH), self.layers[number].plan.spec, self.comm.device)
            except ConfigError as error:
                raise error.of(error.field.replace("routing", f"routings[{number}]", 1)) from None

    def _one_each(self, routings: Sequence[Routing] | None) -> Sequence[Routing] | None:
        if routings is None:
            without = next((number for number, layer in enumerate(self.layers) if layer.router is None), None)
            if without is not None:
                raise ConfigError("routings", None, f"layer {without} has no router of its own", FORM)
            return None
        if not isinstance(routings, (list, tuple)):
            raise ConfigError("routings", type(routings).__name__, "is no list of them", FORM)
        if len(routings) != len(self.layers):
            raise ConfigError(
                "routings", f"{len(routings)} of them", f"the stack has {count_of(len(self.layers), 'layer')}", FORM
            )
        for number, routing in enumerate(routings):
            if not isinstance(routing, Routing):
                raise ConfigError(f"routings[{number}]", type(routing).__name__, "is no Routing", FORM)
        return routings

    @property
    def capturable(self) -> Support:
        """Whether all layers can be captured in one CUDA graph."""
        refusals = [support.reason for layer in self.layers if not (support := layer.capturable).ok]
        return Support(not refusals, "; ".join(dict.fromkeys(refusals)))


def _check_alike(layers: Sequence[MoELayer]) -> None:
    """Raise ConfigError that names the layer and the field."""
    if not layers:
        raise ConfigError("layers", "none", "a stack has at least one", "a list of MoELayer")
    for number, layer in enumerate(layers):
        if not isinstance(layer, MoELayer):
            raise ConfigError(f"layers[{number}]", type(layer).__name__, "is no MoELayer", "MoELayer")
        if layer.comm is not layers[0].comm:
            rule = "is another communicator than layer 0's, and ranks of two groups would cross"
            raise ConfigError(f"layers[{number}].comm", f"rank {layer.comm.rank} of {layer.comm.world}", rule)
        plan, first = layer.plan, layers[0].plan
        for field, own, wanted in (
            ("hidden", plan.spec.hidden, first.spec.hidden),
            ("dtype", plan.spec.dtype, first.spec.dtype),
            ("token_layout", plan.token_layout, first.token_layout),
        ):
            if own != wanted:
                rule = "differs from layer 0's, whose output goes through all layers"
                raise ConfigError(f"layers[{number}].{field}", own, rule, wanted)
