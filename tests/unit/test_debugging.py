"""The debug mode on one rank: values of a routing, and scratch that somebody reads before it is written."""

from __future__ import annotations

import pytest
import torch

from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.errors import ConfigError
from moe_dist.machine.machine import Machine
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.step import Sink, Step, TokenRows
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

SPEC = MoESpec(hidden=128, intermediate=128, num_experts=8, top_k=3)


class Forgetful(TorchBackend):
    """Once told to forget, it leaves the sums of the second half of its rows as they lie."""

    forgets = False

    def forward(self, step: Step, rows: TokenRows, sink: Sink) -> None:
        if not self.forgets:
            return super().forward(step, rows, sink)
        ((start, stop),) = sink.columns()
        sums, kept = sink.target(start, stop), Kept(sink.shape, sink.dtype)
        super().forward(step, rows, kept)
        half = len(rows) // 2
        sums[:half] = kept.y[:half]
        sink.put(start, stop, sums)


class Kept(Sink):
    def target(self, start: int, stop: int) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype)

    def take(self, start: int, stop: int, y_RC: torch.Tensor) -> None:
        self.y = y_RC


def layer_of(debug: bool | None, exchange: str = "ag_rs", quant: str = "fp8_block") -> MoELayer:
    spec = SPEC.with_changes(quant=quant)
    plan = make_plan(spec, ParallelSpec(), exchange=exchange, backend="torch", machine=Machine.detect("cpu"))
    return MoELayer(plan, random_weights(spec, 0), Comm.single(), debug=debug)


def inputs(tokens: int = 6) -> tuple[torch.Tensor, Routing]:
    return Stream("debugged", 0).normal(tokens, 128).bfloat16(), synthetic_routing(SPEC, tokens, "uniform", 0)


def forgetful(debug: bool) -> tuple[MoELayer, torch.Tensor]:
    """A layer that has done one right step, and what that gave."""
    layer = layer_of(debug, "all_to_all")  # whose sums are scratch on one rank too
    layer.paths = tuple(path._replace(backend=Forgetful(path.backend.problem)) for path in layer.paths)
    layer.backend.prepare(layer._weights[0])
    for _ in range(2):  # from the second step on scratch lies in the arena
        right = layer(*inputs())
    layer.backend.forgets = True
    return layer, right


def test_stale_scratch_passes_for_the_result_without_the_debug_mode():
    layer, right = forgetful(debug=False)
    assert torch.equal(layer(*inputs()), right), "the same scratch has the sums of the step before"


def test_stale_scratch_shows_in_the_debug_mode():
    layer, right = forgetful(debug=True)
    with pytest.raises(
        RuntimeError, match=r"NaN at token 3, the first of 3 such, .* scratch that this step did not write"
    ):
        layer(*inputs())
    layer.backend.forgets = False
    assert torch.equal(layer(*inputs()), right)


def test_tokens_that_are_not_finite_are_no_fault_of_scratch():
    layer, (x, routing) = layer_of(True, quant="none"), inputs()
    x[2, 5] = float("nan")
    assert layer(x, routing).isnan().any(1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("exchange", ["local", "ag_rs", "all_to_all", "all_reduce"])
@pytest.mark.parametrize("quant", ["fp8_block", "fp8_tensor_dynamic", "none"])
def test_the_debug_mode_changes_no_bit(exchange, quant):
    plain, debugged = layer_of(False, exchange, quant), layer_of(True, exchange, quant)
    for tokens in (1, 6, 0, 33):
        x, routing = inputs(tokens)
        assert torch.equal(plain(x, routing), debugged(x, routing))


def test_an_expert_that_a_token_has_twice_is_named():
    x, routing = inputs()
    routing.ids_TK[4] = torch.tensor([6, 2, 6])
    layer_of(False)(x, routing)
    with pytest.raises(ConfigError, match=r"routing\.ids = 6: of token 4, place 2, is its expert of place 0 again"):
        layer_of(True)(x, routing)
    routing.weights_TK[4, 2] = 0.0  # as padding that some engines make
    layer_of(True)(x, routing)
    routing.ids_TK[5] = -1  # nobody, three times
    layer_of(True)(x, routing)
