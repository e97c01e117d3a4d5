"""What a rearrangement is predicted to gain, and the commands that say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.balance.balancer import balanced
from moe_dist.balance.loads import expert_loads
from moe_dist.balance.placement_file import read_placement
from moe_dist.bench.peaks import PEAKS
from moe_dist.commands.cli import main
from moe_dist.commands.config import find_model
from moe_dist.model.placement import Placement
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import ExpertWeights
from moe_dist.simulate.calibration import calibration
from moe_dist.simulate.cost import CostModel
from moe_dist.simulate.gain import Change, Gain, Sweep, steps_to_pay
from moe_dist.workloads.skews import synthetic_routing

V3 = find_model("DeepSeek-V3")
SPEC = MoESpec(hidden=128, intermediate=256, num_experts=6, top_k=2)


@pytest.fixture(scope="module")
def model() -> CostModel:
    return calibration(None).model


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds, with all of them."""
    monkeypatch.setattr("moe_dist.simulate.gain.EXPONENTS", [0.0, 0.2, 1.0, 2.0])
    monkeypatch.setattr("moe_dist.simulate.gain.SEEDS", 1)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]):
    def call(*words: str | Path) -> str:
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return call


class TestGain:
    def test_weights_that_move(self):
        after = ParallelSpec(ep=2, expert_map=(1, 0, 0, 0, 1, 1), replicas={1: (1,)})  # 0 and 3 change places
        change = Change(SPEC, ParallelSpec(ep=2), after)
        assert change.moved_bytes() == [ExpertWeights.bytes_of(SPEC, 1, 256), ExpertWeights.bytes_of(SPEC, 2, 256)]
        assert Change(SPEC, after, after).moved_bytes() == [0, 0]

    def test_steps_that_pay_for_it(self):
        gain = Gain(before_us=120.0, after_us=100.0, scatter_us=2.0)
        assert gain.gain_us == 20
        assert gain.seen
        assert steps_to_pay(gain, 50_000_000, 100.0) == 25  # 500 µs
        assert steps_to_pay(Gain(100.0, 100.0, 2.0), 1, 100.0) is None
        assert not Gain(101.0, 100.0, 2.0).seen

    def test_the_busiest_rank_is_what_gains(self, model):
        routing = synthetic_routing(V3, 8192, "hot_rank:4x2", 0)
        after = balanced(expert_loads(routing, V3.num_experts), ParallelSpec(ep=4))
        change = Change(V3, ParallelSpec(ep=4), after)
        before, better = change.work(routing, 8192)
        assert before.pairs == 2 * 8192 * 8 // 4
        assert better.pairs < 1.02 * 8192 * 8 // 4
        found = change.gain(model, "cutlass", routing, 8192)
        assert found.gain_us == pytest.approx(model.local_us("cutlass", before) - model.local_us("cutlass", better))
        assert found.seen
        none = Change(V3, ParallelSpec(ep=4), ParallelSpec(ep=4)).gain(model, "cutlass", routing, 8192)
        assert none.gain_us == 0

    def test_break_even(self, model):
        """Even routing has nothing to gain, and a steep one has at prefill; under TP alone no skew has."""
        sweep = Sweep(model, "cutlass", V3, ParallelSpec(ep=4), 0, 8192)
        assert sweep.break_even() == 1.0
        assert not sweep.gain(0.0, 0).seen
        assert sweep.gain(2.0, 0).seen
        assert Sweep(model, "cutlass", V3, ParallelSpec(tp=4), 0, 64).break_even() is None


