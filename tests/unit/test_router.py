"""The router: what it takes, what it keeps, and what it can be loaded with."""

from __future__ import annotations

import pytest
import torch
from unit.test_inputs import GROUPED, SPEC, layer_of, plan_of

from moe_dist.engine.router import Router
from moe_dist.errors import ConfigError
from moe_dist.model.routing import check_bias, route
from moe_dist.workloads.streams import Stream

GATE = Stream("gate of a test").normal(8, 128)
X = Stream("tokens of a test").normal(5, 128)
STRANGE = {
    "list": lambda values: values.tolist(),
    "numpy": lambda values: values.numpy(),
    "integers": lambda values: values.long(),
    "complex": lambda values: values.to(torch.complex64),
    "fp8": lambda values: values.to(torch.float8_e4m3fn),
    "sparse": lambda values: values.to_sparse(),
    "meta": lambda values: values.to("meta"),
    "text": lambda values: "abc",
    "nothing": lambda values: None,
}


def router_of(gate=GATE, spec=SPEC, bias=None) -> Router:
    return Router(plan_of(spec), gate, bias)


def test_it_keeps_its_own_copy():
    gate, bias = torch.ones(32, 64), torch.zeros(32)
    router = router_of(gate, GROUPED, bias)
    gate.zero_()
    bias.fill_(7)
    assert bool((router.gate_EH == 1).all())
    assert bool((router.bias_E == 0).all())


@pytest.mark.parametrize("strange", STRANGE)
def test_what_is_no_dense_tensor_of_floats_is_refused(strange):
    make = STRANGE[strange]
    with pytest.raises(ConfigError, match=r"router\.weight"):
        router_of(make(GATE))
    with pytest.raises(ConfigError, match=r"^x"):
        router_of()(make(X))
    with pytest.raises(ConfigError, match="logits"):
        route(make(X[:, :8]), SPEC)
    if strange != "nothing":  # is no bias at all
        with pytest.raises(ConfigError, match=r"router\.bias"):
            router_of(torch.ones(32, 64), GROUPED, make(torch.ones(32)))
        with pytest.raises(ConfigError, match=r"router\.bias"):
            route(torch.zeros(2, 32), GROUPED, make(torch.ones(32)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_are_taken(dtype):
    assert router_of(GATE.to(dtype))(X.to(dtype)).tokens == 5


@pytest.mark.parametrize("shape", [(5, 127), (128,), (1, 5, 128)])
def test_tokens_of_another_shape_are_refused(shape):
    with pytest.raises(ConfigError, match=r"x = \("):
        router_of()(torch.zeros(shape))


def test_what_is_infinite_in_float32_is_refused():
    with pytest.raises(ConfigError, match=r"router\.weight"):
        router_of(GATE.double() * 1e300)
    with pytest.raises(ConfigError, match=r"router\.bias"):
        check_bias(torch.full((32,), 1e300, dtype=torch.float64), GROUPED, values=True)


class TestLoading:
    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("strange", [*STRANGE, "nan", "narrow"])
    def test_what_makes_no_router_can_t_be_loaded(self, strange, assign):
        router = router_of()
        before = router(X)
        make = STRANGE | {"nan": lambda gate: gate * float("nan"), "narrow": lambda gate: gate[:, :100]}
        with pytest.raises(ConfigError, match=r"router\.weight"):
            router.load_state_dict({"gate_EH": make[strange](GATE)}, assign=assign)
        assert torch.equal(router(X).weights_TK, before.weights_TK)

    @pytest.mark.parametrize("assign", [False, True])
    def test_another_router_can(self, assign):
        router, other = router_of(torch.ones(32, 64), GROUPED, torch.zeros(32)), Stream("other").normal(32, 64)
        router.load_state_dict({"gate_EH": other.double(), "bias_E": torch.ones(32)}, assign=assign)
        assert torch.equal(router.gate_EH, other)
        assert bool((router.bias_E == 1).all())
        with pytest.raises(ConfigError, match=r"router\.bias"):
            router.load_state_dict({"gate_EH": other, "bias_E": torch.full((32,), float("nan"))}, assign=assign)
        with pytest.raises(RuntimeError, match="Missing key"):
            router.load_state_dict({"gate_EH": other})


BIASED = SPEC.with_changes(router_bias=True)


def test_a_bias_of_logits_decides_and_weighs():
    """As GptOssTopKRouter of transformers: the softmax of the top k logits."""
    bias = 3 * Stream("bias of a test").normal(8)
    found = Router(plan_of(BIASED), GATE, logit_bias_E=bias.bfloat16())(X)
    logits, ids = (X @ GATE.T + bias.bfloat16().float()).topk(SPEC.top_k, dim=-1)
    assert torch.equal(found.ids_TK.long(), ids)
    assert torch.allclose(found.weights_TK, logits.softmax(-1), atol=1e-6)
    assert not torch.equal(found.ids_TK, router_of()(X).ids_TK)


def test_a_bias_of_logits_is_there_exactly_if_the_model_has_one():
    with pytest.raises(ConfigError, match=r"router\.logit_bias = None: router_bias of the model is True"):
        Router(plan_of(BIASED), GATE)
    with pytest.raises(ConfigError, match=r"router\.logit_bias = 'given': router_bias of the model is False"):
        Router(plan_of(), GATE, logit_bias_E=torch.zeros(8))
    for wrong in (torch.zeros(7), torch.full((8,), float("nan")), [0.0] * 8):
        with pytest.raises(ConfigError, match=r"^router\.logit_bias"):  # no correction bias
            Router(plan_of(BIASED), GATE, logit_bias_E=wrong)
    with pytest.raises(ConfigError, match=r"router\.router_bias"):
        layer_of(router=Router(plan_of(BIASED), GATE, logit_bias_E=torch.zeros(8)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_token_that_can_t_be_routed_is_named(value):
    layer = layer_of(router=router_of())
    x = X.bfloat16()
    x[3, 7] = value
    with pytest.raises(ConfigError, match=r"x = 'NaN or infinite': of token 3, "):
        layer(x)


def group_of(bias: list[float]) -> list[int]:
    """Which two of four groups of two experts are chosen at equal scores."""
    spec = GROUPED.with_changes(num_experts=8, num_groups=4, top_groups=2, top_k=2)
    tensor = torch.tensor(bias, dtype=torch.float32)
    both = route(torch.zeros(1, 8), spec, tensor)
    return sorted({expert // 2 for expert in both.ids_TK[0].tolist() if expert >= 0})


@pytest.mark.parametrize("depth", [1.0, 1e3, 2e4, 1e9, 1e30])
def test_groups_are_chosen_however_low_their_biases_are(depth):
    """The two best experts lie in the two best groups."""
    scale = [-4.0, -4.0, -3.0, -2.0, -4.0, -3.5, -2.5, -2.0]
    assert group_of([depth * value for value in scale]) == [1, 3]
    assert group_of([depth * value for value in scale[::-1]]) == [0, 2]


def test_groups_with_one_legal_expert_come_after_those_with_two():
    none = float("-inf")
    low = [-3e4, -3e4]  # legal, both of them
    assert group_of([5.0, none, *low, *low, none, none]) == [1, 2]
    assert group_of([5.0, none, *low, 6.0, none, none, none]) == [1, 2]  # of the others the better one
    assert group_of([5.0, none, 4.0, none, 6.0, none, none, none]) == [0, 2]
