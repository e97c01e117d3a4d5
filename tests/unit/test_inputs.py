"""The one door for tensors from outside: what is refused, by name, and what is of no account."""

from __future__ import annotations

import io

import pytest
import torch
from torch.autograd import forward_ad
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.engine.router import Router
from moe_dist.errors import ConfigError
from moe_dist.machine.machine import Machine
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing, route
from moe_dist.model.spec import QUANT_KINDS, MoESpec, ParallelSpec
from moe_dist.model.weights import ExpertWeights, activate
from moe_dist.oracle.reference import relative_error
from moe_dist.workloads.random_weights import random_expert, random_weights
from moe_dist.workloads.streams import Stream

SPEC = MoESpec(hidden=128, intermediate=256, num_experts=8, top_k=2)
CPU = Machine.detect("cpu")


def plan_of(spec: MoESpec = SPEC):
    return make_plan(spec, ParallelSpec(), exchange="local", backend="torch", machine=CPU)


def layer_of(spec: MoESpec = SPEC, **given) -> MoELayer:
    return MoELayer(plan_of(spec), random_weights(spec, 0), Comm.single(), **given)


def inputs(tokens: int = 5, spec: MoESpec = SPEC, seed: int = 0) -> tuple[torch.Tensor, Routing]:
    stream = Stream("inputs of a test", seed)
    ids = torch.stack([stream.permutation(spec.num_experts)[: spec.top_k] for _ in range(tokens)]).int()
    return stream.normal(tokens, spec.hidden).to(spec.torch_dtype), Routing(ids, stream.uniform(tokens, spec.top_k))


