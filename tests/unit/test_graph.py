"""What a captured step asks of its layer, without a GPU: the capture itself is replaced by one call."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moe_dist.comm import Comm
from moe_dist.engine import graph
from moe_dist.engine.layer import MoELayer
from moe_dist.errors import ConfigError, RankFailure, UnsupportedError
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec
from moe_dist.step import NO_STAGES, Support, workspace_of

SPEC = MoESpec(hidden=128, intermediate=128, num_experts=4, top_k=2)


class Layer:
    """Writes down each call: its inputs, whether it runs as captured and whether the stages' clock is on."""

    def __init__(self, capturable: Support = Support(True)) -> None:  # noqa: B008
        self.plan, self.capturable = SimpleNamespace(spec=SPEC), capturable
        self.comm, self.router, self.debug = Comm.single(), None, False
        self.calls: list[SimpleNamespace] = []

    def __call__(self, x, routing, max_tokens_per_rank, captured=False, stages=NO_STAGES):
        seen = {"x": x.clone(), "ids": routing.ids_TK.clone(), "weights": routing.weights_TK.clone()}
        how = {"captured": captured, "staged": stages.on, "bucket": max_tokens_per_rank}
        self.calls.append(SimpleNamespace(**seen, **how))
        with stages("gemm1"):
            return x * 2

    warm_up = __call__
    checked = MoELayer.checked


pytestmark = pytest.mark.usefixtures("stand_in_graphs")


def tokens(count: int) -> tuple[torch.Tensor, Routing]:
    ids = torch.randint(0, 4, (count, 2), dtype=torch.int32)
    return torch.randn(count, 128).bfloat16(), Routing(ids, torch.rand(count, 2))


def test_a_call_pads_to_the_bucket_with_tokens_of_no_expert():
    layer = Layer()
    step = graph.StepGraph(layer, 8, *tokens(8))
    x, routing = tokens(3)
    y = step(x, routing)
    assert torch.equal(y, x * 2)
    last = layer.calls[-1]
    assert (last.bucket, len(last.x)) == (8, 8)
    assert torch.equal(last.ids[:3], routing.ids_TK)
    assert (last.ids[3:] == -1).all()
    assert (last.weights[3:] == 0).all()
    assert (last.x[3:] == 0).all()


def test_more_tokens_than_the_bucket_are_refused():
    step = graph.StepGraph(Layer(), 4, *tokens(4))
    with pytest.raises(ConfigError, match="tokens = 5: do not fit the captured bucket"):
        step(*tokens(5))


def test_what_cannot_be_captured_is_refused_with_the_reason():
    with pytest.raises(UnsupportedError, match="for a reason"):
        graph.StepGraph(Layer(Support(False, "for a reason")), 4, *tokens(4))


def test_every_step_of_a_graph_runs_as_captured():
    """Warming up too: what is compiled at first use is what will be captured."""
    layer = Layer()
    graph.StepGraph(layer, 4, *tokens(2)).with_stages()
    assert {call.captured for call in layer.calls} == {True}


def test_a_graph_keeps_the_arena_it_was_captured_with():
    step = graph.StepGraph(Layer(), 4, *tokens(2))
    workspace = workspace_of(torch.device("cpu"))
    kept = workspace.arena
    workspace.reserve(workspace.nbytes + 1)
    assert workspace.arena is not kept
    assert step._kept[0] is kept


@pytest.mark.parametrize("staged", [False, True])
def test_a_replay_after_a_step_that_raised_is_refused(staged):
    """In the memory that it was captured with, whatever later steps have: its number would be that step's."""
    layer = Layer()
    window = layer.comm.window(1, 1)
    step = graph.StepGraph(layer, 4, *tokens(2))
    replayed = step.with_stages() if staged else step
    replayed.replay()
    layer.comm.window(window.sizes[0] + 1, 1)
    window.open = True
    with pytest.raises(RankFailure, match="an earlier step raised after its rows had been sent"):
        replayed.replay()


def test_the_stages_clock_is_in_the_second_graph_only():
    layer = Layer()
    step = graph.StepGraph(layer, 4, *tokens(2))
    assert {call.staged for call in layer.calls} == {False}
    count = len(layer.calls)
    staged = step.with_stages()
    assert [call.staged for call in layer.calls[count:]] == [False, True]  # once to warm up
    assert staged.totals_us()["gemm1"] > 0
    assert staged.totals_us() == staged.totals_us()
