"""What a plan says of sizes, and that every rank's own slice is asked about."""

from __future__ import annotations

import pytest

from moe_dist.backends import BACKENDS, Problem
from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.engine.plan import shared_placement
from moe_dist.engine.planning import make_plan
from moe_dist.errors import UnsupportedError
from moe_dist.exchange import EXCHANGES
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import QUANT_KINDS, MoESpec, ParallelSpec
from moe_dist.model.weights import shard
from moe_dist.step import Support, bytes_of
from moe_dist.workloads.random_weights import random_weights

CPU = Machine("cpu", 1, "a test's CPU")


def plan(exchange: str = "ag_rs", layout: str = "sharded", spec: dict | None = None, **grid):
    sizes = {"hidden": 160, "intermediate": 320, "num_experts": 10, "top_k": 4} | (spec or {})
    return make_plan(
        MoESpec(**sizes), ParallelSpec(**grid), exchange=exchange, backend="torch", token_layout=layout, machine=CPU
    )


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("quant", QUANT_KINDS)
def test_weights_weigh_what_they_do(quant, activation):
    made = plan(spec={"quant": quant, "activation": activation}, tp=3, ep=4)
    whole = random_weights(made.spec, seed=0)
    for rank in range(12):
        assert made.weight_bytes(rank) == shard(whole, made.placement, rank).nbytes(), rank


@pytest.mark.parametrize(
    ("layout", "grid", "expected"),
    [
        ("sharded", {"ep": 4}, 4 * 5 * 3),  # 3 experts on a rank at most, of top-4
        ("replicated", {"ep": 4}, 5 * 3),
        ("sharded", {"tp": 2}, 2 * 5 * 4),
        ("sharded", {"tp": 2, "ep": 2}, 4 * 5 * 4),
        ("sharded", {"ep": 10}, 10 * 5 * 1),
    ],
)
def test_most_rows(layout, grid, expected):
    assert plan(layout=layout, **grid).most_rows(5) == expected


@pytest.mark.parametrize(("layout", "payload"), [("sharded", "fp8"), ("replicated", "none")])
def test_nvlink_serves_both_layouts_without_a_change(layout, payload):
    """By hand, of replicated tokens: 7 tokens on 4 ranks are shares of 2; a rank's window has a header, four shares of
    sums and its own of totals, and it sends 5 sums and its 2 totals to three others."""
    spec = MoESpec(hidden=256, intermediate=512, num_experts=8, top_k=2)
    given = {"exchange": "nvlink", "backend": "triton", "machine": Machine.named("h200x4"), "graph": True}
    made = make_plan(spec, ParallelSpec(tp=4), token_layout=layout, **given)
    assert made.exchange == "nvlink"
    assert made.payload == payload
    assert not made.converts_layout
    assert made.exchange_class.token_layout == layout
    if layout == "replicated":
        assert 5 * 2 * 512 < made.window_bytes(7) < 5 * 2 * 512 + 4096
        assert made.wire_bytes(7) == (5 + 2 * 3) * 512


def test_scratch_of_a_backend_that_allocates_by_itself():
    """Of 2 ranks' 5 tokens each: GEMM1's 640, GEMM2's 320 and 160 columns of 40 pairs in bf16, beside what crosses."""
    made = plan(ep=2)
    crossing = bytes_of(EXCHANGES.get("ag_rs").scratch(made.spec, made.placement, made.payload, made.out_dtype, 5))
    assert made.scratch_bytes(5) == 40 * 2 * (640 + 320 + 160) + crossing
    assert crossing > 10 * (160 + 2 * 4 + 4 * 8 + 160 * 2)  # codes, scales, ids and weights, and sums of ten rows


