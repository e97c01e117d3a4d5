"""Every exchange × every backend, from the registries, under every placement shape, against the oracle.

Inputs are fresh in every session; a failure prints the seed, and MOE_DIST_TEST_SEED repeats it.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from dist.pool import Pool, group_of
from exchanges import exchanges_here
from layer_cases import (
    CPU,
    HERE,
    Case,
    Inputs,
    exact_error,
    exchanges_for,
    expected_payload,
    failures,
    planned,
    run_cases,
    run_outputs,
)

from moe_dist.backends import BACKENDS, Problem
from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.engine.together import WHOLE
from moe_dist.errors import ConfigError
from moe_dist.exchange import EXCHANGES
from moe_dist.exchange.all_to_all.exchange import PACKED_UP_TO
from moe_dist.model.placement import Placement
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import shard_from
from moe_dist.oracle.reference import oracle_partial, relative_error
from moe_dist.step import FORMS
from moe_dist.workloads.random_weights import random_expert, random_weights
from moe_dist.workloads.skews import synthetic_routing

SEED = int(os.environ.get("MOE_DIST_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
FORMATS = [("none", "bf16"), ("none", "fp32")]
FORMATS += [(quant, "bf16") for quant in ("fp8_block", "fp8_tensor_static", "fp8_tensor_dynamic", "fp8_channel")]
LAYOUTS = ("sharded", "replicated")
LLAMA4, ON_INPUT = "as Llama 4 has it", {"top_k": 1, "weights_on_input": True}
SPREADING = [name for name in exchanges_here() if name != "local"]

EIGHT = (("TP8", "ag_rs"), ("EP8", "all_to_all"))  # of eight ranks; `make nightly` has the others
PLACEMENTS = [
    ParallelSpec(),
    ParallelSpec(tp=2),
    ParallelSpec(ep=2),
    ParallelSpec(tp=3),
    ParallelSpec(ep=3),
    ParallelSpec(tp=4),
    ParallelSpec(ep=4),
    ParallelSpec(tp=2, ep=2),
    ParallelSpec(ep=4, replicas={0: (1, 3), 5: (0,), 9: (0, 1, 2)}),
    ParallelSpec(tp=2, ep=2, replicas={1: (1,), 8: (0,)}),
    ParallelSpec(tp=2, ep=2, expert_map=(1, 0, 1, 1, 0, 1, 1, 0, 1, 1), replicas={1: (1,), 8: (0,)}),
    ParallelSpec(tp=8),
    ParallelSpec(ep=8),
    ParallelSpec(tp=2, ep=4),
    ParallelSpec(tp=4, ep=2),
]
WIDTHS = {1: 320, 2: 320, 3: 320, 4: 448, 8: 960}  # the last slice of a TP placement is a partial block


def spec_of(quant: str = "fp8_block", dtype: str = "bf16", **sizes: Any) -> MoESpec:
    return MoESpec(
        **{"hidden": 256, "intermediate": 320, "num_experts": 10, "top_k": 3, **sizes}, quant=quant, dtype=dtype
    )


def uneven(world: int) -> tuple[int, ...]:
    """0 to 6 tokens a rank, but 9 on one and, if there are several, none on another."""
    draw = random.Random(SEED + world)
    counts = [draw.randint(0, 6) for _ in range(world)]
    busy, idle = draw.sample(range(world), 2) if world > 1 else (0, None)
    counts[busy] = 9
    if idle is not None:
        counts[idle] = 0
    return tuple(counts)


def check(pool: Pool, cases: list[Case]) -> list[dict[str, Any]]:
    """Run the cases, which share one world, and fail with a line for each that is out of bounds."""
    assert cases
    by_rank = pool.run(cases[0].plan.placement.world, run_cases, cases)
    wrong = failures(cases, by_rank)
    assert not wrong, f"{len(wrong)} findings, MOE_DIST_TEST_SEED={SEED}:\n" + "\n".join(wrong)
    return by_rank


def refused(spec: MoESpec, parallel: ParallelSpec, backend: str) -> bool:
    """Whether the backend says no to a rank's part, with its reason: test_refused.py has them all."""
    placement = Placement.build(spec, parallel)
    problems = {
        Problem(spec, placement.width_of(rank), len(placement.experts_of(rank)), "cpu", None, spec.dtype)
        for rank in range(parallel.world)
    }
    return not all(BACKENDS.get(backend).supports(problem).ok for problem in problems)


