"""The check with whole experts: good layers pass far below its tolerance, and every way to load a slice wrong is seen,
though the oracle takes its weights from the same shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit
from checkpoints import fused as fused_form
from dist.pool import Pool

from moe_dist.bench.case import Case
from moe_dist.bench.findings import merge
from moe_dist.bench.measure import measure
from moe_dist.bench.results import make_row
from moe_dist.bench.rounds import Turn
from moe_dist.bench.row import Row
from moe_dist.bench.source_spec import SourceSpec
from moe_dist.bench.tolerance import WHOLE_TOLERANCE
from moe_dist.bench.whole_experts import compared_tokens
from moe_dist.checkpoint import layer_spec, layout, load, make_checkpoint
from moe_dist.comm import Comm
from moe_dist.errors import RankFailure
from moe_dist.machine.machine import Machine
from moe_dist.model import weights
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec, WorkloadSpec
from moe_dist.runtime.context import RankContext
from moe_dist.workloads import random_weights
from moe_dist.workloads.skews import synthetic_routing

SPEC = MoESpec(name="small", hidden=256, intermediate=384, num_experts=8, top_k=2)
WIDTH = 512  # of a checkpoint's experts
SHARED = {"shared_intermediate": 256}
MACHINE = Machine("cpu", 1, "a test's CPU")


def case(model: MoESpec, source: SourceSpec | None = None, exchange: str = "ag_rs", **parallel: Any) -> Case:
    workload = WorkloadSpec(tokens=12, seed=3)
    grid = ParallelSpec(**parallel)
    source = source or SourceSpec(seed=5)
    return Case(model=model, source=source, parallel=grid, exchange=exchange, backend="torch", workload=workload,
                iters=0)  # fmt: skip


def checkpoint(directory: Path, fused: bool = False, **options: Any) -> Path:
    sizes = {"hidden": 256, "intermediate": WIDTH, "num_experts": 8, "top_k": 2, "shards": 1}
    made = make_checkpoint(directory, **(sizes | options))
    if fused:
        edit(made, None, fused_form)
    return made


def of(directory: Path, shared: str = "none", **parallel: Any) -> Case:
    source = SourceSpec(checkpoint=str(directory), layer=1)
    return case(layer_spec(directory, 1).with_changes(shared_experts=shared), source, **parallel)


# What goes wrong, on every rank


def first_slice_everywhere() -> tuple[object, str, Any]:
    part = layout.Piece.part

    return layout.Piece, "part", lambda piece, start, stop: part(piece, 0, stop - start)


def gate_for_up() -> tuple[object, str, Any]:
    target, other = load._target, {"gate": "up", "up": "gate"}

    def swapped(shard: weights.ExpertWeights, slot: int, piece: layout.Piece) -> torch.Tensor:
        return target(shard, slot, replace(piece, matrix=other.get(piece.matrix, piece.matrix)))

    return load, "_target", swapped


def odd_before_even() -> tuple[object, str, Any]:
    canonical = layout.Piece.canonical

    def swapped(piece: layout.Piece, values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        found = canonical(piece, values, shape)
        return torch.cat(found.chunk(2)[::-1]) if piece.matrix == "both" else found

    return layout.Piece, "canonical", swapped


def bias_once_for_each_slice() -> tuple[object, str, Any]:
    """The sum is that of two slices with the whole bias of an expert's output each, which no layer takes."""
    fill_all = load._load

    def filled(*given: Any) -> weights.ExpertWeights:
        found = fill_all(*given)
        return found.with_tensors(b2_eH=2 * found.b2_eH)

    return load, "_load", filled


def next_expert() -> tuple[object, str, Any]:
    expert = layout.Layer.expert
    return layout.Layer, "expert", lambda layer, number: expert(layer, (number + 1) % layer.spec.num_experts)


def scales_of_another_block() -> tuple[object, str, Any]:
    fill = load._fill

    def filled(checkpoint: Any, piece: layout.Piece, target: torch.Tensor, start: int, stop: int) -> None:
        fill(checkpoint, piece, target, start, stop)
        if piece.scale:
            target.copy_(target.flip(-1).clone())

    return load, "_fill", filled


def one_column_off() -> tuple[object, str, Any]:
    sliced = weights.slice_width

    def shifted(whole: weights.ExpertWeights, start: int, stop: int) -> weights.ExpertWeights:
        found = sliced(whole, start, stop)
        return found.with_tensors(w2_eHi=torch.roll(found.w2_eHi.view(torch.uint8), 1, -1).view(found.w2_eHi.dtype))

    return weights, "slice_width", shifted


