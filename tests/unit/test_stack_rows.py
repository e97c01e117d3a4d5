"""Stacks as cases and rows: the key and the flag, another draw for each layer, room for all weights, tables."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from unit.test_bench import CPU, H200, SPEC, case, printed, rank_result, row, row_of

from moe_dist.bench.answer import answer_table, answers
from moe_dist.bench.case import Experiment
from moe_dist.bench.draws import draws, shortage
from moe_dist.bench.findings import merge
from moe_dist.bench.loading import weights_of
from moe_dist.bench.measure import measure
from moe_dist.bench.results import make_row
from moe_dist.bench.rounds import Turn, batches, group_bytes
from moe_dist.bench.runner import plan_cases
from moe_dist.bench.source_spec import SourceSpec
from moe_dist.bench.table import groups, tables
from moe_dist.comm import Comm
from moe_dist.commands.cli import main
from moe_dist.errors import ConfigError, ResourceError
from moe_dist.model.spec import MoESpec, WorkloadSpec
from moe_dist.runtime.context import RankContext
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.traces import trace_of

ALONE: dict[str, Any] = {"parallel": {}, "exchange": "local", "workload": {"tokens": 5}, "iters": 2, "warmup": 0}


class TestCase:
    def test_its_layers_differ_in_weights_alone(self):
        stacked = case(layers=3, source=SourceSpec(seed=7))
        for number in range(3):
            one = stacked.at(number)
            assert (one.layers, one.depth, one.source) == (1, number, SourceSpec(seed=7))
            assert (one.model, one.parallel, one.workload) == (stacked.model, stacked.parallel, stacked.workload)
        assert case(source=SourceSpec(seed=7)) == stacked.at(0)

    def test_a_label_says_so(self):
        assert case(layers=3).label.endswith(" eager × 3 layers")
        assert "layers" not in case().label

    @pytest.mark.parametrize("value", [0, 129, True, 2.0, "2"])
    def test_as_many_as_a_model_has(self, value):
        with pytest.raises(ConfigError, match=r"experiment\.layers = .*legal: 1 to 128|experiment\.layers = "):
            Experiment(models=[SPEC], layers=value)

    def test_every_case_of_an_experiment_has_them(self):
        assert {one.layers for one in Experiment(models=[SPEC], layers=4).cases("cpu")} == {4}


class TestDraws:
    def test_each_layer_has_another_one_and_the_first_is_a_single_layer_s(self):
        work = WorkloadSpec(tokens=50, skew="zipf:1.2", seed=3)
        ((first, *others),) = draws(SPEC, work, 4)
        ((alone,),) = draws(SPEC, work, 1)
        assert torch.equal(first.ids_TK, alone.ids_TK)
        assert torch.equal(first.ids_TK, synthetic_routing(SPEC, 50, "zipf:1.2", 3).ids_TK)
        assert all(not torch.equal(first.ids_TK, other.ids_TK) for other in others)

    @pytest.fixture
    def trace(self, tmp_path):
        ids = torch.arange(12).view(6, 2) % 8
        ids[2:4] = -1
        path = tmp_path / "trace.pt"
        torch.save({"ids": ids, "weights": torch.ones(6, 2)}, path)
        return f"file:{path}", ids

    def test_of_a_trace_they_are_the_rows_that_come_next(self, trace):
        skew, ids = trace
        (chosen,) = Experiment(
            models=[SPEC], worlds=[1], placements=["tp"], exchanges=["local"], tokens=[4], skews=[skew], layers=3
        ).cases("cpu")
        (found,) = draws(SPEC, chosen.workload, 3)
        assert [routing.ids_TK.tolist() for routing in found] == [
            ids[[0, 1, 2, 3]].tolist(), ids[[4, 5, 0, 1]].tolist(), ids[[2, 3, 4, 5]].tolist(),
        ]  # fmt: skip

    @pytest.mark.parametrize(("content", "tokens", "layers", "said"), [
        ({}, 6, 1, None),
        ({}, 7, 1, "6 recorded rows for the 7 of a step: from the first one again"),
        ({}, 3, 2, "one recorded layer for 2: each takes the rows that come next"),
        ({}, 4, 2, "6 recorded rows for the 8 of a step: from the first one again; one recorded layer for 2"),
        ({"steps": torch.tensor([2, 2, 2])}, 2, 1, None),
        ({"steps": torch.tensor([2, 2, 2])}, 3, 1, "rows for 2 such steps, where 3 were recorded"),
    ])  # fmt: skip
    def test_a_trace_that_is_too_short_says_in_what(self, trace, content, tokens, layers, said):
        path = trace[0].removeprefix("file:")
        torch.save(torch.load(path) | content, path)
        work = WorkloadSpec(tokens=tokens, skew=trace[0], trace=trace_of(trace[0]))
        found = shortage(SPEC, work, layers)
        assert found is None if said is None else (found or "").startswith(said)
        assert shortage(SPEC, WorkloadSpec(tokens=tokens), layers) is None

    def test_a_trace_that_leaves_a_layer_without_any_is_refused_with_the_experiment(self, trace):
        keys = {"models": [SPEC], "worlds": [1], "exchanges": ["local"], "skews": [trace[0]]}
        Experiment(tokens=[2], layers=1, **keys)
        with pytest.raises(ConfigError, match="2 rows of layer 1 of the stack nowhere"):
            Experiment(tokens=[4, 2], layers=2, **keys)


class TestWeights:
    @pytest.mark.parametrize("model", [SPEC, SPEC.with_changes(shared_experts="replicated", shared_intermediate=128)])
    def test_each_layer_has_its_own_and_the_first_a_single_layer_s(self, model):
        context, chosen = RankContext(Comm.single(), "test"), case(**ALONE, model=model, layers=3)
        held = weights_of(context, chosen, chosen.plan(CPU), Turn())
        prints = [[part.fingerprint() for part in (shard, shared) if part] for shard, shared, _ in held]
        assert prints[0][0] == random_weights(model, 0).fingerprint()
        for number in range(len(prints[0])):
            assert len({json.dumps(each[number]) for each in prints}) == 3
        single = weights_of(context, chosen.at(0), chosen.plan(CPU), Turn())
        assert [id(part) for part in single[0]] == [id(part) for part in held[0]]
        assert len(context.memo["weights"]) == 1  # the others' are dropped

    def test_all_of_them_must_have_room_and_one_scratch(self, monkeypatch):
        one = case().plan(H200)
        weights, beside = one.weight_bytes(0), one.scratch_bytes(17) + 33 * 4 * SPEC.hidden

        def memory(layers: int) -> int:
            return int((layers * weights + beside + 33 * 8 * SPEC.top_k * layers) / 0.9)

        plan_cases([case(layers=10)], replace(H200, memory=memory(10) + 10))
        with pytest.raises(ResourceError, match="fewer layers"):
            plan_cases([case(layers=10)], replace(H200, memory=memory(10) - 10))

    def test_placements_of_stacks_take_turns_as_their_weights_allow(self):
        cases = [case(layers=4, parallel=parallel) for parallel in ({"tp": 2}, {"ep": 2})]
        planned = [(one, one.plan(CPU)) for one in cases]
        both = 4 * sum(group_bytes(plan) for _, plan in planned)
        assert batches(planned, int(both / 0.39)) == [[0, 1]]
        assert batches(planned, int(both / 0.41)) == [[0], [1]]


class TestRow:
    def test_names_the_stack_and_the_time_of_a_layer(self):
        made = row_of(case(layers=8), rank_result(), rank_result())
        assert (made.layer, made.p50_us, made.per_layer_us) == ("stack:8", 200.0, 25.0)
        single = row_of(case(), rank_result(), rank_result())
        assert (single.layer, single.per_layer_us) == ("whole", 200.0)
        untimed = row_of(case(layers=8, iters=0), *[rank_result(rounds_us=[], stages_us={}, unstaged_us=None)] * 2)
        assert untimed.per_layer_us is None

    def test_figures_are_sums_over_its_layers(self):
        """Another rank is the busy one in each."""
        ranks = (
            rank_result(rows=50, active_experts=4, by_layer=((40, 4), (10, 1))),
            rank_result(rows=70, active_experts=4, by_layer=((20, 2), (50, 4))),
        )
        made = row_of(case(layers=2), *ranks, machine=H200)
        assert made.rows_per_rank == (50, 70)
        assert made.pairs == 60
        assert made.active_experts == 4
        assert made.imbalance == pytest.approx((40 + 50) / 60)
        weights = (4 + 4) * SPEC.hidden * 3 * SPEC.intermediate
        assert made.floor_us == pytest.approx(1e6 * weights / 4.29e12)
        assert made.hbm_gbps == pytest.approx(weights / 200.0 / 1e3)
        assert made.tflops == pytest.approx(2 * 90 * SPEC.hidden * 3 * SPEC.intermediate / 200.0 / 1e6)

    def test_few_pairs_are_those_of_a_layer(self):
        """A stack's error is its worst layer's, so more layers average nothing out."""
        small = SPEC.with_changes(hidden=128, intermediate=128)
        by_layer = {"rows": 8, "by_layer": ((1, 1),) * 8}
        for error, ok in ((2.0e-2, True), (2.2e-2, False)):
            made = row_of(case(model=small, layers=8), *[rank_result(**by_layer, err_oracle=error)] * 2)
            assert (made.ok, made.pairs) == (ok, 2)

    @pytest.mark.parametrize("tokens", [1, 5])
    def test_measured_in_rounds(self, tokens):
        context = RankContext(Comm.single(), "test")
        chosen = case(**ALONE | {"workload": {"tokens": tokens}, "iters": 5}, layers=3)
        for number in range(5):
            result = measure(context, chosen, chosen.plan(CPU), Turn(number, 5, 0))
        made = make_row(chosen, chosen.plan(CPU), merge([result]), "test")
        assert made.ok is True
        assert (made.err_repeat, made.iters) == (0.0, 5)


class TestTable:
    ROWS = tuple(row(**grid, layer="stack:8", p50=p50, per_layer_us=p50 / 8)
                 for grid, p50 in (({"tp": 2}, 1640.0), ({"ep": 2}, 800.0)))  # fmt: skip

    def test_shows_the_time_of_a_layer_beside_the_stack_s(self):
        text = printed(*tables(self.ROWS))
        assert "· stack of 8 layers" in text
        assert "p50 µs   µs/layer" in text
        assert "1,640        205" in text

    def test_a_layer_s_table_is_as_ever(self):
        text = printed(*tables([row(tp=2), row(ep=2)]))
        assert "µs/layer" not in text
        assert "stack" not in text

    def test_is_not_compared_with_a_layer(self):
        assert [len(group) for group in groups([*self.ROWS, row(tp=2), row(ep=2)])] == [2, 2]
        (answer,) = answers(self.ROWS)
        assert answer.best[0].placement == "EP2"
        assert "stack of 8 layers" in " ".join(printed(answer_table([answer])).split())


class TestCommand:
    def test_the_flag_and_the_key_are_one(self, capsys):
        assert main(["run", "--layers", "2", "layers=3", "--device", "cpu"]) == 2
        assert "layers = 3: contradicts --layers 2" in capsys.readouterr().err
        for arguments in (["run", "--layers", "0"], ["compare", "--layers", "129"], ["compare", "layers=0"]):
            assert main([*arguments, "--device", "cpu"]) == 2
            said = capsys.readouterr().err
            assert said.startswith("moe-dist: layers = " if "layers=0" in arguments else "moe-dist: --layers = ")

    def test_a_plan_counts_them(self, capsys):
        assert main(["plan", "--device", "cpu", "--ep", "2", "layers=5", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["layers"] == 5
        assert main(["plan", "--device", "cpu", "--ep", "2", "layers=5"]) == 0
        assert "a stack of 5 layers: 5 times these weights" in capsys.readouterr().out

    def test_models_whose_stack_is_too_large_are_refused(self, capsys):
        large = MoESpec(name="large", hidden=1 << 13, intermediate=1 << 14, num_experts=64, top_k=2)
        keys = [f"model.{key}={getattr(large, key)}" for key in ("hidden", "intermediate", "num_experts", "top_k")]
        assert main(["run", "--device", "cpu", "--layers", "128", *keys]) == 3
        assert "of weights needed" in capsys.readouterr().err