def everywhere(spec: MoESpec, parallel: ParallelSpec, inputs: Inputs, name: str = "", **changes: Any) -> list[Case]:
    """This layer with each exchange and layout, and each backend that runs here."""
    cases = []
    for exchange, backend, layout in product(exchanges_for(parallel), HERE, LAYOUTS):
        if refused(spec, parallel, backend):
            continue
        plan = planned(spec, parallel, exchange, backend, layout, "auto", None)
        label = f"{name} {parallel.label} {spec.quant_label} {exchange} {backend} {layout}"
        cases.append(Case(label, plan, inputs, **changes))
    return cases


def test_nothing_that_runs_here_is_left_out() -> None:
    assert "torch" in HERE
    assert {"all_reduce", "ag_rs", "all_to_all"} <= set(exchanges_for(ParallelSpec(ep=2)))
    assert set(exchanges_for(ParallelSpec())) == set(exchanges_here())


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(
    ("parallel", "exchange"),
    [
        pytest.param(
            parallel, exchange, id=f"{parallel.label}-{exchange}",
            marks=[pytest.mark.slow] * (  # hierarchical has a file of its own, test_hierarchical.py
                (parallel.world == 8 and (parallel.label, exchange) not in EIGHT)
                or (exchange == "hierarchical" and parallel.world not in (1, 2) and parallel.label != "TP2xEP2+2")
            ),
        )
        for parallel in PLACEMENTS
        for exchange in exchanges_for(parallel)
    ],
)  # fmt: skip
def test_layer(pool: Pool, parallel: ParallelSpec, exchange: str, backend: str) -> None:
    inputs = Inputs(uneven(parallel.world), SEED)
    wanted = [
        (quant, dtype, "swiglu", payload, combine)
        for quant, dtype in FORMATS
        for payload, combine in (("auto", "bf16"), ("auto", "fp32"), ("unquantized", "fp32"))
        if quant != "none" or payload == "auto"  # the others have nothing to quantize
    ]
    wanted += [
        (quant, "bf16", activation, "auto", None)
        for quant in ("none", "fp8_block", "fp8_tensor_static")
        for activation in ("geglu", "relu2")
    ]
    wanted.append(("fp8_block", "bf16", "swigluoai", "auto", None))  # as gpt-oss has it, with biases
    wanted.append(("fp8_block", "bf16", LLAMA4, "auto", None))
    cases = []
    for quant, dtype, activation, payload, combine in wanted:
        sizes: dict[str, Any] = {"intermediate": WIDTHS[parallel.tp], "num_experts": 10 if parallel.ep > 1 else 6}
        if activation == LLAMA4:
            activation, sizes = "swiglu", sizes | ON_INPUT
        spec = spec_of(quant, dtype, activation=activation, expert_bias=activation == "swigluoai", **sizes)
        for layout in LAYOUTS:
            arguments = (spec, parallel, exchange, backend, layout, payload)
            travels = expected_payload(*arguments)
            if travels == "illegal" or refused(spec, parallel, backend):  # see test_refused.py
                continue
            plan = planned(*arguments, combine)
            assert (plan.payload, plan.exchange, plan.backend) == (travels, exchange, backend)
            assert plan.out_dtype == (torch.float32 if (combine or dtype) == "fp32" else torch.bfloat16)
            name = f"{spec.quant_label} {activation} top {spec.top_k} {layout} payload={payload} combine={combine}"
            # all_to_all takes each of its ways, the other exchanges pad.
            bucket = 40 if layout == "sharded" and combine == "fp32" else None
            exact = exchange == "all_to_all" and combine == "fp32"
            cases.append(Case(f"{name} bucket={bucket} exact={exact}", plan, inputs, bucket, exact=exact))
    check(pool, cases)