class TestBalance:
    def test_what_is_said(self, said, monkeypatch, tmp_path):
        monkeypatch.setenv("COLUMNS", "80")
        path = tmp_path / "m.json"
        words = ["balance", "--ep", "4", "--tokens", "512", "--redundant", "4"]
        text = said(*words, "--out", path)
        assert max(len(line) for line in text.splitlines() if "moe-dist compare" not in line) <= 80
        joined = " ".join(text.split())
        for part in ("Predicted, not measured, on NVIDIA H200", "Break-even skew: ", "Error on held-out rows",
                     f'placements=["tp1xep4", "map:{path}"]', "judged on the loads that it was made for"):  # fmt: skip
            assert part in joined
        made = read_placement(str(path))
        assert sum(map(len, Placement.build(V3, made).homes)) == 256 + 4

    def test_json(self, said):
        found = json.loads(said("balance", "--tokens", "512", "--move-gbps", "50", "--json"))
        assert found["after"]["imbalance"] < found["before"]["imbalance"]
        assert found["floor_us"]["perfect"] <= found["floor_us"]["before"]
        predicted = found["predicted"]
        assert predicted["move_gbps"] == 50
        moved_us = max(found["moved_bytes"]) / 50e3
        assert predicted["steps_to_pay"] >= moved_us / predicted["gain_us"] > predicted["steps_to_pay"] - 1
        assert predicted["calibration"]["held_out"]["sweeps"]["median"] > 0
        assert ParallelSpec(**found["parallel"]).label == found["placement"]

    def test_a_shared_expert_is_in_the_floor_and_in_no_prediction(self, said, tmp_path):
        path, floors = tmp_path / "m.yaml", {}
        for shared in ("none", "replicated"):
            model = V3.with_changes(shared_experts=shared, shared_intermediate=2048)
            path.write_text(json.dumps(model.model_dump(mode="json")))
            found = json.loads(said("balance", "--model", path, "--tokens", "8192", "--json"))
            floors[shared], beyond = found["floor_us"], found["predicted"]["beyond"]
        assert beyond == ["a shared expert, whose time is left out (measured: none)"]
        least = 1e6 * 2048 * 2 * 3 * 7168 * 2048 / PEAKS["NVIDIA H200"].fp8_flops  # of a rank's 2,048 tokens
        for name in ("before", "after", "perfect"):
            assert floors["replicated"][name] == pytest.approx(floors["none"][name] + least)

    def test_a_format_that_was_not_measured(self, said):
        text = " ".join(said("balance", "--model", "Mixtral-8x7B", "--ep", "2", "--tokens", "64").split())
        assert "No gain is predicted: a prediction of fp8_tensor_static with gate is not supported" in text
        document = json.loads(said("balance", "--model", "Mixtral-8x7B", "--ep", "2", "--tokens", "64", "--json"))
        assert document["predicted"] is None
        assert "fp8_tensor_static" in document["not_predicted"]

    @pytest.mark.parametrize(("rows", "apart"), [(64, True), (20, False), (10, False)])
    def test_a_trace_is_judged_on_its_second_half(self, said, tmp_path, rows, apart):
        """Where the first half is busy on other experts than the second, balancing for it does not help."""
        spec = find_model("tiny")
        ids = torch.stack([torch.randperm(5)[: spec.top_k] for _ in range(rows)])
        ids[rows // 2 :] += 5  # the other rank's experts under EP2
        trace = tmp_path / "t.pt"
        torch.save({"ids": ids, "weights": torch.ones(ids.shape)}, trace)
        words = ["balance", "--model", "tiny", "--ep", "2", "--tokens", "16", "--skew", f"file:{trace}", "--json"]
        found = json.loads(said(*words))
        assert found["judged_on_other_rows"] is apart
        short = "10 recorded rows for the 16 of a step: from the first one again" if rows == 10 else None
        assert found["trace_short"] == short
        assert ("The trace is short: 10" in said(*words[:-1])) == (rows == 10)
        pairs = found["before"]["pairs"]
        assert pairs[0] == 0 if apart else pairs[0] > 0
        assert sum(found["after"]["pairs"]) == 16 * spec.top_k


def test_a_file_of_something_else_is_not_overwritten(capsys, tmp_path):
    path = tmp_path / "notes.json"
    path.write_text("{}")
    assert main(["balance", "--model", "tiny", "--ep", "2", "--tokens", "8", "--out", str(path)]) == 2
    assert "is no placement of moe-dist; it is not overwritten" in capsys.readouterr().err
    assert path.read_text() == "{}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["balance", "--ep", "1"], "--ep = 1: "),
        (["balance", "--skew", "router"], "--skew = 'router': "),
        (["balance", "--skew", "hot:999"], "--skew = 'hot:999': "),
        (["balance", "--model", "tiny", "--ep", "2", "--redundant", "11"], "--redundant = 11: "),
        (["balance", "--model", "Mixtral-8x7B", "--ep", "2", "--tokens", "64", "--calibrate", "f"], "--calibrate = "),
        (["simulate", "--machine", "2xh200x8"], "--machine = '2xh200x8': "),
        (["simulate", "--machine", "h100x8"], "--machine = '8 × NVIDIA H100"),
        (["simulate", "--network-gbps", "50"], "--network-us = None: "),
        (["simulate", "--network-us", "5"], "--network-gbps = None: "),
        (["simulate", "--network-us", "nan", "--network-gbps", "4"], "--network-us = nan: "),
        (["simulate", "--skew", "hot:999"], "--skew = 'hot:999': "),
        (["simulate", "--tokens-per-rank", "16777216"], "--tokens-per-rank = "),
    ],
)
def test_bad_input(capsys, words, said):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"moe-dist: {said}")


class TestSimulate:
    def test_what_is_said(self, said, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        words = ["--network-gbps", "45", "--network-us", "10", "--tokens-per-rank", "8", "--placements", "tp", "ep"]
        text = said("simulate", "--machine", "8xh200x8", *words)
        assert max(map(len, text.splitlines())) <= 80
        joined = " ".join(text.split())
        assert "on 8 hosts of 8 × NVIDIA H200: predicted, not measured" in joined
        assert "~ is beyond what was measured: 64 ranks (measured: 2 to 4)" in joined
        assert "a rank would hold nothing" in joined  # TP64
        assert sum("ep64" in line.lower() and "~" in line for line in text.splitlines()) == 1
        every = said("simulate", "--machine", "8xh200x8", *words, "--wide")
        assert sum(line.startswith("EP64") for line in every.splitlines()) == 4

    def test_a_short_trace_is_told(self, said, tmp_path):
        ids = torch.stack([torch.randperm(256)[:8] for _ in range(10)])
        torch.save({"ids": ids, "weights": torch.ones(ids.shape)}, tmp_path / "t.pt")
        words = ["simulate", "--tokens-per-rank", "8", "--skew", f"file:{tmp_path / 't.pt'}"]
        assert "The trace is short: 10 recorded rows for the 64 of a step" in " ".join(said(*words).split())
        assert json.loads(said(*words, "--json"))["trace_short"].startswith("10 recorded rows")

    def test_json(self, said):
        found: dict[str, Any] = json.loads(said("simulate", "--tokens-per-rank", "8,128", "--json"))
        assert found["predicted"] is True
        assert len(found["rows"]) == 2 * 2 * 3 * 2
        assert all(row["predicted_us"] > 0 and row["beyond"] for row in found["rows"])
        assert {"sweeps", "numbers of GPUs", "numbers of tokens"} == set(found["calibration"]["held_out"])
        assert found["calibration"]["rows"] > 300

    def test_nothing_that_can_be_predicted(self, capsys):
        assert main(["simulate", "--model", "Mixtral-8x7B", "--tokens-per-rank", "8", "--json"]) == 2
        found = json.loads(capsys.readouterr().out)
        assert found["rows"] == []
        assert len(found["refused"]) == 2 * 3 * 2