@pytest.mark.parametrize("name", ["triton", "cutlass"])
@pytest.mark.parametrize("payload", ["bf16", "fp8"])
def test_scratch_of_our_own_backends_is_what_a_forward_takes(name, payload):
    """Without a GPU: nothing is launched. Of 1,000 rows' pairs GEMM1's output in FP8 with scales and GEMM2's in bf16,
    and less than a tenth as much for the lists."""
    spec = MoESpec(hidden=1024, intermediate=512, num_experts=16, top_k=4)
    problem = Problem(spec, 512, 8, "cuda", (9, 0), payload, "a test's GPU")
    found = BACKENDS.get(name).scratch_bytes(problem, 1000)
    least = 4000 * (512 + 4 * 4 + 2 * 1024) + (0 if payload == "fp8" else 1000 * (1024 + 4 * 8))
    assert least < found < 1.1 * least
    assert BACKENDS.get(name).scratch_bytes(problem, 2000) > 1.9 * found


@pytest.mark.parametrize(
    ("exchange", "layout", "grid", "expected"),
    [
        ("all_reduce", "sharded", {"ep": 2}, True),
        ("all_reduce", "replicated", {"ep": 2}, False),
        ("ag_rs", "sharded", {"ep": 2}, False),
        ("ag_rs", "replicated", {"ep": 2}, True),
        ("all_to_all", "replicated", {"tp": 2}, True),
        ("local", "sharded", {}, False),
    ],
)
def test_who_changes_the_token_layout(exchange, layout, grid, expected):
    assert plan(exchange, layout, **grid).converts_layout is expected


@pytest.mark.parametrize(("width", "grid"), [(64, {"tp": 3}), (128, {"tp": 3})])
def test_every_ranks_slice_is_asked_about(monkeypatch, width, grid):
    """320 columns over three ranks are 128, 128 and 64."""
    answer = classmethod(lambda cls, problem: Support(problem.width != width, f"not {problem.width}"))
    monkeypatch.setattr(TorchBackend, "supports", answer)
    with pytest.raises(UnsupportedError, match=f"not {width}"):
        plan(**grid)


@pytest.mark.parametrize("quant", ["none", "fp8_block"])
@pytest.mark.parametrize(("kind", "whole"), [("tp", False), ("replicated", True)])
def test_a_shared_expert_weighs_too(kind, whole, quant):
    shared = {"shared_intermediate": 384, "shared_experts": kind, "quant": quant}
    made, without = plan(spec=shared, tp=2), plan(spec={"quant": quant}, tp=2)
    of_shared = random_weights(made.spec.shared_spec(), seed=0)
    for rank in range(2):
        part = of_shared if whole else shard(of_shared, shared_placement(made.spec, made.parallel), rank)
        assert made.weight_bytes(rank) - without.weight_bytes(rank) == part.nbytes() > 0


@pytest.mark.parametrize(
    ("exchange", "layout", "expected"),
    [  # of 10 tokens on 4 ranks, at most 3 each: a bf16 row of 64 with 2 ids and weights has 144 bytes, a result 128
        ("all_reduce", "replicated", 2 * 10 * 128 * 3 // 4),
        ("all_reduce", "sharded", 3 * 144 * 3 + 2 * 12 * 128 * 3 // 4),
        ("ag_rs", "sharded", 3 * (144 + 128) * 3),
        ("ag_rs", "replicated", 3 * (144 + 128) * 3 + 3 * 128 * 3),
    ],
)
def test_a_change_of_layout_sends_too(exchange, layout, expected):
    """As `test_bytes_sent_are_what_the_formulas_say` finds them to be sent."""
    sizes = {"hidden": 64, "intermediate": 64, "num_experts": 8, "top_k": 2, "quant": "none"}
    assert plan(exchange, layout, spec=sizes, ep=4).wire_bytes(10) == expected


def test_what_all_to_all_sends_to_change_the_layout_is_on_top():
    sharded, replicated = plan("all_to_all", "sharded", ep=4), plan("all_to_all", "replicated", ep=4)
    assert replicated.wire_bytes(10) - sharded.wire_bytes(10) == 3 * 160 * 2 * 3