def test_all_placements_agree_without_quantization(pool: Pool) -> None:
    """In float32 every placement and every exchange is the same function, to the order of its sums."""
    spec = spec_of("none", "fp32", intermediate=960)
    outputs: dict[str, torch.Tensor] = {}
    for parallel in PLACEMENTS:
        counts = [0] * parallel.world
        for token in range(17):  # the same 17 tokens in all, wherever they lie
            counts[token * token % parallel.world] += 1
        cases = everywhere(spec, parallel, Inputs((17,), SEED))
        cases = [Case(case.name, case.plan, Inputs(tuple(counts), SEED)) for case in cases]
        by_rank = pool.run(parallel.world, run_outputs, cases)
        for case in cases:
            pieces = [outputs_of_rank[case.name] for outputs_of_rank in by_rank]
            if case.plan.token_layout == "replicated":
                for rank, piece in enumerate(pieces):
                    assert torch.equal(piece, pieces[0]), f"{case.name}: ranks 0 and {rank} differ"
                pieces = pieces[:1]
            outputs[case.name] = torch.cat(pieces)
    assert len(outputs) > 2 * 3 * (len(PLACEMENTS) - 1)
    first, *others = outputs.items()
    wrong = [name for name, y in others if not relative_error(y, first[1]) <= 1e-5]
    assert not wrong, f"off {first[0]}, MOE_DIST_TEST_SEED={SEED}: {wrong}"


EDGES: dict[str, tuple[ParallelSpec, dict[str, Any], dict[str, Any]]] = {
    # name: placement, sizes of the layer, what enters it
    "one token in all, on the first rank": (ParallelSpec(ep=4), {}, {"counts": (1, 0, 0, 0), "holes": 0.0}),
    "one token in all, on the last rank": (ParallelSpec(tp=2, ep=2), {}, {"counts": (0, 0, 0, 1), "holes": 0.0}),
    "all ranks zero but one": (ParallelSpec(ep=3), {}, {"counts": (0, 23, 0)}),
    "no token anywhere": (ParallelSpec(tp=2, ep=2), {}, {"counts": (0, 0, 0, 0)}),
    "every token on one expert": (ParallelSpec(ep=4), {}, {"counts": (5, 2, 0, 9), "skew": "single", "holes": 0.0}),
    "every token on one expert, TP": (ParallelSpec(tp=3), {}, {"counts": (5, 0, 9), "skew": "single", "holes": 0.0}),
    "most ids are -1": (ParallelSpec(ep=4), {}, {"counts": (6, 0, 7, 3), "holes": 0.7}),
    "all ids are -1": (ParallelSpec(ep=2), {}, {"counts": (4, 3), "holes": 1.0}),
    "top_k 1": (ParallelSpec(ep=4), {"top_k": 1}, {"counts": (6, 0, 1, 3), "holes": 0.0}),
    "weights on inputs": (ParallelSpec(ep=4), ON_INPUT, {"counts": (6, 0, 1, 3), "holes": 0.4}),
    "weights on inputs of slices": (ParallelSpec(tp=2, ep=2), ON_INPUT, {"counts": (6, 0, 1, 3)}),
    "weights on inputs, one token in all": (ParallelSpec(tp=2), ON_INPUT, {"counts": (0, 1), "holes": 0.0}),
    "top_k all experts": (ParallelSpec(ep=3), {"top_k": 6, "num_experts": 6}, {"counts": (4, 0, 3), "holes": 0.0}),
    "7 experts over 4": (ParallelSpec(ep=4), {"num_experts": 7}, {"counts": (4, 1, 0, 6)}),
    "5 experts over 8": (
        ParallelSpec(ep=8, allow_empty_shards=True), {"num_experts": 5}, {"counts": (4, 1, 0, 6, 2, 0, 0, 3)},
    ),
    "one expert over 2": (
        ParallelSpec(ep=2, allow_empty_shards=True), {"num_experts": 1, "top_k": 1}, {"counts": (4, 3)},
    ),
    "768 over 4": (ParallelSpec(tp=4), {"intermediate": 768}, {"counts": (4, 1, 0, 6)}),
    "slices of width zero": (
        ParallelSpec(tp=4, allow_empty_shards=True), {"intermediate": 256}, {"counts": (4, 1, 0, 6)},
    ),
    "biases beside slices of width zero": (
        ParallelSpec(tp=4, allow_empty_shards=True),
        {"intermediate": 256, "activation": "swigluoai", "expert_bias": True}, {"counts": (4, 1, 0, 6)},
    ),
    "width zero in a grid": (
        ParallelSpec(tp=2, ep=2, allow_empty_shards=True), {"intermediate": 96}, {"counts": (4, 1, 0, 6)},
    ),
    "partial blocks everywhere": (
        ParallelSpec(tp=2, ep=2), {"hidden": 200, "intermediate": 272}, {"counts": (4, 1, 0, 6)},
    ),
    "more tokens than all_to_all packs": (ParallelSpec(tp=2, ep=2), {}, {"counts": (70, 3, 0, PACKED_UP_TO + 1)}),
    "more ranks than tokens": (ParallelSpec(ep=8), {}, {"counts": (0, 1, 0, 0, 1, 0, 0, 1), "holes": 0.0}),
}  # fmt: skip


