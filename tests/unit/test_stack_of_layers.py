"""A stack on one rank: the sum through its layers, what goes into it, its one scratch, and its graph."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from moe_dist.comm import Comm
from moe_dist.engine import graph
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.plan import Plan
from moe_dist.engine.planning import make_plan
from moe_dist.engine.router import Router
from moe_dist.engine.stack import MoEStack
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.machine.machine import Machine
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.step import Stages, workspace_of
from moe_dist.workloads.random_weights import random_expert, random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

SPEC = MoESpec(name="small", hidden=128, intermediate=128, num_experts=8, top_k=2)
COMM = Comm.single()


def plan_of(spec: MoESpec = SPEC, layout: str = "sharded", **options: Any) -> Plan:
    return make_plan(
        spec, ParallelSpec(), exchange="local", backend="torch", token_layout=layout, machine=Machine.detect("cpu"),
        **options,
    )  # fmt: skip


def layer_of(seed: int, router: bool = False, spec: MoESpec = SPEC, comm: Comm = COMM, **options: Any) -> MoELayer:
    plan = plan_of(spec, **options)
    gate = Stream("a test's router", seed).normal(spec.num_experts, spec.hidden)
    return MoELayer(plan, random_weights(spec, seed), comm, router=Router(plan, gate) if router else None)


def stack_of(count: int, router: bool = False) -> MoEStack:
    return MoEStack(layer_of(seed, router) for seed in range(count))


def inputs(tokens: int, layers: int) -> tuple[torch.Tensor, list[Routing]]:
    routings = [synthetic_routing(SPEC, tokens, "uniform", 0, number) for number in range(layers)]
    return Stream("a test's tokens", tokens).normal(tokens, SPEC.hidden).bfloat16(), routings


def chained(stack: MoEStack, x: torch.Tensor, routings: list[Routing] | None, **options: Any) -> torch.Tensor:
    for number, layer in enumerate(stack.layers):
        x = x + layer(x, None if routings is None else routings[number], **options)
    return x


class TestForward:
    @pytest.mark.parametrize("tokens", [0, 1, 13])
    @pytest.mark.parametrize("own", [False, True], ids=["given", "own routers"])
    def test_is_the_sum_through_its_layers(self, tokens, own):
        stack, (x, routings) = stack_of(3, own), inputs(tokens, 3)
        before = x.clone()
        y = stack(x, None if own else routings)
        assert torch.equal(y, chained(stack, x, None if own else routings))
        assert y.dtype == torch.bfloat16
        assert torch.equal(x, before)
        assert not tokens or not torch.equal(y, x)

    def test_layers_may_have_other_experts(self):
        wide = SPEC.with_changes(num_experts=4, top_k=3, intermediate=256, quant="none")
        stack = MoEStack([layer_of(0), layer_of(1, spec=wide)])
        x, (first,) = inputs(9, 1)
        routings = [first, synthetic_routing(wide, 9, "uniform", 0)]
        assert torch.equal(stack(x, routings), chained(stack, x, routings))

    def test_a_given_routing_goes_before_the_router(self):
        stack, (x, routings) = stack_of(2, router=True), inputs(9, 2)
        assert not torch.equal(stack(x, routings), stack(x))

    def test_what_is_around_changes_nothing(self):
        stack, (x, routings) = stack_of(2), inputs(9, 2)
        y = stack(x, routings)
        with torch.autocast("cpu", dtype=torch.float16):
            assert torch.equal(stack(x, routings), y)
        wide = x.new_zeros(9, SPEC.hidden + 3)
        wide[:, 1:-2] = x
        assert torch.equal(stack(wide[:, 1:-2], routings), y)
        assert torch.equal(deepcopy(stack).half()(x, routings), y)
        with torch.inference_mode():
            assert torch.equal(stack(x, routings), y)

    def test_compiling_it_changes_nothing(self):
        stack, (x, routings) = stack_of(2), inputs(9, 2)
        y = stack(x, routings)
        assert torch.equal(torch.compile(stack, backend="eager")(x, routings), y)

    def test_a_state_dict_is_that_of_its_layers(self):
        stack, other = stack_of(2, router=True), stack_of(3, router=True)
        stack.load_state_dict(stack.state_dict())
        with pytest.raises(RuntimeError, match=r"layers\.2"):
            stack.load_state_dict(other.state_dict())

    def test_stages_are_those_of_all_layers(self):
        stack, (x, routings) = stack_of(3), inputs(9, 3)
        of_stack, of_layers = Stages(True), Stages(True)
        stack(x, routings, stages=of_stack)
        chained(stack, x, routings, stages=of_layers)
        names = [name for name, _ in of_stack.take()]
        assert names.count("gemm1") >= 3
        assert names == [name for name, _ in of_layers.take()]


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("other", "field", "value"),
        [
            ({"spec": SPEC.with_changes(hidden=256)}, "hidden", 256),
            ({"spec": SPEC.with_changes(quant="none", dtype="fp32")}, "dtype", "fp32"),
            ({"layout": "replicated"}, "token_layout", "replicated"),
            ({"comm": Comm.single()}, "comm", "rank 0 of 1"),
        ],
    )
    def test_layers_that_do_not_go_together(self, other, field, value):
        with pytest.raises(ConfigError) as found:
            MoEStack([layer_of(0), layer_of(1), layer_of(2, **other)])
        assert (found.value.field, found.value.value) == (f"layers[2].{field}", value)

    def test_what_is_no_layer(self):
        with pytest.raises(ConfigError, match="at least one"):
            MoEStack([])
        with pytest.raises(ConfigError, match=r"layers\[1\] = 'Linear': is no MoELayer"):
            MoEStack([layer_of(0), torch.nn.Linear(2, 2)])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda routings: None, "routings = None: layer 0 has no router"),
            (lambda routings: routings[0], "routings = 'Routing': is no list"),
            (lambda routings: routings[:1], "routings = '1 of them': the stack has 2 layers"),
            (lambda routings: [routings[0], None], r"routings\[1\] = 'NoneType': is no Routing"),
            (lambda routings: [routings[0], routings[1].rows(0, 3)], r"routings\[1\]\.ids = \(3, 2\)"),
        ],
    )
    def test_routings(self, change, message, monkeypatch):
        """Before any layer runs."""
        stack, (x, routings) = stack_of(2), inputs(9, 2)
        monkeypatch.setattr(MoELayer, "forward", pytest.fail)
        with pytest.raises(ConfigError, match=message):
            stack(x, change(routings))

    def test_gradients_and_too_small_a_bucket(self):
        stack, (x, routings) = stack_of(2), inputs(9, 2)
        with pytest.raises(ConfigError, match="forward only"):
            stack(x.float().requires_grad_().bfloat16(), routings)
        weighted = Routing(routings[1].ids_TK, routings[1].weights_TK.clone().requires_grad_())
        with pytest.raises(ConfigError, match=r"routings\[1\]\.weights"):
            stack(x, [routings[0], weighted])
        with pytest.raises(ConfigError, match="max_tokens_per_rank = 8"):
            stack(x, routings, max_tokens_per_rank=8)


def test_a_hundred_layers_need_the_scratch_of_one():
    spec = SPEC.with_changes(shared_experts="replicated", shared_intermediate=128)
    made, (x, routing) = [], inputs(300, 1)
    for _ in range(100):
        plan = plan_of(spec)
        made.append(MoELayer(plan, random_weights(spec, 0), COMM, shared=random_expert(spec.shared_spec(), 8, 0)))
    stack = MoEStack(made)
    workspace, found = workspace_of(COMM.device), []
    for call, given in ((made[0], routing[0]), (stack, routing * 100)):
        workspace._views.clear()  # a view that is known is not counted again
        workspace.high_water = 0
        call(x, given)
        found.append(workspace.high_water)
    assert 0 < found[0] == found[1]


@pytest.mark.usefixtures("stand_in_graphs")
class TestGraph:
    @pytest.mark.parametrize("own", [False, True], ids=["given", "own routers"])
    @pytest.mark.parametrize("tokens", [0, 5, 8])
    def test_gives_what_the_stack_gives(self, own, tokens):
        stack, (x, routings) = stack_of(3, own), inputs(8, 3)
        step = graph.StepGraph(stack, 8, x, None if own else routings)
        x, routings = inputs(tokens, 3)
        given = None if own else routings
        assert torch.equal(step(x, given), stack(x, given))

    def test_routers_send_padding_nowhere(self, monkeypatch):
        stack, (x, _) = stack_of(2, router=True), inputs(8, 2)
        step = graph.StepGraph(stack, 8, x)
        seen = []
        forward = MoELayer.forward

        def watched(self, x, routing=None, **options):
            seen.append((x.clone(), routing))
            return forward(self, x, routing, **options)

        monkeypatch.setattr(MoELayer, "forward", watched)
        step(x[:3])
        assert len(seen) == 2
        for given, routing in seen:
            assert (routing.ids_TK[:3] >= 0).all()
            assert (routing.ids_TK[3:] == -1).all()
            assert not given[3:].any()

    def test_a_call_has_the_form_of_the_sample(self):
        x, routings = inputs(8, 2)
        own = stack_of(2, router=True)
        with pytest.raises(ConfigError, match="captured with each layer's own router"):
            graph.StepGraph(own, 8, x)(x, routings)
        with pytest.raises(ConfigError, match="captured with one for each layer"):
            graph.StepGraph(own, 8, x, routings)(x)
        with pytest.raises(ConfigError, match="do not fit the captured bucket"):
            graph.StepGraph(own, 4, x[:4])(x)

    def test_every_layer_must_be_capturable(self, monkeypatch):
        monkeypatch.undo()
        with pytest.raises(UnsupportedError, match="torch is not capturable; CUDA graphs need CUDA"):
            graph.StepGraph(stack_of(2), 8, *inputs(8, 2))

    def test_the_stages_clock_is_that_of_all_layers(self):
        step = graph.StepGraph(stack_of(3), 8, *inputs(8, 3))
        assert sum(name == "gemm1" for name, _ in step.with_stages().marks) >= 3
