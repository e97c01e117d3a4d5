"""Canonical weights: quantizing, slicing and stacking lose nothing that they should keep."""

import json
import math
from dataclasses import replace

import pytest
import torch

from moe_dist.errors import ConfigError
from moe_dist.model import weights
from moe_dist.model.placement import Placement
from moe_dist.model.spec import QUANT_KINDS, MoESpec, ParallelSpec
from moe_dist.model.weights import activate, empty_like, quantize_weights, shard, shard_from, slice_width, stack
from moe_dist.workloads.random_weights import random_expert, random_weights

STATIC = "fp8_tensor_static"


def make_spec(quant, **changes):
    # 320 ends in a half-filled block; 160 likewise.
    sizes = {"hidden": 160, "intermediate": 320, "num_experts": 5, "top_k": 2}
    return MoESpec(**{**sizes, "quant": quant, **changes})


def relative(measured, expected):
    return float((measured.double() - expected.double()).norm() / expected.double().norm())


def assert_same(one, other):
    assert (one.kind, one.gated, one.gate_first) == (other.kind, other.gated, other.gate_first)
    assert one.tensors().keys() == other.tensors().keys()
    for name, tensor in one.tensors().items():
        twin = other.tensors()[name]
        assert (tensor.dtype, tensor.shape) == (twin.dtype, twin.shape), name
        assert torch.equal(tensor.float(), twin.float()), name


@pytest.mark.parametrize("quant", QUANT_KINDS)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("intermediate", [256, 320])
def test_dequantized_is_close_and_gate_and_up_have_their_own_scales(quant, activation, intermediate):
    spec = make_spec(quant, activation=activation, intermediate=intermediate)
    I, F = intermediate, spec.w13_rows(intermediate)
    generator = torch.Generator().manual_seed(0)
    w13, w2 = torch.randn(3, F, 160, generator=generator), torch.randn(3, 160, I, generator=generator)
    if spec.gated:
        w13[:, I:] /= 1000  # with gate's scales, up would vanish among the subnormals
    weights = quantize_weights(w13, w2, spec)
    assert (weights.num_experts, weights.hidden, weights.width) == (3, 160, I)
    tolerance = 0.04 if spec.quantized else 2**-8
    for slot in range(3):
        dense13, dense2 = weights.dequantized(slot)
        assert dense13.dtype == dense2.dtype == torch.float32
        for half in range(0, F, I):
            assert relative(dense13[half : half + I], w13[slot, half : half + I]) < tolerance
        assert relative(dense2, w2[slot]) < tolerance