@pytest.mark.parametrize("edge", EDGES)
def test_edge(pool: Pool, edge: str) -> None:
    parallel, sizes, entering = EDGES[edge]
    cases = []
    for quant, dtype in FORMATS:
        cases += everywhere(spec_of(quant, dtype, **sizes), parallel, Inputs(seed=SEED, **entering))
    check(pool, cases)


def test_edges_are_what_they_say() -> None:
    slices = planned_slices(spec_of(intermediate=768), ParallelSpec(tp=4))
    assert slices == [256, 256, 128, 128]
    assert planned_slices(spec_of(intermediate=256), ParallelSpec(tp=4, allow_empty_shards=True)) == [128, 128, 0, 0]
    with pytest.raises(ConfigError, match=r"parallel\.tp = 4"):
        planned_slices(spec_of(intermediate=256), ParallelSpec(tp=4))
    with pytest.raises(ConfigError, match=r"parallel\.ep = 8"):
        planned_slices(spec_of(num_experts=5), ParallelSpec(ep=8))


def planned_slices(spec: MoESpec, parallel: ParallelSpec) -> list[int]:
    plan = planned(spec, parallel, "ag_rs", "torch", "sharded", "auto", None)
    return [plan.placement.width_of(rank) for rank in range(parallel.world)]


@pytest.mark.parametrize("parallel", [ParallelSpec(tp=2), ParallelSpec(ep=2)], ids=lambda parallel: parallel.label)
def test_swapped_halves_are_seen(pool: Pool, parallel: ParallelSpec) -> None:
    """With up a thousandth of gate the layer is right, and with halves exchanged it is far off, in every format."""
    inputs = Inputs((5, 4), SEED)
    right = [c for quant, dtype in FORMATS for c in everywhere(spec_of(quant, dtype), parallel, inputs, up_scale=1e-3)]
    biased = spec_of(activation="swigluoai", expert_bias=True)
    right += everywhere(biased, parallel, inputs, "with biases", up_scale=1e-3)
    check(pool, right)
    wrong = [Case(case.name, case.plan, inputs, up_scale=1e-3, swap=True) for case in right]
    by_rank = pool.run(2, run_cases, wrong)
    unseen = [case.name for case in wrong if not exact_error(case, by_rank) > 0.3]
    assert not unseen, f"MOE_DIST_TEST_SEED={SEED}: {unseen}"


@pytest.mark.parametrize("parallel", [ParallelSpec(tp=2), ParallelSpec(ep=2)], ids=lambda parallel: parallel.label)
def test_a_weight_on_the_other_side_is_seen(pool: Pool, parallel: ParallelSpec) -> None:
    """Of an expert whose input is weighed, and of one whose output is."""
    inputs = Inputs((9, 7), SEED, holes=0.0)
    right = [c for quant, dtype in FORMATS for c in everywhere(spec_of(quant, dtype, **ON_INPUT), parallel, inputs)]
    wrong = [replace(case, turned=True) for case in right]
    by_rank = pool.run(2, run_cases, wrong)
    unseen = [case.name for case in wrong if not exact_error(case, by_rank) > 0.1]
    assert not unseen, f"MOE_DIST_TEST_SEED={SEED}: {unseen}"


