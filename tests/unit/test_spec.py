"""Specs: what can't work is refused with field, value, rule and legal values; cuts follow the slice rules."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moe_dist.bench.case import Experiment
from moe_dist.engine.planning import make_plan
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.model.spec import (
    ACTIVATIONS,
    QUANT_KINDS,
    MoESpec,
    ParallelSpec,
    WorkloadSpec,
    slice_bounds,
    split_bounds,
)
from moe_dist.runtime.context import RaySpec

SIZES = {"hidden": 64, "intermediate": 256, "num_experts": 8, "top_k": 2}
GROUPED = dict(SIZES, scoring="sigmoid", num_groups=4, top_groups=2)
quick = settings(max_examples=80, deadline=None)


def spec(**changes):
    return MoESpec(**{**SIZES, **changes})


@pytest.mark.parametrize(
    ("changes", "field", "in_message"),
    [
        ({"hiden": 3}, "model.hiden", "unknown key"),
        ({"hidden": "wide"}, "model.hidden", "is no whole number"),
        ({"top_k": 2.5}, "model.top_k", "is no whole number"),
        ({"top_k": None}, "model.top_k", "is no whole number"),
        ({"hidden": 0}, "model.hidden", "is too small (legal: 1 to "),
        ({"intermediate": -128}, "model.intermediate", "is too small (legal: 1 to "),
        ({"num_experts": 0}, "model.num_experts", "is too small (legal: 1 to "),
        ({"top_k": 0}, "model.top_k", "is too small (legal: 1 to "),
        ({"top_k": 9}, "model.top_k", "1 to 8"),
        ({"routed_scaling": 0}, "model.routed_scaling", "legal: 1e-06 to 1,000,000"),
        ({"routed_scaling": 1e-320}, "model.routed_scaling", "legal: 1e-06 to 1,000,000"),
        ({"routed_scaling": math.nan}, "model.routed_scaling", "finite"),
        ({"scoring": "argmax"}, "model.scoring", "is no legal value (legal: softmax, sigmoid)"),
        ({"quant": "int4"}, "model.quant", "fp8_channel"),
        ({"activation": 3}, "model.activation", "is no text (legal: swiglu, geglu, relu2, swigluoai)"),
        ({"dtype": "fp32"}, "model.dtype", "fp8_block works on bf16"),
        ({"shared_experts": "tp"}, "model.shared_intermediate", "1 and more"),
        ({"shared_experts": "some"}, "model.shared_experts", "replicated"),
        ({"top_groups": 2}, "model.top_groups", "only one group"),
        (dict(GROUPED, num_groups=3), "model.num_groups", "legal: 1, 2, 4"),
        (dict(GROUPED, num_groups=8), "model.num_groups", "two experts or more"),
        (dict(GROUPED, top_groups=5), "model.top_groups", "legal: 1 to 4"),
        (dict(GROUPED, top_k=5), "model.top_groups", "legal: 3 to 4"),  # 2 groups of 2 hold no 5 experts
    ],
)
def test_a_spec_that_can_not_work_is_refused(changes, field, in_message):
    with pytest.raises(ConfigError) as caught:
        spec(**changes)
    assert caught.value.field == field
    assert in_message in str(caught.value)
    assert repr(caught.value.value) in str(caught.value)
    # The other way in, by which nested sections are made, says the same.
    with pytest.raises(ConfigError) as validated:
        MoESpec.model_validate({**SIZES, **changes})
    assert str(validated.value) == str(caught.value)


def test_a_gated_shared_expert_is_whole_on_every_rank():
    spec = MoESpec(**SIZES, shared_intermediate=16, shared_gate=True)
    assert spec.with_changes(shared_experts="replicated").shared_spec().token_gate
    with pytest.raises(UnsupportedError, match=r"model\.shared_experts.*sigmoid of the token.*none, replicated"):
        spec.with_changes(shared_experts="tp")
    with pytest.raises(
        ConfigError, match=r"model\.shared_gate = True: .*shared_intermediate\) there is none.*legal: False"
    ):
        spec.with_changes(shared_intermediate=0)


def test_weights_on_inputs_go_with_one_expert_a_token():
    one = MoESpec(**SIZES | {"top_k": 1}, shared_intermediate=16, weights_on_input=True)
    assert not one.with_changes(shared_experts="replicated").shared_spec().weights_on_input
    with pytest.raises(ConfigError, match=r"model\.weights_on_input = True: .*top_k 2.*legal: False"):
        one.with_changes(top_k=2)
    with pytest.raises(UnsupportedError, match=r"model\.shared_experts = 'tp'.*times their weights.*none, replicated"):
        one.with_changes(shared_experts="tp")


def test_a_gate_by_itself_is_of_a_shared_expert_only():
    with pytest.raises(ConfigError, match=r"model\.token_gate = True.*several experts"):
        MoESpec(**SIZES, token_gate=True)
    one = MoESpec(**SIZES | {"num_experts": 1, "top_k": 1}, token_gate=True)
    with pytest.raises(ConfigError, match=r"model\.token_gate = True.*not of routed ones"):
        make_plan(one, ParallelSpec(), exchange="local", backend="torch")


@pytest.mark.parametrize("missing", sorted(SIZES))
def test_a_missing_size_is_named(missing):
    with pytest.raises(ConfigError, match=f"model.{missing} = None: this key is required"):
        MoESpec(**{key: value for key, value in SIZES.items() if key != missing})


def test_an_unknown_key_lists_the_known_ones():
    with pytest.raises(ConfigError) as caught:
        ParallelSpec(pp=2)
    assert caught.value.legal == ("tp", "ep", "expert_map", "replicas", "allow_empty_shards")


@pytest.mark.parametrize("activation", ["silu", "", "SWIGLU"])
def test_an_unknown_activation_is_unsupported(activation):
    with pytest.raises(UnsupportedError) as caught:
        spec(activation=activation)
    assert caught.value.supported == ACTIVATIONS
    assert repr(activation) in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "values", "field"),
    [
        (ParallelSpec, {"tp": 0}, "parallel.tp"),
        (ParallelSpec, {"ep": -1}, "parallel.ep"),
        (ParallelSpec, {"replicas": 3}, "parallel.replicas"),
        (ParallelSpec, {"replicas": {"hot": [1]}}, "parallel.replicas"),
        (WorkloadSpec, {}, "workload.tokens"),
        (WorkloadSpec, {"tokens": 0}, "workload.tokens"),
        (WorkloadSpec, {"tokens": 1, "token_layout": "striped"}, "workload.token_layout"),
        pytest.param(ParallelSpec, {"replicas": {0: 1}}, "parallel.replicas"),
        pytest.param(ParallelSpec, {"replicas": {0: [1], "a": [1]}}, "parallel.replicas"),
        pytest.param(MoESpec, dict(SIZES, routed_scaling=math.inf), "model.routed_scaling"),
    ],
)
def test_other_sections_refuse_with_their_own_names(cls, values, field):
    with pytest.raises(ConfigError) as caught:
        cls(**values)
    assert caught.value.field.startswith(field)


@pytest.mark.parametrize(
    ("cls", "values", "said"),
    [
        (ParallelSpec, {"tp": 9999}, "parallel.tp = 9999: is too large (legal: 1 to 4,096)"),
        (WorkloadSpec, {"tokens": 0}, "(legal: 1 to 16,777,216)"),
        (RaySpec, {"collective_timeout_s": 0.01}, "(legal: 0.1 to 604,800)"),
        (RaySpec, {"start_timeout_s": 0.0}, "(legal: above 0 to 604,800)"),
        (ParallelSpec, {"replicas": ((1 << 30, (0,)),)}, "(legal: -131,072 to 131,072)"),
        (
            Experiment,
            {"models": ()},
            "experiment.models = (): is empty (legal: a list with one or more of a section of ",
        ),
        (
            Experiment,
            {"models": (spec(),), "tokens": 8},
            "experiment.tokens = 8: is no list (legal: a list with one or more of 1 to 16,777,216)",
        ),
    ],
)
def test_bounds_and_kinds_are_told_in_our_words(cls, values, said):
    with pytest.raises(ConfigError) as caught:
        cls(**values)
    assert said in str(caught.value)


def test_keys_of_a_section_inside_are_names():
    with pytest.raises(ConfigError, match="keys that are no names"):
        Experiment(models=(spec(),), ray={0: None})


def test_specs_are_frozen_and_hashable():
    one = spec()
    with pytest.raises(ValidationError, match="frozen"):
        one.top_k = 3
    assert one.top_k == 2
    assert hash(one) == hash(spec())
    assert one != spec(top_k=3)


def test_with_changes_validates_and_leaves_the_original():
    one = spec(name="m")
    two = one.with_changes(top_k=8, quant="fp8_channel")
    assert (two.name, two.top_k, two.quant, two.hidden) == ("m", 8, "fp8_channel", 64)
    assert one.top_k == 2
    with pytest.raises(ConfigError, match=r"model\.top_k = 9"):
        one.with_changes(top_k=9)
    with pytest.raises(ConfigError, match="unknown key"):
        one.with_changes(topk=1)
    parallel = ParallelSpec(ep=4, replicas={0: [1]})
    assert parallel.with_changes(tp=2).replicas == ((0, (1,)),)


@pytest.mark.parametrize("quant", QUANT_KINDS)
@pytest.mark.parametrize(("activation", "rows"), [("swiglu", 512), ("geglu", 512), ("swigluoai", 512), ("relu2", 256)])
def test_derived_properties(quant, activation, rows):
    one = spec(quant=quant, activation=activation)
    assert one.gated == (rows == 512)
    assert one.w13_rows(256) == rows
    assert one.quantized == (quant != "none")
    assert one.granularity == (128 if quant == "fp8_block" else 16)
    assert one.quant_label == ("bf16" if quant == "none" else quant)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_dtype(dtype, torch_dtype):
    one = spec(quant="none", dtype=dtype)
    assert (one.torch_dtype, one.quant_label) == (torch_dtype, dtype)


@pytest.mark.parametrize("how", ["replicated", "tp"])
def test_no_shared_expert_beside_experts_with_biases(how):
    with pytest.raises(UnsupportedError, match=rf"model\.shared_experts = '{how}'.*biases.*supported: none"):
        spec(shared_experts=how, shared_intermediate=512, expert_bias=True)
    assert spec(expert_bias=True, shared_intermediate=512).expert_bias


def test_the_shared_expert_is_a_layer_of_one_expert():
    shared = spec(shared_experts="tp", shared_intermediate=512, activation="geglu", name="m").shared_spec()
    assert (shared.num_experts, shared.top_k, shared.intermediate, shared.hidden) == (1, 1, 512, 64)
    assert (shared.activation, shared.quant, shared.name) == ("geglu", "fp8_block", "m-shared")


@pytest.mark.parametrize(
    ("tp", "ep", "replicas", "label"),
    [
        (1, 1, {}, "single"),
        (4, 1, {}, "TP4"),
        (1, 4, {}, "EP4"),
        (2, 3, {}, "TP2xEP3"),
        (1, 4, {5: [0, 1], 0: [3]}, "EP4+3"),
    ],
)
def test_parallel_label_world_and_replicas(tp, ep, replicas, label):
    parallel = ParallelSpec(tp=tp, ep=ep, replicas=replicas)
    assert (parallel.label, parallel.world) == (label, tp * ep)
    assert parallel.replicas == tuple((expert, tuple(replicas[expert])) for expert in sorted(replicas))


@pytest.mark.parametrize(
    ("total", "parts", "granularity", "widths"),
    [
        (768, 4, 128, [256, 256, 128, 128]),
        (768, 3, 128, [256, 256, 256]),
        (320, 2, 128, [256, 64]),
        (320, 3, 128, [128, 128, 64]),
        (100, 1, 128, [100]),
        (1408, 4, 16, [352, 352, 352, 352]),
    ],
)
def test_slice_widths(total, parts, granularity, widths):
    bounds = slice_bounds(total, parts, granularity, "parallel.tp", False)
    assert [stop - start for start, stop in bounds] == widths


@quick
@given(total=st.integers(1, 5000), parts=st.integers(1, 17), granularity=st.sampled_from([1, 16, 128]))
def test_slices_are_whole_granules_wider_first(total, parts, granularity):
    bounds = slice_bounds(total, parts, granularity, "f", True)
    assert len(bounds) == parts
    assert (bounds[0][0], bounds[-1][1]) == (0, total)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(bounds))
    assert all(stop % granularity == 0 or stop == total for _, stop in bounds)
    granules = [math.ceil((stop - start) / granularity) for start, stop in bounds]
    assert sum(granules) == math.ceil(total / granularity)
    assert granules == sorted(granules, reverse=True)
    assert granules[0] - granules[-1] <= 1
    if granules[-1] > 0:
        assert slice_bounds(total, parts, granularity, "f", False) == bounds
    else:
        with pytest.raises(ConfigError) as caught:
            slice_bounds(total, parts, granularity, "f", False)
        assert (caught.value.field, caught.value.value) == ("f", parts)
        assert caught.value.legal == f"1 to {sum(granules)}"


@quick
@given(total=st.integers(0, 400), parts=st.integers(1, 40))
def test_split_is_ceil_first(total, parts):
    bounds = split_bounds(total, parts)
    sizes = [stop - start for start, stop in bounds]
    assert sizes == [-(-total // parts)] * (total % parts) + [total // parts] * (parts - total % parts)
    assert [item for start, stop in bounds for item in range(start, stop)] == list(range(total))