def another_seed() -> tuple[object, str, Any]:
    expert = random_weights.random_expert

    def drawn(spec: MoESpec, number: int, seed: int, *arguments: Any, **options: Any) -> weights.ExpertWeights:
        return expert(spec, number, seed + (number == SPEC.num_experts), *arguments, **options)

    import moe_dist.bench.loading

    return moe_dist.bench.loading, "random_expert", drawn


def weights_on_outputs() -> tuple[object, str, Any]:
    """As if the oracle, and the exact layer with it, knew nothing of weights on inputs."""
    import moe_dist.bench.check

    partial = moe_dist.bench.check.oracle_partial

    def other(x: Any, routing: Any, shard: Any, spec: MoESpec, *others: Any) -> torch.Tensor:
        return partial(x, routing, shard, spec.with_changes(weights_on_input=False), *others)

    return moe_dist.bench.check, "oracle_partial", other


def tokens_as_they_came() -> tuple[object, str, Any]:
    """As if the layer left the scaling of tokens out."""
    import moe_dist.engine.layer

    return moe_dist.engine.layer, "_on_input", lambda step, x, routing: (x, routing)


Fault = Callable[[], tuple[object, str, Any]]


def measured(comm: Comm, chosen: Case, fault: Fault | None) -> Any:
    if fault is None:
        return measure(RankContext(comm, "torchrun"), chosen, chosen.plan(MACHINE))
    owner, name, replacement = fault()
    before = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        return measure(RankContext(comm, "torchrun"), chosen, chosen.plan(MACHINE))
    finally:
        setattr(owner, name, before)


def row_of(pool: Pool, chosen: Case, fault: Fault | None = None) -> Row:
    results = pool.run(chosen.parallel.world, measured, chosen, fault)
    return make_row(chosen, chosen.plan(MACHINE), merge(results), "torchrun")


LLAMA4 = SPEC.with_changes(top_k=1, weights_on_input=True, shared_experts="replicated", **SHARED)
RANDOM = [
    case(SPEC, tp=2),
    case(SPEC, exchange="local"),
    case(SPEC.with_changes(quant="none", dtype="fp32"), tp=2),
    case(SPEC.with_changes(quant="fp8_channel", activation="relu2"), ep=2),
    case(SPEC.with_changes(quant="fp8_tensor_static", activation="geglu"), tp=2),
    case(SPEC.with_changes(activation="swigluoai", expert_bias=True), tp=2),
    case(SPEC.with_changes(shared_experts="tp", **SHARED), ep=2),
    case(SPEC.with_changes(shared_experts="replicated", shared_gate=True, **SHARED), tp=2),
    case(SPEC, ep=2, replicas={0: [1], 7: [0]}),
    case(LLAMA4, tp=2),
]


@pytest.mark.parametrize("chosen", RANDOM, ids=lambda chosen: f"{chosen.model.quant_label} {chosen.label}")
def test_random_weights_agree_with_whole_experts(pool: Pool, chosen: Case) -> None:
    row = row_of(pool, chosen)
    assert row.source == "random:5"
    assert 0 < row.err_whole < WHOLE_TOLERANCE / 10
    assert row.ok is True


@pytest.mark.parametrize(
    ("options", "shared", "parallel"),
    [
        ({}, "none", {"tp": 2}),
        ({"quant": "none"}, "none", {"ep": 2}),
        ({"model_type": "deepseek_v3"}, "tp", {"tp": 2}),
        ({"model_type": "qwen3_next"}, "replicated", {"ep": 2}),
        ({"model_type": "gpt_oss", "quant": "none"}, "none", {"tp": 2}),
        ({"model_type": "llama4", "quant": "none", "top_k": 1}, "replicated", {"tp": 2}),
        ({"fused": True}, "none", {"tp": 2}),
        ({"fused": True, "quant": "none"}, "none", {"ep": 2}),
    ],
    ids=str,
)
def test_checkpoints_agree_with_whole_experts(
    pool: Pool, tmp_path: Path, options: Any, shared: str, parallel: Any
) -> None:
    row = row_of(pool, of(checkpoint(tmp_path / "model", **options), shared, **parallel))
    assert row.source == "checkpoint:model layer 1"
    assert 0 < row.err_whole < WHOLE_TOLERANCE / 10
    assert row.ok is True


@pytest.mark.parametrize(
    ("fault", "fused"),
    [
        (first_slice_everywhere, False),
        (gate_for_up, False),
        (next_expert, False),
        (scales_of_another_block, False),
        (first_slice_everywhere, True),
        (gate_for_up, True),
    ],
)
def test_a_checkpoint_loaded_wrong_does_not_pass(pool: Pool, tmp_path: Path, fault: Fault, fused: bool) -> None:
    row = row_of(pool, of(checkpoint(tmp_path / "model", fused=fused), tp=2), fault)
    assert row.err_oracle < 1e-2  # the oracle has the same wrong weights
    assert row.err_whole > 0.1
    assert row.ok is False


