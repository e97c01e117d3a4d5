"""What a program has set around the layer changes nothing: the layer is made and run in each of these worlds."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.engine.router import Router
from moe_dist.errors import ConfigError
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import QUANT_KINDS, MoESpec, ParallelSpec
from moe_dist.workloads.random_weights import random_expert, random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

SIZES = {"hidden": 128, "intermediate": 256, "num_experts": 16, "top_k": 4, "scoring": "sigmoid"}
SIZES |= {"correction_bias": True, "shared_experts": "replicated", "shared_intermediate": 128}
FORMATS = [*QUANT_KINDS, "fp32"]


def spec_of(quant: str) -> MoESpec:
    return MoESpec(**SIZES, quant="none", dtype="fp32") if quant == "fp32" else MoESpec(**SIZES, quant=quant)


def layer_of(quant: str) -> MoELayer:
    """Weights, router and layer, all made in the world at hand."""
    spec = spec_of(quant)
    plan = make_plan(spec, ParallelSpec(), exchange="local", backend="torch", machine=Machine.detect("cpu"))
    stream = Stream("router of a test")
    router = Router(plan, 0.2 * stream.normal(16, 128), 0.1 * stream.normal(16))
    whole = random_weights(spec, 0)
    shared = random_expert(spec.shared_spec(), 16, 0)
    if whole.a13 is not None:
        shared = shared.with_tensors(a13=whole.a13)
    return MoELayer(plan, whole, Comm.single(), router=router, shared=shared)


def tokens(quant: str) -> torch.Tensor:
    return Stream("tokens of a test").normal(64, 128).to(spec_of(quant).torch_dtype)


@contextlib.contextmanager
def restored(setter, before, now) -> Iterator[None]:
    setter(now)
    try:
        yield
    finally:
        setter(before)


def default_dtype(dtype: torch.dtype):
    return restored(torch.set_default_dtype, torch.float32, dtype)


WORLDS = {
    "default dtype bf16": lambda: default_dtype(torch.bfloat16),
    "default dtype fp16": lambda: default_dtype(torch.float16),
    "default dtype fp64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: restored(torch.set_default_device, None, "meta"),
    "device context": lambda: torch.device("meta"),
    "autocast bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "float32 products in bf16": lambda: restored(torch.set_float32_matmul_precision, "highest", "medium"),
    "deterministic algorithms": lambda: restored(torch.use_deterministic_algorithms, False, True),
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("quant", FORMATS)
def test_a_layer_made_and_run_in_another_world(world, quant):
    expected = layer_of(quant)(tokens(quant))
    plain, x = layer_of(quant), tokens(quant)
    with WORLDS[world]():
        inside = layer_of(quant)
        assert torch.equal(inside(x), expected)
        assert torch.equal(plain(x), expected)
        drawn = synthetic_routing(spec_of(quant), 64, "zipf:1.2", 3)
    assert torch.equal(inside(x), expected)
    usual = synthetic_routing(spec_of(quant), 64, "zipf:1.2", 3)
    assert torch.equal(drawn.ids_TK, usual.ids_TK)
    assert torch.equal(drawn.weights_TK, usual.weights_TK)


def test_the_world_is_left_as_it_was():
    layer, x = layer_of("none"), tokens("none")
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


class Model(nn.Module):
    """What a layer usually is a part of."""

    def __init__(self, quant: str) -> None:
        super().__init__()
        self.layer = layer_of(quant)
        self.linear = nn.Linear(128, 128, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x + 0)


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.double(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("cpu", torch.float16),
        lambda model: model.cpu(),
        lambda model: model.eval(),
        lambda model: model.share_memory(),
        lambda model: model.requires_grad_(False),
        copy.deepcopy,
        lambda model: copy.deepcopy(model.half()),
    ],
    ids=[
        "half",
        "bfloat16",
        "double",
        "to bf16",
        "to cpu fp16",
        "cpu",
        "eval",
        "share",
        "no grad",
        "copy",
        "half copy",
    ],
)
def test_a_model_around_it_that_is_moved_or_copied(quant, change):
    model, x = Model(quant), tokens(quant)
    expected = model(x)
    changed = change(model)
    assert torch.equal(changed(x), expected)
    router = changed.layer.router
    assert (router.gate_EH.dtype, router.bias_E.dtype) == (torch.float32, torch.float32)


def test_a_copy_is_another_layer_on_the_same_communicator():
    layer = layer_of("fp8_block")
    copied = copy.deepcopy(layer)
    assert copied.comm is layer.comm
    x = tokens("fp8_block")
    expected = layer(x)
    layer._weights[0].w13_eFH.view(torch.uint8).zero_()
    layer.router.gate_EH.zero_()
    assert torch.equal(copied(x), expected)


class Doubled(MoELayer):
    """A subclass, as a serving stack may have one."""

    factor = 2

    def forward(self, *args, **options):
        return self.factor * super().forward(*args, **options)


def test_a_copy_of_a_subclass_with_hooks_is_one():
    layer = layer_of("fp8_block")
    doubled = Doubled(layer.plan, layer._weights[0], layer.comm, router=layer.router, shared=layer._weights[1])
    doubled.register_forward_hook(lambda module, given, y: y + 1)
    doubled.factor = 3
    x = tokens("fp8_block")
    assert torch.equal(copy.deepcopy(doubled)(x), doubled(x))
    assert torch.equal(doubled(x), 3 * layer(x) + 1)


def test_a_state_dict_says_which_experts_it_belongs_to():
    """It holds the router alone; experts come from a checkpoint."""
    layer, same = layer_of("fp8_block"), layer_of("fp8_block")
    state = layer.state_dict()
    same.load_state_dict(state)
    other = random_weights(layer.plan.spec, 1)
    stranger = MoELayer(layer.plan, other, layer.comm, router=layer.router, shared=layer._weights[1])
    with pytest.raises(ConfigError, match=r"state_dict\.experts"):
        stranger.load_state_dict(state)
    extra = next(name for name in state if name.endswith("_extra_state"))
    same.load_state_dict(state | {extra: json.loads(json.dumps(state[extra]))})
    same.load_state_dict(state | {extra: {"experts": tuple(state[extra]["experts"])}})
    for broken in (None, [], [1, 2], torch.ones(3), {"experts": None}, {"experts": torch.ones(3)}, {}):
        with pytest.raises(ConfigError, match=r"state_dict\.experts"):
            same.load_state_dict(state | {extra: broken})
    halved = {name: value.half() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    same.load_state_dict(halved, assign=True)
    assert same.router.gate_EH.dtype == torch.float32
    assert same(tokens("fp8_block")).isfinite().all()


def test_a_layer_does_not_move_to_another_device():
    model = Model("none")
    with pytest.raises(ConfigError, match="device = 'meta'"):
        model.to("meta")


@pytest.mark.parametrize("quant", ["none", "fp8_block"])
def test_torch_compile_leaves_it_as_it_is(quant):
    model, x = Model(quant), tokens(quant)
    compiled = torch.compile(model, backend="eager")
    for count in (64, 7, 0):
        assert torch.equal(compiled(x[:count]), model(x[:count]))