@pytest.mark.parametrize("bucket", [11, PACKED_UP_TO, PACKED_UP_TO + 1])
def test_bucket_given_by_the_caller(pool: Pool, bucket: int) -> None:
    """Every bucket gives what the oracle says, with replicas too: padding does not move a token to another copy."""
    parallel, inputs = ParallelSpec(tp=2, ep=2, replicas={1: (1,), 8: (0,)}), Inputs((4, 1, 0, 6), SEED)
    cases = [c for quant, dtype in FORMATS for c in everywhere(spec_of(quant, dtype), parallel, inputs, bucket=bucket)]
    check(pool, cases)


def test_exact_splits(pool: Pool) -> None:
    """all_to_all without padding, with replicas and a rank without tokens."""
    parallel, inputs = ParallelSpec(tp=2, ep=2, replicas={1: (1,), 8: (0,)}), Inputs((4, 1, 0, 6), SEED)
    cases = [c for quant, dtype in FORMATS for c in everywhere(spec_of(quant, dtype), parallel, inputs, exact=True)]
    check(pool, [case for case in cases if case.plan.exchange == "all_to_all"])


@pytest.mark.parametrize(
    "parallel",
    [ParallelSpec(), ParallelSpec(tp=2, ep=2, replicas={1: (1,)}), ParallelSpec(ep=3)],
    ids=lambda p: p.label,
)
def test_every_pair_of_forms(pool: Pool, parallel: ParallelSpec) -> None:
    """Rows as tokens or sorted by expert, wherever an exchange makes a form that a backend takes; exact splits too.
    Those of whole layers are in tests/dist/test_fused.py."""
    inputs, cases = Inputs(uneven(parallel.world), SEED), []
    for (quant, dtype), exchange, backend, layout in product(FORMATS, exchanges_for(parallel), HERE, LAYOUTS):
        for form in (form for form in EXCHANGES.get(exchange).makes if form in BACKENDS.get(backend).takes):
            plan = make_plan(
                spec_of(quant, dtype), parallel, exchange=exchange, backend=backend, token_layout=layout, form=form,
                machine=CPU,
            )  # fmt: skip
            assert plan.form == form
            exact = form == "expert" and layout == "sharded"
            cases.append(Case(f"{form} {quant} {dtype} {exchange} {backend} {layout}", plan, inputs, exact=exact))
    assert {case.plan.form for case in cases} == set(FORMS) - {WHOLE}
    check(pool, cases)


def test_layer_with_its_own_router(pool: Pool) -> None:
    inputs, parallel = Inputs((4, 1, 0, 6), SEED), ParallelSpec(tp=2, ep=2)
    check(pool, everywhere(spec_of(), parallel, inputs, routed_by_layer=True))
    llama4 = spec_of(scoring="sigmoid", renormalize=False, **ON_INPUT)
    check(pool, everywhere(llama4, parallel, inputs, routed_by_layer=True))


@pytest.mark.parametrize(
    "parallel", [ParallelSpec(), ParallelSpec(tp=2, ep=2), ParallelSpec(ep=3)], ids=lambda p: p.label
)
@pytest.mark.parametrize("how", ["replicated", "tp"])
def test_shared_experts(pool: Pool, parallel: ParallelSpec, how: str) -> None:
    """Replicated: every exchange, gated where tokens are sharded. Sliced over all ranks: those that bring every token,
    the others must refuse."""
    inputs = Inputs(uneven(parallel.world), SEED, wild=False)  # a shared expert takes every row
    cases = []
    for (quant, dtype), exchange, backend, layout in product(FORMATS, exchanges_for(parallel), HERE, LAYOUTS):
        gated = how == "replicated" and layout == "sharded"
        spec = spec_of(quant, dtype, shared_experts=how, shared_intermediate=448, shared_gate=gated)
        if how == "tp" and not EXCHANGES.get(exchange).every_token:
            with pytest.raises(ConfigError, match=r"model\.shared_experts"):
                planned(spec, parallel, exchange, backend, layout, "auto", None)
            continue
        plan = planned(spec, parallel, exchange, backend, layout, "auto", None)
        cases.append(Case(f"{how} {spec.quant_label} {exchange} {backend} {layout}", plan, inputs))
        if how == "replicated" and (quant == "fp8_tensor_dynamic" or dtype == "fp32"):  # it gets tokens as they came
            spec = spec_of(quant, dtype, shared_experts=how, shared_intermediate=448, **ON_INPUT)
            plan = planned(spec, parallel, exchange, backend, layout, "auto", None)
            cases.append(
                Case(f"beside weights on inputs {spec.quant_label} {exchange} {backend} {layout}", plan, inputs)
            )
    assert not EXCHANGES.get("all_to_all").every_token
    check(pool, cases)