def exact(x: torch.Tensor, routing: Routing, weights: ExpertWeights, activation: str = "swiglu") -> torch.Tensor:
    """One pair after another, in float64."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t, (ids, values) in enumerate(zip(routing.ids_TK.tolist(), routing.weights_TK.tolist(), strict=True)):
        for expert, value in zip(ids, values, strict=True):
            if 0 <= expert < weights.num_experts:
                w13, w2 = weights.dequantized(expert)
                y[t] += value * (w2.double() @ activate(x[t].double() @ w13.double().T, activation))
    return y


WRONG_TOKENS = {
    "x = 'list'": lambda x: x.tolist(),
    "x = (640,)": lambda x: x.flatten(),
    "x = (5, 64)": lambda x: x[:, :64],
    "x = (1, 5, 128)": lambda x: x[None],
    "x.dtype = torch.float32": lambda x: x.float(),
    "x.dtype = torch.float16": lambda x: x.half(),
    "x.dtype = torch.float8_e4m3fn": lambda x: x.to(torch.float8_e4m3fn),
    "x.device": lambda x: x.to("meta"),
    "x.layout": lambda x: x.to_sparse(),
    "x.requires_grad": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("message", WRONG_TOKENS)
def test_wrong_tokens_are_refused_by_name(message):
    x, routing = inputs()
    with pytest.raises(ConfigError) as raised:
        layer_of()(WRONG_TOKENS[message](x), routing)
    assert str(raised.value).startswith(message)


WRONG_ROUTINGS = {
    "routing = 'tuple'": lambda r: (r.ids_TK, r.weights_TK),
    "routing.ids = 'list'": lambda r: Routing(r.ids_TK.tolist(), r.weights_TK),
    "routing.ids = (5, 1)": lambda r: Routing(r.ids_TK[:, :1], r.weights_TK),
    "routing.ids = (4, 2)": lambda r: Routing(r.ids_TK[:4], r.weights_TK),
    "routing.weights = (5, 1)": lambda r: Routing(r.ids_TK, r.weights_TK[:, :1]),
    "routing.weights = (10,)": lambda r: Routing(r.ids_TK, r.weights_TK.flatten()),
    "routing.ids.dtype = torch.int64": lambda r: Routing(r.ids_TK.long(), r.weights_TK),
    "routing.ids.dtype = torch.float32": lambda r: Routing(r.ids_TK.float(), r.weights_TK),
    "routing.weights.dtype = torch.bfloat16": lambda r: Routing(r.ids_TK, r.weights_TK.bfloat16()),
    "routing.ids.device": lambda r: Routing(r.ids_TK.to("meta"), r.weights_TK),
    "routing.weights.device": lambda r: Routing(r.ids_TK, r.weights_TK.to("meta")),
}


@pytest.mark.parametrize("message", WRONG_ROUTINGS)
def test_wrong_routing_is_refused_by_name(message):
    x, routing = inputs()
    with pytest.raises(ConfigError) as raised:
        layer_of()(x, WRONG_ROUTINGS[message](routing))
    assert str(raised.value).startswith(message)


def test_a_tensor_without_memory_of_its_own_is_refused_wherever_it_is_given():
    """As a DTensor is: on a GPU a kernel would read from the address 0. A Parameter is a plain one."""
    x, routing = inputs()
    layer = layer_of(router=Router(plan_of(), torch.randn(8, 128)))
    ids, weights = AsyncCollectiveTensor(routing.ids_TK), AsyncCollectiveTensor(routing.weights_TK)
    for field, call in (
        ("x", lambda: layer(AsyncCollectiveTensor(x), routing)),
        ("x", lambda: layer(AsyncCollectiveTensor(x))),
        ("x", lambda: layer.router(AsyncCollectiveTensor(x))),
        ("routing.ids", lambda: layer(x, Routing(ids, routing.weights_TK))),
        ("routing.weights", lambda: layer(x, Routing(routing.ids_TK, weights))),
    ):
        with pytest.raises(ConfigError, match=rf"{field} = 'AsyncCollectiveTensor': .* \(legal: .*to_local\(\)"):
            call()
    layer(torch.nn.Parameter(x, requires_grad=False), routing)


def test_a_token_that_the_own_router_can_t_weigh_is_the_token_s_fault():
    layer = layer_of(router=Router(plan_of(), torch.ones(8, 128)))
    x, _ = inputs()
    for value, said in ((float("nan"), "NaN or infinite"), (3e38, "finite, but too large")):
        x[3] = value
        with pytest.raises(ConfigError, match=f"x = '{said}': of token 3, which no router can route"):
            layer(x)


@pytest.mark.parametrize("expert", [-2, -100, 8, 9, 2**31 - 1, -(2**31)])
def test_ids_that_are_no_experts_are_refused_with_their_place(expert):
    x, routing = inputs()
    routing.ids_TK[3, 1] = expert
    with pytest.raises(ConfigError, match=rf"routing\.ids = {expert}: of token 3, place 1, the first of 1"):
        layer_of()(x, routing)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_unless_they_are_of_no_account(weight):
    x, routing = inputs()
    routing.weights_TK[2, 0] = weight
    layer = layer_of()
    with pytest.raises(ConfigError, match=r"routing\.weights = .*token 2, place 0"):
        layer(x, routing)
    routing.ids_TK[2, 0] = -1
    assert relative_error(layer(x, routing), exact(x, routing, random_weights(SPEC, 0))) < 5e-2


@pytest.mark.parametrize("bucket", [4, -1, True, 5.0, "5"])
def test_buckets_that_hold_fewer_tokens_or_are_no_number_are_refused(bucket):
    with pytest.raises(ConfigError, match="max_tokens_per_rank"):
        layer_of()(*inputs(5), max_tokens_per_rank=bucket)


@pytest.mark.parametrize("parallel", [ParallelSpec(ep=3), ParallelSpec(tp=2, ep=2, replicas={1: (1,), 6: (0,)})])
def test_a_placement_reads_no_id_as_another_expert(parallel):
    """What runs on a GPU, where nobody looks at the ids first: whatever is no expert is nowhere."""
    placement = Placement.build(SPEC, parallel)
    ids = torch.tensor([[-1, -2], [8, 9], [2**31 - 1, -(2**31)], [3, 100]], dtype=torch.int32)
    rows, sources = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    known = torch.tensor([[False, False], [False, False], [False, False], [True, False]])
    for source in (None, sources):
        groups = placement.serving_groups(ids, rows, source)
        assert torch.equal(groups >= 0, known)
        assert torch.equal(placement.slots_served(ids, groups) >= 0, known)
        for rank in range(placement.world):
            here = known & (groups == rank // placement.tp)
            assert torch.equal(placement.local_slots(ids, groups, rank) >= 0, here)
    slots = torch.stack([placement.slots_on(rank, ids) for rank in range(placement.world)])
    assert torch.equal((slots >= 0).any(0), known)


# Shards -------------------------------------------------------------------------------------------------------------


def spec_with(quant: str, **more) -> MoESpec:
    return SPEC.with_changes(quant=quant, **more)


def wrong_tensors(weights: ExpertWeights):
    """Every tensor, each wrong in one way."""
    for name, tensor in weights.tensors().items():
        yield name, {name: tensor.to(torch.float64)}
        yield name, {name: tensor.to("meta")}
        yield name, {name: tensor[None]}
        yield name, {name: tensor[:-1] if tensor.ndim else tensor.reshape(1)}
        if name not in ("w13_eFH", "w2_eHi"):
            yield name, {name: None}
        if tensor.ndim > 1:
            codes = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor
            turned = codes.mT.contiguous().mT
            if not turned.is_contiguous():
                yield name, {name: turned.view(tensor.dtype)}


@pytest.mark.parametrize("quant", QUANT_KINDS)
@pytest.mark.parametrize("part", ["shard", "shared"])
def test_every_tensor_of_a_shard_is_checked(part, quant):
    spec = spec_with(quant, shared_experts="replicated", shared_intermediate=128)
    plan, whole = plan_of(spec), random_weights(spec, 0)
    shared = random_expert(spec.shared_spec(), 8, 0)
    if shared.a13 is not None:
        shared = shared.with_tensors(a13=whole.a13)
    MoELayer(plan, whole, Comm.single(), shared=shared)
    parts = {"shard": whole, "shared": shared}
    tried = 0
    for name, change in wrong_tensors(parts[part]):
        given = parts | {part: parts[part].with_tensors(**change)}
        with pytest.raises(ConfigError) as raised:
            MoELayer(plan, given["shard"], Comm.single(), shared=given["shared"])
        assert raised.value.field.startswith(f"{part}.{name.split('_')[0]}"), (name, change)
        tried += 1
    assert tried >= 9


def test_shards_of_another_format_are_refused():
    whole = random_weights(SPEC, 0)
    plan = plan_of()
    for changes, field in (
        ({"kind": "fp8_channel"}, "shard.kind"),
        ({"gated": False}, "shard.gated"),
        ({"a13": torch.ones(())}, "shard.a13"),
        ({"a2": torch.ones(8)}, "shard.a2"),
    ):
        with pytest.raises(ConfigError) as raised:
            MoELayer(plan, whole.with_tensors(**changes), Comm.single())
        assert raised.value.field == field
    with pytest.raises(ConfigError, match="is no ExpertWeights"):
        MoELayer(plan, whole.w13_eFH, Comm.single())


@pytest.mark.parametrize("quant", QUANT_KINDS)
@pytest.mark.parametrize("activation", ["swiglu", "relu2", "swigluoai"])
def test_the_declared_forms_are_those_of_the_weights_that_are_made(quant, activation):
    spec = spec_with(quant, activation=activation, intermediate=320, expert_bias=activation == "swigluoai")
    whole = random_weights(spec, 0)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in whole.tensors().items()}
    assert found == ExpertWeights.forms(spec, 8, 320)
    assert plan_of(spec).weight_bytes(0) == whole.nbytes()


def test_biases_are_there_exactly_if_the_spec_says_so():
    biased = spec_with("fp8_block", activation="swigluoai", expert_bias=True)
    whole = random_weights(biased, 0)
    MoELayer(plan_of(biased), whole, Comm.single())
    for spec, weights, field in (
        (biased, whole.with_tensors(b2_eH=None), "shard.b2"),
        (biased, whole.with_tensors(b13_eF=whole.b13_eF.bfloat16()), "shard.b13.dtype"),
        (biased.with_changes(expert_bias=False), whole, "shard.b13_eF"),
    ):
        with pytest.raises(ConfigError) as raised:
            MoELayer(plan_of(spec), weights, Comm.single())
        assert raised.value.field == field


def test_a_plan_for_another_kind_of_device_is_refused():
    gpu = Machine("cuda", 1, "NVIDIA H200", (9, 0), 141 << 30)
    plan = make_plan(SPEC, ParallelSpec(), exchange="local", backend="torch", machine=gpu)
    with pytest.raises(ConfigError, match=r"comm\.device"):
        MoELayer(plan, random_weights(SPEC, 0), Comm.single())


# The router ----------------------------------------------------------------------------------------------------------

GROUPED = MoESpec(
    hidden=64, intermediate=128, num_experts=32, top_k=6, scoring="sigmoid", correction_bias=True, num_groups=8,
    top_groups=4,
)  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bias_or_weight_that_is_not_finite_makes_no_router(value):
    bias, gate = torch.zeros(32), torch.ones(32, 64)
    bias[7] = value
    with pytest.raises(ConfigError, match=r"router\.bias = .*expert 7"):
        Router(plan_of(GROUPED), gate, bias)
    gate[3, 4] = value
    with pytest.raises(ConfigError, match=r"router\.weight"):
        Router(plan_of(GROUPED), gate, torch.zeros(32))


@pytest.mark.parametrize(
    "change", [{"routed_scaling": 2.5}, {"renormalize": False}, {"num_experts": 4}, {"hidden": 256}, {"top_k": 3}]
)
def test_a_router_of_another_model_is_refused(change):
    other = SPEC.with_changes(**change)
    router = Router(plan_of(other), torch.ones(other.num_experts, other.hidden))
    with pytest.raises(ConfigError, match=rf"router\.{next(iter(change))} ="):
        layer_of(router=router)
    layer_of(router=Router(plan_of(SPEC.with_changes(quant="none")), torch.ones(8, 128)))  # the format is another thing


def test_a_gradient_does_not_get_lost_in_the_weights_of_a_routing():
    x, routing = inputs()
    with pytest.raises(ConfigError, match=r"routing\.weights\.requires_grad"):
        layer_of()(x, Routing(routing.ids_TK, routing.weights_TK.requires_grad_()))
    whole = random_weights(spec_with("none"), 0)
    with pytest.raises(ConfigError, match=r"shard\.w13\.requires_grad"):
        MoELayer(plan_of(spec_with("none")), whole.with_tensors(w13_eFH=whole.w13_eFH.requires_grad_()), Comm.single())


def test_a_router_has_a_bias_exactly_if_the_model_has_one():
    with pytest.raises(ConfigError, match=r"router\.bias = None"):
        Router(plan_of(GROUPED), torch.ones(32, 64))
    with pytest.raises(ConfigError, match=r"router\.bias = 'given'"):
        Router(plan_of(), torch.ones(8, 128), torch.zeros(8))
    with pytest.raises(ConfigError, match=r"router\.bias = \(31,\)"):
        Router(plan_of(GROUPED), torch.ones(32, 64), torch.zeros(31))


def test_nobody_routes_by_a_bias_that_is_nan():
    with pytest.raises(ConfigError, match=r"router\.bias = nan.*expert 7"):
        route(torch.zeros(2, 32), GROUPED, torch.tensor([0.0] * 7 + [float("nan")] + [0.0] * 24))


@pytest.mark.parametrize("legal", [[1, 2, 3, 4], [5], [0, 9, 17, 25, 31], []])
def test_places_that_no_legal_expert_can_fill_are_empty(legal):
    logits = Stream("logits of a test").normal(50, 32)
    bias = torch.full((32,), float("-inf"))
    bias[legal] = 0
    for masked in (route(logits, GROUPED, bias), route(logits + bias, GROUPED, torch.zeros(32))):
        reachable = min(len({expert // 4 for expert in legal}), GROUPED.top_groups)
        for ids, weights in zip(masked.ids_TK.tolist(), masked.weights_TK.tolist(), strict=True):
            chosen = [expert for expert in ids if expert >= 0]
            assert set(chosen) <= set(legal)
            assert len({expert // 4 for expert in chosen}) == reachable
            assert all(weight == 0 for expert, weight in zip(ids, weights, strict=True) if expert < 0)
            assert sum(weights) == pytest.approx(1 if chosen else 0, abs=1e-5)
    assert len({expert // 4 for expert in legal}) > 4 or (masked.ids_TK >= 0).sum(1).unique().tolist() == [len(legal)]


def test_masked_experts_of_a_softmax_router_get_nothing():
    logits = torch.zeros(1, 8)
    logits[0, 1:] = float("-inf")
    routing = route(logits, SPEC)
    assert routing.ids_TK.tolist() == [[0, -1]]
    assert routing.weights_TK.tolist() == [[1.0, 0.0]]


def test_a_token_that_is_nan_shows_in_its_own_weights_only():
    logits = Stream("logits of a test").normal(3, 32)
    logits[1] = float("nan")
    routing = route(logits, GROUPED, torch.zeros(32))
    assert bool(routing.weights_TK[1].isnan().all())
    assert bool(routing.weights_TK[[0, 2]].isfinite().all())


def test_rows_without_an_expert_do_not_decide_how_others_are_rounded():
    spec = spec_with("fp8_tensor_dynamic")
    x, routing = inputs(9, spec)
    routing.ids_TK[[2, 5]] = -1
    calm = layer_of(spec)(x, routing)
    for value in (1e4, float("inf"), float("nan")):
        x[[2, 5]] = value
        assert torch.equal(layer_of(spec)(x, routing), calm)


def test_forward_mode_is_refused_by_name():
    x, routing = inputs()
    router = Router(plan_of(), Stream("gate of a test").normal(8, 128))
    layer = layer_of(router=router)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(ConfigError, match=r"x = 'a dual tensor'"):
            layer(dual)
        with torch.no_grad(), pytest.raises(ConfigError, match=r"x = 'a dual tensor'"):
            layer(dual, routing)
        weights = forward_ad.make_dual(routing.weights_TK, torch.ones_like(routing.weights_TK))
        with pytest.raises(ConfigError, match=r"routing\.weights = 'a dual tensor'"):
            layer(x, Routing(routing.ids_TK, weights))
        assert torch.equal(layer(dual.detach()), layer(x))
    with pytest.raises(ConfigError, match=r"x = 'inside a transform of torch\.func'"):
        torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    with pytest.raises(ConfigError, match=r"x = 'inside a transform of torch\.func'"):
        torch.func.vmap(layer)(x[None])


@pytest.mark.parametrize("value", ["1", "true", "Yes", "ON"])
def test_the_debug_mode_is_switched_on(value, monkeypatch):
    monkeypatch.setenv("MOE_DIST_DEBUG", value)
    assert layer_of().debug is True


@pytest.mark.parametrize("value", ["", "0", "false", "No", "OFF"])
def test_the_debug_mode_is_switched_off(value, monkeypatch):
    monkeypatch.setenv("MOE_DIST_DEBUG", value)
    assert layer_of().debug is False


def test_a_debug_mode_that_is_neither_is_refused(monkeypatch):
    monkeypatch.setenv("MOE_DIST_DEBUG", "2")
    with pytest.raises(ConfigError, match=r"MOE_DIST_DEBUG = '2'.*1, true, yes, on, 0, false, no, off"):
        layer_of()
    assert layer_of(debug=False).debug is False


@pytest.mark.parametrize("bucket", [True, 5.0, "9"])
def test_a_bucket_is_an_integer(bucket):
    with pytest.raises(ConfigError, match=r"max_tokens_per_rank = .*: must be an integer"):
        layer_of()(*inputs(), max_tokens_per_rank=bucket)


def test_weights_that_were_changed_in_place_are_those_that_run():
    whole = random_weights(SPEC, 0)
    layer = MoELayer(plan_of(), whole, Comm.single())
    x, routing = inputs()
    before = layer(x, routing)
    whole.s2.mul_(2)
    assert torch.allclose(layer(x, routing).float(), 2 * before.float())
    whole.w2_eHi.view(torch.uint8).zero_()
    assert not layer(x, routing).any()


def test_a_layer_that_ran_beside_a_compiler_can_be_pickled():
    import torch._dynamo

    layer = layer_of()
    x, routing = inputs()
    y = layer(x, routing)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x, routing), y)