@pytest.mark.parametrize("fault", [first_slice_everywhere, odd_before_even, next_expert, bias_once_for_each_slice])
def test_experts_with_biases_loaded_wrong_do_not_pass(pool: Pool, tmp_path: Path, fault: Fault) -> None:
    row = row_of(pool, of(checkpoint(tmp_path / "model", model_type="gpt_oss", quant="none"), tp=2), fault)
    assert row.err_oracle < 1e-2
    assert row.err_whole > 0.05
    assert row.ok is False


@pytest.mark.parametrize("shared", ["tp", "replicated"])
@pytest.mark.parametrize("fault", [first_slice_everywhere, gate_for_up])
def test_the_shared_expert_is_compared_too(pool: Pool, tmp_path: Path, fault: Fault, shared: str) -> None:
    row = row_of(pool, of(checkpoint(tmp_path / "model", model_type="deepseek_v3"), shared, ep=2), fault)
    assert row.ok is (shared == "replicated" and fault is first_slice_everywhere)  # whole there: nothing to move
    if not row.ok:
        assert row.err_whole > 10 * WHOLE_TOLERANCE


@pytest.mark.parametrize(
    ("fault", "chosen"),
    [
        (one_column_off, case(SPEC, tp=2)),
        (another_seed, case(SPEC.with_changes(shared_experts="tp", **SHARED), ep=2)),
    ],
    ids=["one_column_off", "another_seed"],
)
def test_random_shards_made_wrong_do_not_pass(pool: Pool, fault: Fault, chosen: Case) -> None:
    row = row_of(pool, chosen, fault)
    assert row.err_oracle < 1e-2
    assert row.err_whole > 10 * WHOLE_TOLERANCE
    assert row.ok is False


def test_a_scaling_of_tokens_that_is_left_out_does_not_pass(pool: Pool) -> None:
    of_oracle, of_layer = (
        row_of(pool, case(LLAMA4, ep=2), fault) for fault in (weights_on_outputs, tokens_as_they_came)
    )
    assert of_oracle.err_whole > 0.05
    assert of_layer.err_whole < WHOLE_TOLERANCE / 10
    assert of_layer.err_oracle > 0.05
    assert (of_oracle.ok, of_layer.ok) == (False, False)


def test_every_copy_of_every_expert_is_compared_once() -> None:
    ids_TK, groups_TK = torch.zeros(1000, 4, dtype=torch.int32), torch.zeros(1000, 4, dtype=torch.int64)
    groups_TK[17, 2] = 5  # another copy of expert 0
    ids_TK[801, 0], ids_TK[900], ids_TK[901] = 3, -1, 7
    groups_TK[900], groups_TK[901] = -1, -1  # no expert, and one that nobody serves
    routing = Routing(ids_TK, torch.full((1000, 4), 0.25))
    chosen = case(SPEC, ep=2).with_changes(workload=WorkloadSpec(tokens=1000, seed=3))
    tokens, alone = compared_tokens(chosen, routing, groups_TK, set())
    assert {17, 801, 901} <= set(tokens.tolist())
    assert 7 <= len(tokens) <= 8
    assert alone == {}
    assert torch.equal(tokens, compared_tokens(chosen, routing, groups_TK, set())[0])
    assert len(compared_tokens(chosen, routing, groups_TK, {(0, 0), (0, 5), (3, 0), (7, -1)})[0]) == 4


def test_a_weight_that_is_a_trifle_does_not_count() -> None:
    ids_TK = torch.zeros(1000, 4, dtype=torch.int32)
    weights_TK = torch.full((1000, 4), 0.25)
    ids_TK[801, 0], weights_TK[801, 0] = 3, 0.01  # seen here only, and hardly
    ids_TK[:, 1], weights_TK[:, 1] = 5, 0.0  # used everywhere for nothing
    ids_TK[700, 2], weights_TK[700, 2] = 6, 0.06  # a quarter of an even share of 0.56 is 0.035
    groups_TK = torch.zeros_like(ids_TK).long()
    chosen = case(SPEC, ep=2).with_changes(workload=WorkloadSpec(tokens=1000, seed=3))
    tokens, alone = compared_tokens(chosen, Routing(ids_TK, weights_TK), groups_TK, set())
    assert 700 in tokens.tolist()
    assert set(alone) == {(3, 0), (5, 0)}
    assert alone[3, 0] == 801