@pytest.mark.parametrize(
    ("quant", "s13", "s2"),
    [("fp8_block", (5, 6, 2), (5, 2, 3)), (STATIC, (5, 2), (5, 1)), ("fp8_channel", (5, 640), (5, 160))],
)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_scale_shapes(quant, s13, s2, activation):
    weights = random_weights(make_spec(quant, activation=activation), seed=0)
    if activation == "relu2":
        s13 = (s13[0], s13[1] // 2, *s13[2:])
    assert (weights.s13.shape, weights.s2.shape) == (s13, s2)
    assert weights.s13.dtype == weights.s2.dtype == torch.float32
    assert weights.w13_eFH.dtype == weights.w2_eHi.dtype == torch.float8_e4m3fn
    static = quant == STATIC
    assert (None if weights.a13 is None else weights.a13.shape) == (() if static else None)
    assert (None if weights.a2 is None else weights.a2.shape) == ((5,) if static else None)


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_unquantized_weights_have_the_dtype_of_the_spec(dtype, expected):
    weights = random_weights(make_spec("none", dtype=dtype), seed=0)
    assert weights.w13_eFH.dtype == weights.w2_eHi.dtype == expected
    assert set(weights.tensors()) == {"w13_eFH", "w2_eHi"}


@pytest.mark.parametrize("quant", QUANT_KINDS)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("tp", [1, 2, 3, 4])  # 4: of three blocks, so one slice of fp8_block is empty
def test_slices_reassemble_the_layer(quant, activation, tp):
    spec = make_spec(quant, activation=activation)
    whole = random_weights(spec, seed=1)
    placement = Placement.build(spec, ParallelSpec(tp=tp, allow_empty_shards=True))
    parts = [slice_width(whole, *bounds) for bounds in placement.slices]
    assert [part.width for part in parts] == [stop - start for start, stop in placement.slices]
    for part in parts:
        assert part.w13_eFH.shape == (5, spec.w13_rows(part.width), 160)
        assert all(tensor.is_contiguous() for tensor in part.tensors().values())
        if quant == "fp8_block":
            blocks = -(-part.width // 128)
            assert part.s13.shape == (5, spec.w13_rows(blocks), 2)
            assert part.s2.shape == (5, 2, blocks)
        elif spec.quantized:
            assert torch.equal(part.s2, whole.s2)
        if quant == STATIC:
            assert torch.equal(part.a2, whole.a2)
            assert torch.equal(part.a13, whole.a13)
    for slot in range(5):
        pieces = [part.dequantized(slot) for part in parts]
        halves = [w13.chunk(2) if spec.gated else (w13,) for w13, _ in pieces]
        dense13 = torch.cat([torch.cat(same_half) for same_half in zip(*halves, strict=True)])
        assert torch.equal(dense13, whole.dequantized(slot)[0])
        assert torch.equal(torch.cat([w2 for _, w2 in pieces], 1), whole.dequantized(slot)[1])


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_an_empty_slice_has_no_block_scales(activation):
    """It starts at 320, inside the last block, whose scales it must not keep."""
    part = slice_width(random_weights(make_spec("fp8_block", activation=activation), seed=1), 320, 320)
    assert part.w13_eFH.shape == (5, 0, 160)
    assert (part.s13.shape, part.s2.shape) == ((5, 0, 2), (5, 2, 0))


@pytest.mark.parametrize("quant", QUANT_KINDS)
@pytest.mark.parametrize(
    ("tp", "ep", "replicas"), [(1, 1, {}), (2, 1, {}), (1, 3, {}), (2, 2, {}), (1, 2, {4: [0], 1: [1]}), (4, 6, {})]
)
def test_shard_is_shard_from_and_holds_what_the_placement_says(quant, tp, ep, replicas):
    spec = make_spec(quant)
    parallel = ParallelSpec(tp=tp, ep=ep, replicas=replicas, allow_empty_shards=True)
    placement = Placement.build(spec, parallel)
    experts = [random_expert(spec, expert, seed=7) for expert in range(5)]
    whole = stack(experts)
    for rank in range(placement.world):
        held = shard(whole, placement, rank)
        calls = []
        made = shard_from(experts.__getitem__, placement, rank, seen=lambda calls=calls: calls.append(1))
        assert_same(held, made)
        assert held.num_experts == len(placement.experts_of(rank)) == len(calls)
        start, stop = placement.slice_of(rank)
        for slot, expert in enumerate(placement.experts_of(rank)):
            assert torch.equal(held.dequantized(slot)[1], whole.dequantized(expert)[1][:, start:stop])


@pytest.mark.parametrize("quant", QUANT_KINDS)
def test_stack_and_empty_like(quant):
    spec = make_spec(quant)
    whole = random_weights(spec, seed=0)
    assert_same(stack([random_weights(spec, 0, experts=[0, 1]), random_weights(spec, 0, experts=[2, 3, 4])]), whole)
    none = empty_like(whole)
    assert (none.num_experts, none.hidden, none.width) == (0, 160, 320)
    assert_same(stack([none, whole, none]), whole)


@pytest.mark.parametrize("quant", QUANT_KINDS)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_turned_weights_are_stored_up_first_and_mean_the_same(quant, activation):
    spec = make_spec(quant, activation=activation)
    weights, canonical = random_weights(spec, seed=0), random_weights(spec, seed=0)
    storage = weights.w13_eFH.data_ptr()
    weights.turn(gate_first=False)
    weights.turn(gate_first=False)  # once is enough
    assert weights.gate_first == (not spec.gated)
    assert weights.w13_eFH.data_ptr() == storage
    if spec.gated:
        assert torch.equal(weights.w13_eFH[:, :320].float(), canonical.w13_eFH[:, 320:].float())
    placement = Placement.build(spec, ParallelSpec(tp=2, ep=2))
    for one, other in [(weights, canonical), (shard(weights, placement, 1), shard(canonical, placement, 1))]:
        for slot in range(one.num_experts):
            for turned, straight in zip(one.dequantized(slot), other.dequantized(slot), strict=True):
                assert torch.equal(turned, straight)
    weights.turn(gate_first=True)
    assert_same(weights, canonical)


@pytest.mark.parametrize("turned", [0, 1])
def test_stack_does_not_mix_orders(turned):
    parts = [random_weights(make_spec("none"), 0, experts=[expert]) for expert in (0, 1)]
    parts[turned].turn(gate_first=False)
    with pytest.raises(ConfigError, match=r"weights\.gate_first = .*all parts must be in one order"):
        stack(parts)
    parts[1 - turned].turn(gate_first=False)
    assert not stack(parts).gate_first


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_stack_does_not_mix_input_scales(factor):
    """Rows are quantized once, for all experts."""
    one, other = (random_expert(make_spec(STATIC), expert, seed=0) for expert in (0, 1))
    with pytest.raises(ConfigError, match=r"weights\.a13"):
        stack([one, other.with_tensors(a13=other.a13 * factor)])


def test_turning_a_copy_leaves_the_original():
    weights = random_weights(make_spec("none"), seed=0)
    gate_up = weights.dequantized(0)[0].clone()
    weights.to("cpu").turn(gate_first=False)
    assert torch.equal(weights.dequantized(0)[0], gate_up)


@pytest.mark.parametrize("quant", ["none", STATIC])
def test_a_random_expert_depends_on_seed_and_number_only(quant):
    spec = make_spec(quant)
    torch.manual_seed(1)
    one = random_expert(spec, 3, seed=5)
    torch.manual_seed(2)
    assert_same(one, random_expert(spec, 3, seed=5))
    assert_same(one, random_expert(spec.with_changes(num_experts=64, top_k=8), 3, seed=5))
    assert_same(one, random_weights(spec, seed=5, experts=[3]))
    for expert, seed in [(4, 5), (3, 6), (2, 6), (4, 4)]:
        other = random_expert(spec, expert, seed)
        difference = other.w13_eFH.float() - one.w13_eFH.float()
        assert relative(difference, one.w13_eFH) > 1  # sqrt(2) for independent draws


def test_random_experts_have_a_small_up_and_unit_output():
    weights = random_expert(make_spec("none", dtype="fp32"), 0, seed=0, up_scale=0.1)
    gate, up = weights.w13_eFH[0].chunk(2)
    assert float(gate.std()) == pytest.approx(160**-0.5, rel=0.03)
    assert float(up.std()) == pytest.approx(0.1 * 160**-0.5, rel=0.03)
    assert float(weights.w2_eHi.std()) == pytest.approx(320**-0.5, rel=0.03)


def test_static_scales_fit_gaussian_rows():
    spec = make_spec(STATIC)
    weights = random_expert(spec, 0, seed=0)
    x = torch.randn(2000, 160, generator=torch.Generator().manual_seed(9))
    hidden = activate(x @ weights.dequantized(0)[0].T, "swiglu")
    for values, scale in [(x, weights.a13), (hidden, weights.a2)]:
        saturated = (values.abs() > 448 * scale).float().mean()
        assert saturated < 1e-5
        assert values.abs().max() > 448 * scale / 4  # nor is range thrown away


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize(
    ("quant", "name"), [("fp8_block", "s13"), ("fp8_channel", "s2"), (STATIC, "a13"), (STATIC, "a2")]
)
def test_bad_scales_are_named(quant, name, bad):
    weights = random_weights(make_spec(quant), seed=0)
    weights.check_finite()
    broken = getattr(weights, name).clone()
    broken.view(-1)[-1] = bad
    with pytest.raises(ConfigError) as caught:
        replace(weights, **{name: broken}).check_finite()
    assert caught.value.field == f"weights.{name}"


@pytest.mark.parametrize("name", ["w13_eFH", "w2_eHi"])
def test_bad_unquantized_weights_are_named(name):
    weights = random_weights(make_spec("none"), seed=0)
    weights.check_finite()  # zeros and negative weights are fine
    broken = getattr(weights, name).clone()
    broken[-1, -1, -1] = math.nan
    with pytest.raises(ConfigError, match=f"weights.{name}"):
        replace(weights, **{name: broken}).check_finite()


def test_bytes_and_move():
    weights = random_weights(make_spec("fp8_block"), seed=0)
    assert weights.nbytes() == 5 * (640 * 160 + 160 * 320) + 4 * 5 * (6 * 2 + 2 * 3)
    assert_same(weights.to("cpu"), weights)
    assert weights.to("meta").device.type == "meta"


def one_element(gate, up, activation):
    if activation == "relu2":
        return max(gate, 0.0) ** 2
    if activation == "swiglu":
        return gate / (1 + math.exp(-gate)) * up
    if activation == "swigluoai":
        gate, up = min(gate, 7.0), min(max(up, -7.0), 7.0)
        return gate / (1 + math.exp(-1.702 * gate)) * (up + 1)
    return 0.5 * gate * (1 + math.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu2", "swigluoai"])
def test_activations_are_their_formulas(activation):
    gate = torch.linspace(-9, 9, 40, dtype=torch.float64)
    up = torch.linspace(9, -8, 40, dtype=torch.float64)  # beyond what is clamped, on both sides
    rows = gate[None] if activation == "relu2" else torch.cat([gate, up])[None]
    expected = [one_element(g, u, activation) for g, u in zip(gate.tolist(), up.tolist(), strict=True)]
    assert activate(rows, activation)[0].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)
    low = activate(rows.bfloat16(), activation)
    assert low.dtype == torch.bfloat16
    assert low[0].tolist() == pytest.approx(expected, rel=0.05, abs=0.01)


def with_biases(quant, **changes):
    return make_spec(quant, expert_bias=True, **{"activation": "swigluoai"} | changes)


@pytest.mark.parametrize("quant", QUANT_KINDS)
@pytest.mark.parametrize("activation", ["swigluoai", "relu2"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_slices_of_biases(quant, activation, tp):
    """Those of w13 go with its rows; that of w2 is in one slice, and no other, and every copy of an expert has it."""
    spec = with_biases(quant, activation=activation)
    whole = random_weights(spec, seed=1)
    assert (whole.b13_eF.shape, whole.b2_eH.shape) == ((5, spec.w13_rows(320)), (5, 160))
    assert whole.b13_eF.dtype == whole.b2_eH.dtype == torch.float32
    parallel = ParallelSpec(tp=tp, ep=2, replicas={4: [0]}, allow_empty_shards=True)
    placement = Placement.build(spec, parallel)
    for group in range(2):
        parts = [shard(whole, placement, group * tp + member) for member in range(tp)]
        forms = [type(whole).forms(spec, part.num_experts, part.width) for part in parts]
        for part, form in zip(parts, forms, strict=True):
            assert {name: (tuple(t.shape), t.dtype) for name, t in part.tensors().items()} == form
        halves = [part.b13_eF.chunk(2, 1) if spec.gated else (part.b13_eF,) for part in parts]
        experts = list(placement.homes[group])
        assert torch.equal(torch.cat([torch.cat(each, 1) for each in zip(*halves, strict=True)], 1),
                           whole.b13_eF[experts])  # fmt: skip
        assert torch.equal(parts[0].b2_eH, whole.b2_eH[experts])
        assert not any(part.b2_eH.any() for part in parts[1:])


def test_biases_are_turned_stacked_and_checked():
    spec = with_biases("fp8_block")
    weights, canonical = random_weights(spec, seed=0), random_weights(spec, seed=0)
    weights.turn(gate_first=False)
    assert torch.equal(weights.b13_eF, torch.cat(canonical.b13_eF.chunk(2, 1)[::-1], 1))
    assert torch.equal(weights.first_bias(3), canonical.first_bias(3))
    assert torch.equal(canonical.first_bias(3), canonical.b13_eF[3])
    assert weights.fingerprint() == canonical.fingerprint()
    assert_same(stack([random_weights(spec, 0, experts=[0, 1]), random_weights(spec, 0, experts=[2, 3, 4])]), canonical)
    assert empty_like(canonical).b2_eH.shape == (0, 160)
    assert canonical.nbytes() == type(canonical).bytes_of(spec, 5, 320)
    canonical.with_tensors(b2_eH=0 * canonical.b2_eH).check_finite()  # what a slice holds
    for name, bad in (("b13_eF", math.nan), ("b2_eH", math.inf), ("b2_eH", 1e11)):
        broken = canonical.biases[name].clone()
        broken[4, 7] = bad
        with pytest.raises(ConfigError, match=rf"weights\.{name}"):
            canonical.with_tensors(**{name: broken}).check_finite()


def test_weights_without_biases_are_drawn_as_ever():
    """Biases have a stream of their own."""
    plain, biased = random_expert(make_spec("fp8_block"), 2, 3), random_expert(with_biases("fp8_block"), 2, 3)
    assert not plain.biases
    assert_same(plain, biased.with_tensors(b13_eF=None, b2_eH=None))
    gate, up = biased.first_bias(0).chunk(2)
    assert float(gate.std()) == pytest.approx(0.25, rel=0.1)
    assert float(up.std()) == pytest.approx(0.0625, rel=0.1)


class TestFingerprint:
    @pytest.mark.parametrize("quant", QUANT_KINDS)
    @pytest.mark.parametrize("activation", ["swiglu", "relu2", "swigluoai"])
    def test_tells_another_order_apart(self, quant, activation):
        spec = MoESpec(
            hidden=256, intermediate=256, num_experts=4, top_k=2, quant=quant, activation=activation,
            expert_bias=activation == "swigluoai",
        )  # fmt: skip
        whole = random_weights(spec, 0)
        own = whole.fingerprint()
        assert own == random_weights(spec, 0).fingerprint()
        assert json.loads(json.dumps(own)) == own
        others = [random_weights(spec, 1)]
        for name, tensor in whole.tensors().items():
            for dim in range(tensor.ndim):
                if tensor.shape[dim] > 1:
                    codes = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor
                    changed = codes.roll(1, dim).view(tensor.dtype)
                    others.append(whole.with_tensors(**{name: changed}))
        signs = whole.w2_eHi.clone()
        bits = signs.view(torch.uint8)
        bits[0, 0, 7] ^= 0x80  # the highest bit of two words
        bits[0, 0, 15] ^= 0x80
        others.append(whole.with_tensors(w2_eHi=signs))
        for other in others:
            assert other.fingerprint() != own

    @pytest.mark.parametrize("quant", QUANT_KINDS)
    def test_is_the_same_whatever_comes_first(self, quant, monkeypatch):
        spec = MoESpec(hidden=128, intermediate=144, num_experts=3, top_k=2, quant=quant)
        whole = random_weights(spec, 0)
        own = whole.fingerprint()
        whole.turn(gate_first=False)
        assert whole.fingerprint() == own
        monkeypatch.setattr(weights, "PIECE", 1)
        assert whole.fingerprint() == own
        whole.gate_first = True  # not what it holds
        assert whole.fingerprint() != own

    def test_nothing_has_one_too(self):
        spec = MoESpec(hidden=128, intermediate=128, num_experts=3, top_k=2)
        nothing = empty_like(random_weights(spec, 0))
        assert nothing.fingerprint() == nothing.fingerprint()