def test_shared_expert_needs_the_static_scale_of_the_rows() -> None:
    """Rows travel quantized with the routed experts' scale: another one would silently scale the shared output."""
    spec = spec_of("fp8_tensor_static", shared_experts="tp", shared_intermediate=448)
    plan = planned(spec, ParallelSpec(), "local", "torch", "sharded", "auto", None)
    weights = random_weights(spec, SEED)
    shared = random_expert(spec.shared_spec(), 0, SEED)
    MoELayer(plan, weights, Comm.single(), shared=shared)
    with pytest.raises(ConfigError, match=r"shared\.a13"):
        MoELayer(plan, weights, Comm.single(), shared=shared.with_tensors(a13=1.7 * shared.a13))


REAL = {
    "Qwen3-30B-A3B, TP4 uneven": (
        ParallelSpec(tp=4),
        {"hidden": 2048, "intermediate": 768, "num_experts": 5, "top_k": 2},
    ),
    "DeepSeek-V3, EP4": (ParallelSpec(ep=4), {"hidden": 7168, "intermediate": 2048, "num_experts": 4, "top_k": 2}),
}


@pytest.mark.parametrize("model", REAL)
@pytest.mark.parametrize("quant", ["fp8_block"])
def test_real_shapes(pool: Pool, model: str, quant: str) -> None:
    parallel, sizes = REAL[model]
    spec = spec_of(quant, **sizes)
    arguments = [(exchange, layout) for exchange in SPREADING for layout in LAYOUTS]
    by_rank = pool.run(parallel.world, real_shape, spec, parallel, arguments)
    for index, (exchange, layout) in enumerate(arguments):
        for rank, errors in enumerate(by_rank):
            oracle, exact = errors[index]
            text = f"{exchange} {layout} rank {rank}, MOE_DIST_TEST_SEED={SEED}"
            assert oracle <= 1e-2, text
            assert exact <= 5e-2, text


def real_shape(
    comm: Comm, spec: MoESpec, parallel: ParallelSpec, arguments: list[tuple[str, str]]
) -> list[tuple[float, float]]:
    """Each rank makes its own shard only; the partial oracles are summed over the ranks."""
    import torch.distributed as dist

    placement = Placement.build(spec, parallel)
    own = shard_from(lambda expert: random_expert(spec, expert, SEED_OF_SHAPES), placement, comm.rank)
    bounds = [(0, 3), (3, 3), (3, 4), (4, 9)]
    x = torch.randn(9, spec.hidden, generator=torch.Generator().manual_seed(SEED_OF_SHAPES)).bfloat16()
    routing = synthetic_routing(spec, 9, "uniform", SEED_OF_SHAPES)
    errors = []
    known: dict[Any, torch.Tensor] = {}
    for exchange, layout in arguments:
        plan = make_plan(
            spec, parallel, exchange=exchange, backend="torch", token_layout=layout, machine=CPU
        )  # fmt: skip
        layer = MoELayer(plan, own, comm)
        start, stop = bounds[comm.rank] if layout == "sharded" else (0, 9)
        y = layer(x[start:stop], routing.rows(start, stop))
        rows, sources = layer.exchange.identify(bounds if layout == "sharded" else [(0, 9)])
        groups = placement.serving_groups(routing.ids_TK, rows, sources)
        pair = []
        for numerics in (layer.backend.numerics, None):
            if numerics not in known:  # without replicas and dynamic tensor scales all exchanges ask for the same
                expected = oracle_partial(x, routing, own, spec, placement, comm.rank, [(0, 9)], groups, numerics)
                dist.all_reduce(expected, group=group_of(comm.world))
                known[numerics] = expected
            pair.append(relative_error(y, known[numerics][start:stop]))
        errors.append((pair[0], pair[1]))
    return errors


SEED_OF_SHAPES = 20261122  # a shape of 7168 × 2048 has so many values that fresh ones would add nothing