def zero_weights(comm: Comm, chosen: Case, spoilt: int | None) -> Any:
    """Expert 3 is in use with the weight 0 only; `spoilt`: its rank has another one in its place."""
    context = RankContext(comm, "torchrun")
    make = random_weights.random_expert

    def drawn(spec: MoESpec, number: int, *arguments: Any, **options: Any) -> weights.ExpertWeights:
        return make(spec, 5 if number == spoilt else number, *arguments, **options)

    import moe_dist.bench.draws
    import moe_dist.bench.loading

    def routed(*arguments: Any, **options: Any) -> Routing:
        found = synthetic_routing(*arguments, **options)
        found.weights_TK[found.ids_TK == 3] = 0
        return found

    moe_dist.bench.loading.random_expert, moe_dist.bench.draws.synthetic_routing = drawn, routed
    try:
        return measure(context, chosen, chosen.plan(MACHINE))
    finally:
        moe_dist.bench.loading.random_expert, moe_dist.bench.draws.synthetic_routing = make, synthetic_routing


@pytest.mark.parametrize("spoilt", [None, 3])
def test_an_expert_that_is_used_with_weight_0_only_is_compared_alone(pool: Pool, spoilt: int | None) -> None:
    chosen = case(SPEC, ep=2).with_changes(workload=WorkloadSpec(tokens=64, seed=3))
    row = make_row(chosen, chosen.plan(MACHINE), merge(pool.run(2, zero_weights, chosen, spoilt)), "torchrun")
    assert row.ok is (spoilt is None)
    assert row.err_oracle < 1e-2


def changed_between(comm: Comm, first: Case, second: Case) -> Any:
    """Rank 0 gets another expert in place of one that was compared."""
    context = RankContext(comm, "torchrun")
    measure(context, first, first.plan(MACHINE), Turn(0, 1, 0))
    ((shard, _, _),) = context.memo["weights"].values()
    if comm.rank == 0:
        codes = shard.w2_eHi.view(torch.uint8)
        codes[1] = codes[2].clone()
    return measure(context, second, second.plan(MACHINE), Turn(0, 1, 0))


def test_experts_that_changed_since_are_compared_again(pool: Pool) -> None:
    spec = SPEC.with_changes(num_experts=64)
    for seed in range(3):
        one, two = (case(spec, ep=2).with_changes(workload=WorkloadSpec(tokens=256, seed=s)) for s in (100, seed))
        row = make_row(two, two.plan(MACHINE), merge(pool.run(2, changed_between, one, two)), "torchrun")
        assert row.err_oracle < 1e-2
        assert row.ok is False


def routed_wrong(comm: Comm, chosen: Case, how: str) -> Any:
    import moe_dist.bench.loading as loading

    right = loading.load_router

    def wrong(source: Any, layer: int, device: Any) -> Any:
        found = right(source, layer, device)
        if how == "another layer's":
            return right(source, layer + 1, device)
        if how == "one row" or (how == "of one rank" and comm.rank == 1):
            found.gate_EH[3] = found.gate_EH[4]
        if how == "bias" and found.bias_E is not None:
            return replace(found, bias_E=found.bias_E.flip(0))
        if how == "bias" and found.logit_bias_E is not None:
            return replace(found, logit_bias_E=found.logit_bias_E.flip(0))
        return found

    loading.load_router = wrong
    try:
        return measure(RankContext(comm, "torchrun"), chosen, chosen.plan(MACHINE))
    finally:
        loading.load_router = right


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("how", ["right", "another layer's", "one row", "bias"])
def test_a_checkpoint_s_router_is_compared(pool: Pool, tmp_path: Path, model_type: str, how: str) -> None:
    quant = "none" if model_type == "gpt_oss" else "fp8_block"
    directory = checkpoint(tmp_path / "model", model_type=model_type, layers=3, quant=quant)
    workload = WorkloadSpec(tokens=64, seed=3, skew="router")
    chosen = of(directory, ep=2).with_changes(workload=workload)
    row = make_row(chosen, chosen.plan(MACHINE), merge(pool.run(2, routed_wrong, chosen, how)), "torchrun")
    right = how == "right" or (how == "bias" and model_type == "qwen3_moe")  # which has none
    assert row.ok is right
    assert (row.err_whole < 1e-5) is right


def test_ranks_that_route_each_in_its_own_way_are_named(pool: Pool, tmp_path: Path) -> None:
    workload = WorkloadSpec(tokens=64, seed=3, skew="router")
    chosen = of(checkpoint(tmp_path / "model", layers=3), ep=2).with_changes(workload=workload)
    with pytest.raises(RankFailure, match=r"rank 1 failed in inputs .*: it has other ids than rank 0"):
        pool.run(2, routed_wrong, chosen, "of one rank")
