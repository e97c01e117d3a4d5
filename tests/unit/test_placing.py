"""What `auto` takes as placement: by which record, at which size, by which rule, and what the commands say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_dist.bench.case import Experiment
from moe_dist.bench.defaults import settle_placements
from moe_dist.commands import cli
from moe_dist.engine import records
from moe_dist.engine.placing import Placed, choose_placement, grids
from moe_dist.errors import ConfigError
from moe_dist.exits.exit_codes import BAD_INPUT, OK
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec

ROOT = Path(__file__).parents[2]
H200X4 = Machine.named("h200x4")
SPEC = MoESpec(name="of tests", hidden=256, intermediate=512, num_experts=16, top_k=2)


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOE_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "shipped")


def row(tp: int, ep: int, tokens: int, us: float, /, **changes: Any) -> dict[str, Any]:
    return {
        "hidden": 256, "intermediate": 512, "num_experts": 16, "top_k": 2, "activation": "swiglu", "quant": "fp8_block",
        "tp": tp, "ep": ep, "placement": "of no account", "token_layout": "sharded", "graph": True, "layer": "whole",
        "skew": "uniform", "tokens_per_rank": tokens, "exchange": "ag_rs", "backend": "triton", "payload_dtype": "fp8",
        "p50_us": us, "scatter_us": 0.1, "ok": True,
    } | changes  # fmt: skip


def write(folder: Path, name: str, *rows: dict[str, Any], date: str = "2026-11-28T00:00:00Z") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"date": date, "machine": {"gpu": "NVIDIA H200"}, "rows": list(rows)}))


def placed(tokens: int = 8, world: int = 4, spec: MoESpec = SPEC, **given: Any) -> Placed:
    return choose_placement(spec, world, "sharded", True, H200X4, tokens, **given)


MINE = (
    row(4, 1, 8, 100.0), row(1, 4, 8, 120.0), row(2, 2, 8, 101.0), row(1, 4, 8, 90.0, exchange="nvlink", ok=False),
    row(4, 1, 2048, 300.0), row(1, 4, 2048, 200.0), row(1, 4, 2048, 190.0, exchange="all_to_all"),
    row(1, 4, 8192, 1.0),
)  # fmt: skip


def test_the_fastest_at_the_nearest_size_that_has_two() -> None:
    write(records.user_folder(), "mine.json", *MINE)
    small, large = placed(16), placed(100_000)
    assert (small.parallel.label, large.parallel.label) == ("TP4", "EP4")
    assert small.why == (
        "100 µs with ag_rs and triton, TP2xEP2 1% more (a tie) with ag_rs and triton,"
        " EP4 20% more with ag_rs and triton, at 8 tokens a rank, even routing; user record mine.json"
    )
    assert large.why.startswith("190 µs with all_to_all and triton, TP4 58% more")


def test_names_that_are_given_decide_among_their_own_rows() -> None:
    write(records.user_folder(), "mine.json", *MINE)
    assert placed(2048, exchanges=["ag_rs"]).why.startswith("200 µs with ag_rs")
    assert placed(2048, exchanges=["all_to_all"]).why.startswith("by rule")  # of one placement alone: no comparison
    assert placed(2048, backends=["cutlass"]).why.startswith("by rule")


def test_the_user_s_latest_then_the_shipped_then_the_other_mode_then_the_rule() -> None:
    eager = [row(4, 1, 8, 10.0, graph=False), row(1, 4, 8, 20.0, graph=False)]
    assert placed().why.startswith("by rule (EP where every rank gets an expert")
    assert placed().parallel.label == "EP4"
    write(records.SHIPPED, "shipped.json", *MINE)
    assert placed().why.endswith("shipped record shipped.json")
    write(records.user_folder(), "half.json", row(1, 4, 8, 5.0))
    assert placed().why.endswith("shipped record shipped.json")
    write(records.user_folder(), "eager.json", *eager)
    assert placed().why.endswith("user record eager.json, whose rows are eager")
    write(records.user_folder(), "later.json", *MINE, date="2026-11-29T00:00:00Z")
    assert placed().why.endswith("user record later.json")


def test_rows_with_and_without_shared_experts_are_not_compared() -> None:
    spec = SPEC.with_changes(shared_experts="replicated", shared_intermediate=256)
    shared = row(4, 1, 8, 90.0, shared_experts="replicated")
    write(records.user_folder(), "mine.json", *MINE, shared)
    assert placed(spec=spec).why.endswith("user record mine.json, whose rows are without shared experts")
    write(records.user_folder(), "mine.json", *MINE, shared, row(1, 4, 8, 95.0, shared_experts="replicated"))
    assert placed(spec=spec).why.startswith("90 µs with ag_rs and triton, EP4 6% more")
    assert placed(spec=spec).why.endswith("user record mine.json")
    assert placed().why.startswith("100 µs")


def test_grids_and_the_rule_where_ep_can_not_be() -> None:
    assert [each.label for each in grids(8)] == ["EP8", "TP8", "TP2xEP4", "TP4xEP2"]
    assert placed(world=1) == Placed(grids(1)[0], "the only grid of so many ranks that can hold such a layer")
    few = SPEC.with_changes(num_experts=2)
    assert placed(world=4, spec=few).parallel.label == "TP4"
    assert placed(world=8, spec=few).parallel.label == "TP4xEP2"  # 512 columns are four slices
    with pytest.raises(ConfigError, match="ep = 64"):
        placed(world=64, spec=few)


def test_an_experiment_gets_those_of_all_its_sizes() -> None:
    write(records.user_folder(), "mine.json", *MINE)
    made = Experiment(
        models=(SPEC,), worlds=(4,), placements=("auto", "tp2xep2"), tokens=(32, 8192), backends=("triton",)
    )
    found, lines = settle_placements(made, H200X4, ["triton"])
    assert found.placements == ("tp4xep1", "tp1xep4", "tp2xep2")
    assert [line.split(":")[0] for line in lines] == [
        "placement TP4 of 4 ranks, 8 tokens a rank", "placement EP4 of 4 ranks, 2,048 tokens a rank",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="settled by the commands"):
        list(made.cases("cuda"))


def test_a_step_is_as_large_as_its_busiest_rank_s_share() -> None:
    write(records.user_folder(), "mine.json", *MINE)
    made = Experiment(models=(SPEC,), worlds=(4,), placements=("auto",), tokens=(2048,), token_splits=("one_rank",))
    found, (line,) = settle_placements(made, H200X4, ["triton"])
    assert found.placements == ("tp1xep4",)
    assert line.startswith("placement EP4 of 4 ranks, 2,048 tokens a rank: ")


class TestPlan:
    def said(self, capsys: pytest.CaptureFixture[str], *words: str) -> str:
        assert cli.main(["plan", "--model", "DeepSeek-V3", "--machine", "h200x4", *words]) == OK
        return " ".join(capsys.readouterr().out.split())

    def test_says_over_what_by_how_much_and_from_which_file(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(records, "SHIPPED", ROOT / "moe_dist" / "records_shipped")
        text = self.said(capsys, "--placement", "auto", "--tokens", "32768")
        assert (
            "placement EP4 of 4 ranks, 8,192 tokens a rank: 6,472 µs with nvlink and cutlass, TP4 16% more with nvlink"
            " and cutlass, at 8,192 tokens a rank, even routing; shipped record 2026-11-28-h200x4-nvlink.json"
        ) in text
        assert "as EP4, sharded tokens: exchange nvlink, backend cutlass" in text
        assert "as TP4" in self.said(capsys, "--placement", "auto", "--tokens", "32")

    def test_without_rows_it_says_by_which_rule(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = self.said(capsys, "--placement", "auto", "--world", "2", "--json")
        assert "by rule (EP where every rank" in json.loads(text)["placement_why"][0]

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--placement", "auto", "--tp", "2"], "--placement = 'auto': contradicts --tp 2 --ep 1"),
            (["--world", "2"], "--world = 2: is of --placement auto"),
            (["--placement", "auto", "--world", "0"], "--world = 0: is a number of ranks (legal: 1 to 4,096)"),
        ],
    )
    def test_what_contradicts_it(self, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
        assert cli.main(["plan", *words]) == BAD_INPUT
        assert said in capsys.readouterr().err
