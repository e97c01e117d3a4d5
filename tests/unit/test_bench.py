"""Rows and what is said about them: figures merged over ranks, labels, tolerances, tables, verdicts, files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from io import StringIO
from itertools import count
from pathlib import Path

import pytest
from rich.console import Console

from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.bench import results
from moe_dist.bench.answer import answer_table, answers, family, last_line
from moe_dist.bench.case import Case, Experiment, parse_placement
from moe_dist.bench.findings import Ran, RankResult, merge
from moe_dist.bench.output import open_output
from moe_dist.bench.results import Outcome, commit, make_row, provenance, quantile, results_document
from moe_dist.bench.row import Refused, Row
from moe_dist.bench.runner import plan_cases
from moe_dist.bench.table import groups, refused_table, tables
from moe_dist.bench.tolerance import EXACT_TOLERANCE, margin
from moe_dist.commands.outcome import balance_line, print_outcome
from moe_dist.commands.terminal import Terminal
from moe_dist.errors import ConfigError, ResourceError
from moe_dist.machine.machine import Machine
from moe_dist.model.placement import Placement
from moe_dist.model.spec import MoESpec, ParallelSpec, WorkloadSpec
from moe_dist.oracle.numerics import Numerics
from moe_dist.oracle.reference import oracle_layer, relative_error
from moe_dist.step.stages import Stages, totals_us
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream
from moe_dist.workloads.token_splits import token_bounds

CPU = Machine("cpu", 1, "a test's CPU")
H200 = Machine("cuda", 4, "NVIDIA H200", (9, 0), 141 << 30)
SPEC = MoESpec(name="small", hidden=256, intermediate=384, num_experts=8, top_k=2)
STAGES = {
    "dispatch": 10.04, "convert": 0.0, "quantize": 1.0, "gemm1": 5.0, "activation": 2.0, "gemm2": 3.0, "combine": 7.0,
}  # fmt: skip

# The names of the design's results file, in its order.
DESIGNED = [
    "model", "hidden", "intermediate", "num_experts", "top_k", "quant", "tp", "ep", "world", "layer", "exchange",
    "backend", "token_layout", "global_tokens", "tokens_per_rank", "skew", "seed", "iters", "graph", "runtime",
    "payload_dtype", "combine_dtype", "p50_us", "p99_us", "chained_us", "floor_us", "err_oracle", "err_exact",
    "active_experts", "imbalance", "stages_us", "tflops", "hbm_gbps", "link_gbps", "chosen_by",
]  # fmt: skip


def case(**changes) -> Case:
    parallel = ParallelSpec(**changes.pop("parallel", {"ep": 2}))
    workload = WorkloadSpec(**{"tokens": 33, **changes.pop("workload", {})})
    defaults = {"model": SPEC, "exchange": "ag_rs", "backend": "torch"}
    return Case(parallel=parallel, workload=workload, **(defaults | changes))


def rank_result(**changes) -> RankResult:
    defaults = {
        "rounds_us": [[100.0], [300.0], [200.0]], "stages_us": STAGES, "unstaged_us": 6.04,
        "bytes_sent": 1000, "rows": 40,
        "active_experts": 4, "err_oracle": 1e-3, "err_exact": 2e-2, "err_whole": 1e-6, "err_token": 0.05,
        "max_memory": None,
        "ran": Ran("EP2", "sharded", "ag_rs", "torch", "token", "fp8", "bf16", False, None),
    }  # fmt: skip
    return RankResult(**(defaults | changes))


def row_of(chosen: Case, *ranks: RankResult, machine: Machine = CPU) -> Row:
    """Of ranks that ran what was planned."""
    plan = chosen.plan(machine)
    return make_row(chosen, plan, merge([replace(rank, ran=ran_by(plan)) for rank in ranks]), "ray")


def ran_by(plan) -> Ran:
    names = plan.exchange, plan.backend, plan.form, plan.payload, plan.combine_dtype
    return Ran(plan.parallel.label, plan.token_layout, *names, plan.graph, None)


def row(tp: int = 1, ep: int = 1, p50: float | None = 100.0, **changes) -> Row:
    """A row with a value for every key."""
    defaults = {
        "model": "m", "source": "random:0", "hidden": 8, "intermediate": 8, "num_experts": 4, "top_k": 2,
        "quant": "fp8_block", "activation": "swiglu", "shared_experts": "none", "tp": tp, "ep": ep, "world": tp * ep,
        "placement": ParallelSpec(tp=tp, ep=ep).label, "exchange": "ag_rs", "backend": "torch", "form": "token",
        "graph": False, "splits": None, "payload_dtype": "fp8", "combine_dtype": "bf16", "token_layout": "sharded",
        "global_tokens": 64, "tokens_per_rank": 32, "token_split": "even", "skew": "uniform", "seed": 0,
        "layer": "whole", "iters": 3, "routing_p50_us": (), "balanced_floor_us": None,
        "runtime": "ray", "key": "k", "run": 0, "start": 0, "config": None, "p50_us": p50,
        "chained_us": p50, "chained_steps": 32, "clock_us": 0.5, "per_layer_us": p50, "round_p50_us": (),
        "scatter_us": 1.0, "p99_us": None, "floor_us": None, "stages_us": STAGES, "unstaged_us": 6.0, "imbalance": 1.25,
        "active_experts": 4, "rows_per_rank": (64, 64), "pairs": 128, "bytes_sent": 2048, "max_memory": None,
        "err_oracle": 1e-3, "err_exact": 2e-2, "err_whole": 1e-6, "err_token": 0.1, "err_repeat": 0.0, "err_again": 0.0,
        "not_finite": (), "tflops": None, "hbm_gbps": None, "link_gbps": None, "chosen_by": "name",
        "why": None, "trace_short": None, "peer": None, "ok": True,
    }  # fmt: skip
    return Row(**(defaults | changes))


def printed(*things: object, width: int = 250) -> str:
    out = StringIO()
    console = Console(file=out, width=width)
    for thing in things:
        console.print(thing)
    return out.getvalue()


class TestQuantile:
    @pytest.mark.parametrize(
        ("values", "q", "expected"),
        [
            ([], 0.5, None),
            ([7.0], 0.5, 7.0),
            ([7.0], 0.99, 7.0),
            ([1.0, 2.0], 0.5, 1.0),
            ([1.0, 2.0, 3.0], 0.5, 2.0),
            ([1.0, 2.0, 3.0, 4.0], 0.5, 2.0),
            ([float(n) for n in range(1, 101)], 0.99, 99.0),  # one of a hundred may be slower
            ([float(n) for n in range(1, 201)], 0.99, 198.0),
            ([float(n) for n in range(1, 102)], 0.99, 100.0),
            ([1.0, 2.0], 0.0, 1.0),
            ([1.0, 2.0], 1.0, 2.0),
        ],
    )
    def test_is_the_least_value_that_so_many_do_not_exceed(self, values, q, expected):
        assert quantile(values, q) == expected


class TestStages:
    @pytest.fixture
    def clock(self, monkeypatch):
        """Every look at it is a millisecond later."""
        ticks = count(1)
        monkeypatch.setattr("moe_dist.step.stages.time.perf_counter", lambda: next(ticks) / 1e3)

    def test_an_inner_stage_is_not_counted_twice(self, clock):
        stages = Stages(on=True)
        with stages("dispatch"), stages("quantize"):
            pass
        with stages("gemm1"):
            pass
        found = stages.totals_us()
        assert {name: round(us) for name, us in found.items() if us} == {
            "dispatch": 2000, "quantize": 1000, "gemm1": 1000,
        }  # fmt: skip
        assert set(stages.totals_us().values()) == {0.0}

    def test_what_was_taken_can_be_read_again(self, clock):
        stages = Stages(on=True)
        with stages("combine"):
            pass
        marks = stages.take()
        assert stages.take() == []
        assert totals_us(marks) == totals_us(marks)
        assert round(totals_us(marks)["combine"]) == 1000

    def test_nothing_is_marked_while_it_is_off(self):
        stages = Stages()
        with stages("combine"):
            pass
        assert stages.take() == []


class TestMakeRow:
    def test_holds_every_name_of_the_design(self):
        made = row_of(case(), rank_result(), rank_result())
        assert [name for name in DESIGNED if name not in made.model_dump()] == []

    def test_an_iteration_is_as_long_as_its_slowest_rank(self):
        slow_start = rank_result(rounds_us=[[500.0, 10.0, 10.0]])
        slow_end = rank_result(rounds_us=[[10.0, 10.0, 900.0]])
        made = row_of(case(), slow_start, slow_end)
        assert made.p50_us == 500.0  # of 500, 10 and 900: no rank alone has this median
        assert made.iters == 3

    def test_p99_needs_a_hundred_iterations(self):
        times = [float(n) for n in range(1, 101)]
        for given, expected in ((times[:99], None), (times, 99.0)):
            ranks = [rank_result(rounds_us=[given[:40], given[40:]])] * 2
            assert row_of(case(), *ranks).p99_us == expected

    def test_rounds_say_how_far_the_median_scatters(self):
        """Of medians of 100, 120 and 140 the standard deviation is 20, that of their middle 20 / sqrt(3)."""
        fast = rank_result(rounds_us=[[100.0, 1.0, 120.0], [120.0] * 3, [140.0] * 3])
        slow = rank_result(rounds_us=[[1.0, 100.0, 1.0], [1.0] * 3, [1.0] * 3])
        made = row_of(case(), fast, slow)
        assert made.round_p50_us == (100.0, 120.0, 140.0)
        assert made.scatter_us == pytest.approx(20.0 / 3**0.5)
        assert made.p50_us == 120.0
        assert made.iters == 9
        two = row_of(case(), *[rank_result(rounds_us=[[100.0], [120.0]])] * 2)
        assert two.scatter_us is None  # two say too little

    @pytest.mark.parametrize(
        ("repeat", "checked", "expected"),
        [(None, True, True), (0.0, True, True), (1e-3, True, True), (1.1e-3, True, False), (math.inf, True, False),
         (0.0, False, None), (0.5, False, False)],
    )  # fmt: skip
    def test_an_output_that_changes_while_it_is_timed_is_wrong(self, repeat, checked, expected):
        errors = {} if checked else {"err_oracle": None, "err_exact": None}
        made = row_of(case(), *[rank_result(err_repeat=repeat, **errors)] * 2)
        assert made.ok is expected
        assert (made.err_repeat, made.not_finite) == ((None, ("err_repeat",)) if repeat == math.inf else (repeat, ()))

    @pytest.mark.parametrize(("again", "expected"), [(None, True), (0.2, True), (0.21, False), (math.inf, False)])
    def test_an_output_that_does_not_follow_its_inputs_is_wrong(self, again, expected):
        made = row_of(case(), *[rank_result(err_again=again)] * 2)
        finite = again is None or math.isfinite(again)
        assert (made.ok, made.err_again) == (expected, again if finite else None)
        assert made.not_finite == (() if finite else ("err_again",))

    @pytest.mark.parametrize(
        ("rounds", "most"), [({}, 0.1), ({"reciprocal": True}, 0.15), ({"bf16_maximum": True}, 0.15)]
    )
    def test_the_tolerance_of_a_token_follows_that_of_all(self, rounds, most, monkeypatch):
        monkeypatch.setattr(TorchBackend, "numerics_of", classmethod(lambda cls, spec: Numerics(**rounds)))
        for error, ok in ((most, True), (1.01 * most, False)):
            assert row_of(case(), *[rank_result(err_token=error)] * 2).ok is ok

    def test_without_rounding_a_token_is_exact(self):
        chosen = case(model=SPEC.with_changes(quant="none", dtype="fp32"), combine_dtype="fp32")
        for error, ok in ((9e-4, True), (2e-3, False)):
            errors = {"err_oracle": 0.0, "err_exact": 0.0, "err_token": error}
            assert row_of(chosen, *[rank_result(**errors)] * 2).ok is ok

    def test_a_backend_of_other_bits_may_repeat_itself_as_well_as_it_computes(self, monkeypatch):
        monkeypatch.setattr(TorchBackend, "deterministic", False)
        for repeat, ok in ((0.2, True), (0.21, False)):
            assert row_of(case(), *[rank_result(err_repeat=repeat)] * 2).ok is ok

    def test_configs_are_named_by_what_ran(self):
        assert row_of(case(), rank_result(), rank_result()).config is None
        tuned, other = rank_result(config=("tuned",)), rank_result(config=("nearest:128", "tuned"))
        assert row_of(case(), tuned, tuned).config == "tuned"
        assert row_of(case(), tuned, other).config == "tuned, nearest:128"

    def test_figures_come_from_the_busiest_rank(self):
        idle = rank_result(
            rows=10, active_experts=1, bytes_sent=5, stages_us=dict.fromkeys(STAGES, 0.0), unstaged_us=99.0
        )
        made = row_of(case(), idle, rank_result(rows=30, active_experts=3, bytes_sent=50))
        assert made.active_experts == 3
        assert made.imbalance == 1.5
        assert made.rows_per_rank == (10, 30)
        assert made.bytes_sent == 50
        assert (made.stages_us["dispatch"], made.unstaged_us) == (10.0, 6.0)  # rounded to a tenth
        flops = 2 * 30 * SPEC.hidden * 3 * SPEC.intermediate
        assert made.tflops == pytest.approx(flops / 200.0 / 1e6)
        assert made.hbm_gbps == pytest.approx(3 * SPEC.hidden * 3 * SPEC.intermediate / 200.0 / 1e3)
        assert made.link_gbps == pytest.approx(50 / 200.0 / 1e3)

    @pytest.mark.parametrize(("ranks", "expected"), [((None, None), None), ((5, 7), 7), ((7, 5), 7)])
    def test_memory_is_that_of_the_rank_with_most(self, ranks, expected):
        assert row_of(case(), *(rank_result(max_memory=most) for most in ranks)).max_memory == expected

    def test_labels_are_those_of_what_ran(self):
        made = row_of(case(parallel={"tp": 2}, exchange="all_reduce"), rank_result(), rank_result())
        labels = {
            name: getattr(made, name) for name in ("tp", "ep", "world", "placement", "exchange", "backend", "quant")
        }
        assert labels == {
            "tp": 2, "ep": 1, "world": 2, "placement": "TP2", "exchange": "all_reduce", "backend": "torch",
            "quant": "fp8_block",
        }  # fmt: skip
        assert made.model_dump(include=set(labels)) == labels
        assert (made.payload_dtype, made.combine_dtype, made.layer) == ("fp8", "bf16", "whole")

    @pytest.mark.parametrize(("layout", "per_rank"), [("sharded", 17), ("replicated", 33)])
    def test_tokens_per_rank_follow_the_layout(self, layout, per_rank):
        exchange = "ag_rs" if layout == "sharded" else "all_reduce"
        made = row_of(case(exchange=exchange, workload={"token_layout": layout}), rank_result(), rank_result())
        assert (made.global_tokens, made.tokens_per_rank, made.token_layout) == (33, per_rank, layout)

    def test_without_iterations_there_are_no_times_and_no_rates(self):
        made = row_of(case(iters=0), *[rank_result(rounds_us=[], stages_us={}, unstaged_us=None)] * 2)
        for name in ("p50_us", "p99_us", "scatter_us", "unstaged_us", "tflops", "hbm_gbps", "link_gbps"):
            assert getattr(made, name) is None
        assert made.ok is True

    def test_a_floor_is_given_only_where_it_was_measured(self):
        ranks = rank_result(rows=40, active_experts=4), rank_result(rows=20, active_experts=2)
        assert row_of(case(), *ranks).floor_us is None
        weights = 4 * SPEC.hidden * 3 * SPEC.intermediate
        assert row_of(case(), *ranks, machine=H200).floor_us == pytest.approx(1e6 * weights / 4.29e12)

    def test_perfect_balance_is_the_mean_of_the_groups(self):
        """Of 60 pairs on 6 experts; the busiest of two groups has 40 on 4, and four ranks two slices of each expert."""
        ranks = rank_result(rows=40, active_experts=4), rank_result(rows=20, active_experts=2)
        made = row_of(case(), *ranks, machine=H200)
        assert made.balanced_floor_us == pytest.approx(0.75 * made.floor_us)
        assert row_of(case(), *ranks).balanced_floor_us is None
        even = row_of(case(), ranks[0], ranks[0], machine=H200)
        assert even.balanced_floor_us == pytest.approx(even.floor_us)
        grid = case(parallel={"tp": 2, "ep": 2})
        halves = row_of(grid, ranks[0], ranks[0], ranks[1], ranks[1], machine=H200)
        assert halves.balanced_floor_us == pytest.approx(0.75 * halves.floor_us)
        tp = row_of(case(parallel={"tp": 2}), ranks[0], ranks[0], machine=H200)
        assert tp.balanced_floor_us == tp.floor_us  # nothing to balance

    def test_balance_counts_arithmetic_and_traffic_each(self):
        """One group has the pairs, the other the experts."""
        many, few = 2_000_000, 10
        ranks = rank_result(rows=many, active_experts=1), rank_result(rows=few, active_experts=8)
        made = row_of(case(), *ranks, machine=H200)
        flops = 2.0 * SPEC.hidden * 3 * SPEC.intermediate
        assert made.floor_us == pytest.approx(1e6 * many * flops / 1422e12)
        assert made.balanced_floor_us == pytest.approx(1e6 * (many + few) / 2 * flops / 1422e12)

    @pytest.mark.parametrize(
        ("shared", "layout", "split", "tokens", "width"),
        [
            ("tp", "sharded", "even", (33, 33), 128),
            ("replicated", "sharded", "even", (17, 16), 256),
            ("replicated", "sharded", "one_rank", (33, 0), 256),
            ("replicated", "replicated", "even", (33, 33), 256),
        ],
    )
    def test_the_shared_expert_is_work_too(self, shared, layout, split, tokens, width):
        """A slice of it for all tokens, or the whole of it for those of the rank; none where there are none."""
        model = SPEC.with_changes(shared_experts=shared, shared_intermediate=256)
        exchange = "ag_rs" if layout == "sharded" else "all_reduce"
        workload = {"token_layout": layout, "token_split": split}
        busy, idle = rank_result(rows=40, active_experts=4), rank_result(rows=26, active_experts=2)
        chosen = case(model=model, exchange=exchange, workload=workload)
        if split == "one_rank" and token_bounds(33, 2, split, chosen.workload.seed)[0] == (0, 0):
            tokens = tokens[::-1]
        made = row_of(chosen, busy, idle, machine=H200)
        routed, slice_of_shared = 3 * SPEC.hidden * SPEC.intermediate, 3 * SPEC.hidden * width
        traffic = [of * routed + slice_of_shared * (rows > 0) for of, rows in zip((4, 2), tokens, strict=True)]
        flops = [2 * (pairs * routed + rows * slice_of_shared) for pairs, rows in zip((40, 26), tokens, strict=True)]
        assert made.floor_us == pytest.approx(1e6 * max(traffic) / 4.29e12)
        assert made.balanced_floor_us == pytest.approx(1e6 * sum(traffic) / 2 / 4.29e12)
        assert made.hbm_gbps == pytest.approx(max(traffic) / 200.0 / 1e3)
        assert made.tflops == pytest.approx(max(flops) / 200.0 / 1e6)

    def test_of_several_routings_figures_are_those_in_the_middle(self):
        """Three routings of a layer, whose iterations take them in turn."""
        by_layer = [((10, 1), (40, 4), (20, 2)), ((20, 2), (20, 2), (20, 2))]
        ranks = [
            rank_result(rows=sum(rows for rows, _ in each), by_layer=each, rounds_us=[[1.0, 5.0, 3.0, 2.0], [7.0, 3.0]])
            for each in by_layer
        ]
        made = row_of(case(), *ranks, machine=H200)
        assert made.routing_p50_us == (1.0, 5.0, 3.0)
        assert made.p50_us == 3.0
        assert made.pairs == 130 // 3
        assert made.rows_per_rank == (70, 60)
        assert made.imbalance == pytest.approx(40 / 30)  # of 4/3, 4/3 and 1
        expert = 1e6 * SPEC.hidden * 3 * SPEC.intermediate / 4.29e12
        assert made.floor_us == pytest.approx(2 * expert)  # of 2, 4 and 2
        assert made.balanced_floor_us == pytest.approx(2 * expert)  # of 1.5, 3 and 2
        assert made.hbm_gbps == pytest.approx(2 * SPEC.hidden * 3 * SPEC.intermediate / 3.0 / 1e3)

    @pytest.mark.parametrize(
        ("oracle", "exact", "expected"),
        [
            (None, None, None),
            (1e-2, 5e-2, True),
            (1.01e-2, 1e-2, False),
            (1e-3, 5.1e-2, False),
            (math.nan, 1e-2, False),
            (1e-3, math.inf, False),
        ],
    )
    def test_tolerance(self, oracle, exact, expected):
        made = row_of(case(), *[rank_result(err_oracle=oracle, err_exact=exact)] * 2)
        assert made.ok is expected

    @pytest.mark.parametrize(
        ("quant", "allowed"),
        [("none", 5e-3), ("fp8_block", 5e-2), ("fp8_channel", 5e-2), ("fp8_tensor_static", 6e-2),
         ("fp8_tensor_dynamic", 6e-2)],
    )  # fmt: skip
    def test_every_format_has_the_tolerance_of_the_design(self, quant, allowed):
        chosen = case(model=SPEC.with_changes(quant=quant))
        for error, ok in ((allowed, True), (1.01 * allowed, False)):
            assert row_of(chosen, *[rank_result(err_exact=error)] * 2).ok is ok

    @pytest.mark.parametrize(
        ("pairs", "hidden", "factor"),
        [(2, 16, 6.9), (1, 16, 6.9), (3, 16, 4.31), (8, 256, 1.21), (16, 256, 1.11), (60, 256, 1.0), (4, 4096, 1.27)],
    )
    def test_few_numbers_scatter_about_their_mean(self, pairs, hidden, factor):
        """N is tokens (of two pairs each) times the narrower of hidden and intermediate (384)."""
        found = margin(SPEC.with_changes(hidden=hidden, intermediate=384), pairs)
        assert found == pytest.approx(factor, rel=0.01)

    @pytest.mark.parametrize("quant", ["fp8_block", "fp8_channel", "fp8_tensor_static", "fp8_tensor_dynamic"])
    def test_no_right_layer_is_refused_for_its_size(self, quant):
        """Sizes at which the cost of quantizing scatters most; see `margin`."""
        for seed in range(60):
            size, tokens, top_k = (16, 32, 128, 256)[seed % 4], (1, 2, 5)[seed % 3], 1 + seed % 8
            spec = MoESpec(hidden=size, intermediate=size, num_experts=8, top_k=top_k, quant=quant)
            whole, x = random_weights(spec, seed), Stream("tokens", seed).normal(tokens, size).bfloat16()
            routing, placement = synthetic_routing(spec, tokens, "uniform", seed), Placement.build(spec, ParallelSpec())
            owners = routing.ids_TK.long() * 0
            expected, exact = (
                oracle_layer(x, routing, [whole], spec, placement, [(0, tokens)], owners, numerics)
                for numerics in (Numerics(), None)
            )
            assert relative_error(expected, exact) < margin(spec, tokens * top_k) * EXACT_TOLERANCE[quant]

    def test_a_row_s_pairs_are_all_ranks_together(self):
        factor = margin(SPEC, 12)
        for oracle, exact, ok in ((1e-2, 5e-2, True), (1.01e-2, 0.0, False), (0.0, 5.05e-2, False)):
            few = rank_result(rows=5, err_oracle=factor * oracle, err_exact=factor * exact)
            made = row_of(case(), few, rank_result(rows=7))
            assert (made.pairs, made.ok) == (12, ok)

    def test_a_backend_that_declares_where_it_rounds_is_judged_by_that(self, monkeypatch):
        ranks = [rank_result(err_oracle=2e-2)] * 2
        assert row_of(case(), *ranks).ok is False
        declared = classmethod(lambda cls, spec: Numerics(bf16_maximum=True))  # 3e-2
        monkeypatch.setattr(TorchBackend, "numerics_of", declared)
        assert row_of(case(), *ranks).ok is True

    def test_slices_of_one_pair_are_one_pair(self):
        made = row_of(case(parallel={"tp": 2}), *[rank_result(rows=10, err_oracle=0.999e-2 * margin(SPEC, 10))] * 2)
        assert (made.pairs, made.ok) == (10, True)

    def test_weights_that_are_not_the_sources_fail_a_row_and_it_says_so(self):
        for wrong in (1.1e-4, math.inf, math.nan):
            made = row_of(case(), *[rank_result(err_whole=wrong)] * 2)
            assert made.ok is False
            said = "NO, other weights than its source's" if math.isfinite(wrong) else "NO, infinite or NaN"
            text = printed(*tables([made]))
            assert said in text
            assert ("inf or NaN" in text) is False  # that column is another error's
        lost = row_of(case(), *[rank_result(err_oracle=math.inf, err_exact=math.nan)] * 2)
        assert printed(*tables([lost])).count("inf or NaN") == 2
        assert row_of(case(), *[rank_result(err_whole=9e-5)] * 2).ok is True
        assert "other weights" not in printed(*tables([row(ok=False, err_whole=None), row(ok=False)]))

    def test_rows_of_a_checkpoint_say_so_in_their_title(self):
        assert "· checkpoint:m layer 3" in printed(*tables([row(source="checkpoint:m layer 3")]))
        assert "random:0" not in printed(*tables([row()]))

    def test_unquantized_rows_have_a_tolerance_of_their_own(self):
        plain = case(model=SPEC.with_changes(quant="none"))
        assert row_of(plain, *[rank_result(err_exact=EXACT_TOLERANCE["none"])] * 2).ok is True
        assert row_of(plain, *[rank_result(err_exact=2e-2)] * 2).ok is False

    def test_ok_needs_rows_and_no_failure(self):
        assert not Outcome().ok
        assert Outcome(rows=[row(), row(ok=None)]).ok
        assert not Outcome(rows=[row(), row(ok=False)]).ok


class TestTables:
    OTHERS = (
        {"token_layout": "replicated"},
        {"token_split": "ragged"},
        {"global_tokens": 65},
        {"world": 4},
        {"model": "other"},
        {"quant": "bf16"},
        {"skew": "single"},
        {"seed": 1},
        {"shared_experts": "tp"},
        {"source": "checkpoint:m layer 3"},
    )

    @pytest.mark.parametrize("other", OTHERS, ids=lambda other: next(iter(other)))
    def test_what_may_not_be_compared_stands_apart(self, other):
        rows = [row(tp=2), row(ep=2, p50=50.0), row(tp=2, **other), row(ep=2, p50=200.0, **other)]
        together = groups(rows)
        assert sorted(len(group) for group in together) == [2, 2]
        for group in together:
            assert len({tuple(getattr(one, name) for name in other) for one in group}) == 1
        assert len(tables(rows)) == 2
        assert len(answers(rows)) == 2

    def test_the_fastest_row_comes_first_and_untimed_rows_last(self):
        (group,) = groups([row(p50=None), row(p50=3.0), row(p50=1.0), row(p50=2.0)])
        assert [one.p50_us for one in group] == [1.0, 2.0, 3.0, None]

    def test_groups_are_ordered_by_number_of_tokens_not_by_their_digits(self):
        found = groups([row(global_tokens=tokens) for tokens in (1024, 8, 64)])
        assert [group[0].global_tokens for group in found] == [8, 64, 1024]

    def test_cells(self):
        text = printed(*tables([row(ep=2, p50=1234.5), row(tp=2, ok=False, err_oracle=0.5), row(tp=2, ok=None)]))
        assert "m fp8_block (hidden 8, intermediate 8, 4 experts, top-2) · 2 ranks · 64 sharded tokens" in text
        first = next(line for line in text.splitlines() if "EP2" in line)
        assert "combine   unstaged" in text
        assert "7.0        6.0" in first
        for cell in ("ag_rs", "torch", "fp8", "1,23", "1.25", "2.0 KiB", "1.0e-03", "2.0e-02", "yes"):
            assert cell in first
        assert " 11 " in first  # compute: quantize + gemm1 + activation + gemm2
        assert "convert" not in text
        assert "floor" not in text
        assert next(line for line in text.splitlines() if "5.0e-01" in line).rstrip().endswith("NO")
        assert "unchecked" in text

    def test_a_split_that_is_not_even_is_in_the_title(self):
        assert "routing uniform · split ragged" in printed(*tables([row(token_split="ragged")]))
        assert "split" not in printed(*tables([row()]))

    def test_the_floor_of_perfect_balance_stands_beside_the_floor(self):
        text = printed(*tables([row(ep=2, floor_us=50.0, balanced_floor_us=40.0)]))
        assert "floor   balanced   ×floor" in text
        assert "50         40     2.00" in text

    @pytest.mark.parametrize(
        ("floors", "said"),
        [
            ((657.0, 512.0), "Perfect balance would lower the floor from 657 to 512 µs (1.28x)."),
            ((512.0, 512.0), None),
            ((None, None), None),
        ],
    )
    def test_run_says_what_perfect_balance_would_give(self, floors, said):
        assert balance_line(row(ep=2, floor_us=floors[0], balanced_floor_us=floors[1])) == said
        found = Outcome([row(ep=2, floor_us=floors[0], balanced_floor_us=floors[1])])
        for sweep in (False, True):
            out = StringIO()
            print_outcome(Terminal(file=out, width=80), found, None, sweep=sweep, wide=False)
            assert ("Perfect balance" in out.getvalue()) is (said is not None and not sweep)

    def test_columns_that_only_some_need(self):
        converting = row(ep=2, stages_us={**STAGES, "convert": 4.0}, floor_us=50.0)
        text = printed(*tables([converting, row(tp=2)]))
        assert "convert" in text
        assert "×floor" in text
        assert "2.00" in next(line for line in text.splitlines() if "EP2" in line)

    @pytest.mark.parametrize("width", [80, 100, 120, 160, 230])
    def test_columns_go_before_a_cell_is_cut(self, width):
        long = {"exchange": "all_to_all", "backend": "flashinfer_cutlass", "graph": True, "p50": 123_456.0}
        rows = [row(tp=2, ep=2, **long, floor_us=40.0), row(ep=2, **long, layer="stack:8", per_layer_us=15_432.0)]
        for table in tables(rows, width):
            text = printed(table, width=width)
            assert max(map(len, text.splitlines())) <= width
            for cell in ("TP2xEP2", "EP2"), ("all_to_all",), ("flashinfer_cutlass",), ("123,456",), ("yes",):
                assert any(one in text for one in cell)
            assert "…" not in text
            assert ("err exact" in text) is (width == 230)
            assert ("dispatch" in text) is (width >= 160)

    def test_refused_cases_are_grouped_by_their_reason(self):
        refused = [Refused(case=f"case {n}", reason="too wide" if n < 3 else "no such thing") for n in range(4)]
        lines = printed(refused_table(refused)).splitlines()
        wide = next(line for line in lines if "too wide" in line)
        assert "3" in wide
        assert "case 0" in wide
        assert any("case 3" in line and "no such thing" in line for line in lines)


class TestVerdict:
    def test_families(self):
        assert [family(one) for one in (row(tp=2), row(ep=2), row(tp=2, ep=2), row())] == [
            "TP",
            "EP",
            "TPxEP",
            "single",
        ]

    def test_a_map_of_experts_is_compared_with_the_plain_placement(self):
        mapped = row(ep=2, p50=80.0, placement="EP2+2@1a2b3c")
        assert family(mapped) == "EP map"
        assert family(row(tp=2, ep=2, placement="TP2xEP2@1a2b3c")) == "TPxEP map"
        (answer,) = answers([row(ep=2, p50=100.0), mapped])
        assert [one.placement for one in answer.best] == ["EP2+2@1a2b3c", "EP2"]
        assert last_line([answer]) == "Verdict: 1 comparison: EP map fastest in 1."

    def test_the_best_of_each_family_is_compared(self):
        rows = [row(tp=2, p50=300.0), row(tp=2, p50=200.0, exchange="all_reduce"), row(ep=2, p50=100.0)]
        (answer,) = answers(rows)
        assert [(one.placement, one.exchange) for one in answer.best] == [("EP2", "ag_rs"), ("TP2", "all_reduce")]
        assert last_line([answer]) == "Verdict: 1 comparison: EP fastest in 1."
        lines = printed(answer_table([answer])).splitlines()
        assert lines[0].strip() == "m fp8_block · 2 ranks · backend torch · eager"
        assert lines[-2].split() == ["64", "uniform", "EP2", "ag_rs", "100", "fastest"]
        assert lines[-1].split() == ["TP2", "all_reduce", "200", "2.00x"]

    @pytest.mark.parametrize(("us", "times"), [(80.0, "0.80x"), (100.5, "1.00x,")])
    def test_a_peer_stands_beside_the_answer_and_wins_nothing(self, us, times):
        peer = row(ep=2, p50=us, exchange="peer", backend="mega", peer="package 1.0")
        (answer,) = answers([row(tp=2, p50=200.0), row(ep=2, p50=100.0), peer, peer.model_copy(update={"p50_us": 500})])
        assert (answer.family, answer.peers) == ("EP", (peer,))
        assert last_line([answer]) == "Verdict: 1 comparison: EP fastest in 1."
        line = printed(answer_table([answer])).splitlines()[-1]
        assert line.split()[:5] == ["EP2", "peer", "mega", f"{us:.0f}", times]

    def test_a_split_that_all_steps_have_is_in_the_title(self):
        rows = [row(tp=2, token_split="ragged"), row(ep=2, token_split="ragged")]
        assert printed(answer_table(answers(rows))).splitlines()[0].strip().endswith("· eager · split ragged")

    def test_a_long_routing_is_folded_and_not_cut(self):
        long = {
            "skew": "spread:16:hot_rank:16x12.25",
            "exchange": "all_to_all",
            "global_tokens": 8192,
            "p50": 123_456.0,
        }
        steps = [long, long | {"token_split": "one_rank"}]
        rows = [row(**{kind: 2}, **step) for step in steps for kind in ("tp", "ep")]
        text = printed(answer_table(answers(rows), 80), width=80)
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        for cell in ("one_rank", "all_to_all", "123,456", "tie", "spread:16:"):
            assert cell in text

    def test_what_differs_between_steps_names_them(self):
        steps = [{"world": 4}, {"model": "other"}, {"layer": "stack:3"}, {"token_layout": "replicated"},
                 {"token_split": "ragged"}]  # fmt: skip
        rows = [row(tp=2), row(ep=2, p50=50.0, graph=True, backend="triton", floor_us=40.0)]
        rows += [row(**{kind: 2}, **step) for step in steps for kind in ("tp", "ep")]
        heads = printed(answer_table(answers(rows))).splitlines()[-2 * len(steps) - 4].split()
        assert heads == ["model", "ranks", "layers", "tokens", "layout", "split", "routing", "best", "of", "exchange",
                         "backend", "mode", "µs", "×floor"]  # fmt: skip

    @pytest.mark.parametrize(
        ("difference", "scatters", "tie"),
        [
            (2.1, (0.1, 0.1), False),  # of graphs on a quiet machine little means something
            (1.9, (0.1, 0.1), True),  # but ranks that are started again may differ by as much
            (16.0, (3.0, 4.0), False),  # 3 and 4 together are 5, three times that 15
            (14.0, (3.0, 4.0), True),
            (14.0, (4.0, 3.0), True),
            (14.0, (0.0, 5.0), True),  # either row's scatter counts
            (14.0, (5.0, 0.0), True),
            (50.0, (None, 0.1), True),  # measured too seldom to know
            (50.0, (0.1, None), True),
        ],
    )
    def test_a_tie_is_what_scatter_explains(self, difference, scatters, tie):
        rows = [row(tp=2, p50=100.0 + difference, scatter_us=scatters[0]), row(ep=2, scatter_us=scatters[1])]
        (answer,) = answers(rows)
        assert answer.tie is tie
        assert answer.best[0].placement == "EP2"
        known = None not in scatters  # else nothing is claimed, a tie neither
        assert ("a tie in 1" in last_line([answer])) is (tie and known)
        assert ("nothing claimed in 1" in last_line([answer])) is not known
        assert ("EP fastest in 1" in last_line([answer])) is not tie
        first, second = printed(answer_table([answer])).splitlines()[-2:]
        said = "fastest" if not tie else "tie" if known else "not claimed"
        assert first.rstrip().endswith(f" {said}")
        assert second.rstrip().endswith(f"x, {said}" if tie else "x")

    def test_wrong_and_untimed_rows_do_not_compete(self):
        wrong = [row(tp=2, p50=1.0, ok=False), row(ep=2, p50=100.0), row(tp=2, p50=200.0)]
        assert [one.p50_us for one in answers(wrong)[0].best] == [100.0, 200.0]
        assert "EP fastest in 1" in last_line(answers(wrong))
        assert answers([row(tp=2, p50=None), row(ep=2)]) == []
        assert answers([row(tp=2, ok=False), row(ep=2)]) == []
        assert last_line([]).startswith("Verdict: nothing to compare")

    def test_rows_of_different_layouts_are_never_compared(self):
        apart = [row(tp=2, p50=1.0, token_layout="replicated"), row(ep=2, p50=100.0)]
        assert answers(apart) == []

    def test_every_comparison_is_counted_once(self):
        rows = [
            *(row(tp=2, p50=100.0, global_tokens=tokens) for tokens in (8, 64, 512)),
            *(row(ep=2, p50=50.0 if tokens > 8 else 200.0, global_tokens=tokens) for tokens in (8, 64, 512)),
        ]
        assert last_line(answers(rows)) == "Verdict: 3 comparisons: EP fastest in 2, TP fastest in 1."


class TestFile:
    def test_has_the_form_of_the_design(self, tmp_path: Path):
        path = tmp_path / "new" / "results.json"
        wrong = row_of(case(), *[rank_result(err_oracle=math.inf)] * 2)
        outcome = Outcome([wrong], [Refused(case="c", reason="r")], {2: ["rank 0"]})
        open_output(path, pytest.fail).update(results_document(provenance(CPU), outcome))
        document = json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
        assert set(document) == {
            "date", "commit", "code", "command", "machine", "runs", "ranks", "notices", "rows", "refused", "failed",
        }  # fmt: skip
        assert {"gpu", "count", "driver", "torch", "triton", "nccl", "flashinfer"} <= set(document["machine"])
        assert document["machine"]["gpu"] is None
        assert document["rows"][0]["err_oracle"] is None
        assert document["rows"][0]["ok"] is False
        assert document["rows"][0]["not_finite"] == ["err_oracle"]
        assert document["refused"] == [{"case": "c", "reason": "r"}]
        assert document["ranks"] == {"2": ["rank 0"]}
        assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]

    def test_a_job_says_which_commit_it_was_submitted_from(self, monkeypatch):
        monkeypatch.setenv("MOE_DIST_COMMIT", "abc+changes")
        assert commit() == "abc+changes"

    @pytest.mark.parametrize(
        ("argument", "kept"),
        [
            ("/home/me/a.yaml", "a.yaml"),
            ("--out=/home/me/a.json", "--out=a.json"),
            ("file:/home/me/r.pt", "file:r.pt"),
            ("skews=[uniform, file:/home/me/r.pt]", "skews=[uniform, file:r.pt]"),
            ('placements=["map:/home/me/a.json","/b/c"]', 'placements=["map:a.json","c"]'),
            ("ray.address=http://head:8265/api/x", "ray.address=http://head:8265/api/x"),
            ("results/a.json", "results/a.json"),
            ("/home/me/", "me"),
            ("/models/my, odd/x", "x"),
        ],
    )
    def test_a_command_is_kept_without_folders_of_this_machine(self, monkeypatch, argument, kept):
        monkeypatch.setattr("sys.argv", ["moe-dist", argument])
        assert provenance(CPU).command == f"moe-dist {kept}"

    def test_commit_of_a_checkout_and_of_something_else(self, monkeypatch):
        monkeypatch.delenv("MOE_DIST_COMMIT", raising=False)
        answers = {"rev-parse": "abc", "status": " M file"}
        monkeypatch.setattr(results, "_git", lambda _, verb, *__: answers[verb])
        assert commit() == "abc+changes"
        answers["status"] = ""
        assert commit() == "abc"
        answers["rev-parse"] = None
        assert commit() == "unknown"


class TestExperiment:
    def test_is_the_product_of_its_lists(self):
        experiment = Experiment(
            models=[SPEC], worlds=[1, 2, 4], placements=["tp", "ep", "tp2xep2"], exchanges=["ag_rs"], tokens=[1, 2]
        )
        cases = list(experiment.cases("cpu"))
        found = {(one.parallel.world, one.parallel.label) for one in cases}
        assert found == {(1, "single"), (2, "TP2"), (2, "EP2"), (4, "TP4"), (4, "EP4"), (4, "TP2xEP2")}
        assert len(cases) == 2 * len(found)
        assert [one.parallel.world for one in cases] == sorted(one.parallel.world for one in cases)

    @pytest.mark.parametrize("text", ["dp", "tp0", "tp2xtp2", "tp2ep2", "tp-1", ""])
    def test_placements_that_are_none(self, text):
        with pytest.raises(ConfigError, match="not a placement"):
            parse_placement(text, 2)

    def test_what_cannot_run_is_refused_with_its_reason(self):
        cases = [case(), case(exchange="nosuch"), case(parallel={"tp": 4}), case(payload="fp16")]
        planned, refused = plan_cases(cases, CPU)
        assert [one.exchange for one, _ in planned] == ["ag_rs"]
        assert len(refused) == 3
        for item, reason in zip(refused, ("no exchange has this name", "1 to 3", "payload"), strict=True):
            assert reason in item.reason

    def test_too_large_a_model_is_refused_before_anything_starts(self):
        huge = MoESpec(name="huge", hidden=1 << 16, intermediate=1 << 16, num_experts=4096, top_k=2)
        with pytest.raises(ResourceError, match=r"not enough memory: .* GiB of weights needed"):
            plan_cases([case(model=huge)], CPU)
