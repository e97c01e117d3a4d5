"""How a choice is scored against an independent run."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from moe_dist.engine.records import Record, Setting, Timed

ROOT = Path(__file__).parent.parent.parent
EP4 = Setting("NVIDIA H200", 256, 512, 16, 2, "swiglu", "fp8_block", 1, 4, "sharded", True)


@pytest.fixture(scope="module")
def script() -> Any:
    spec = spec_from_file_location("score_auto", ROOT / "benchmarks" / "score_auto.py")
    assert spec is not None
    assert spec.loader is not None
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def record(*rows: tuple[int, str, str, float], scatter_us: float = 0.0) -> Record:
    timed = tuple(Timed(size, exchange, backend, "fp8", us, scatter_us) for size, exchange, backend, us in rows)
    return Record("user", "r.json", "2026-11-28", {EP4: timed})


def test_a_choice_costs_what_the_other_run_says(script: Any) -> None:
    chooses = record((8, "ag_rs", "triton", 90.0), (8, "ag_rs", "cutlass", 100.0),
                     (512, "ag_rs", "triton", 200.0), (512, "ag_rs", "cutlass", 100.0))  # fmt: skip
    judges = record((8, "ag_rs", "triton", 110.0), (8, "ag_rs", "cutlass", 100.0),
                    (512, "ag_rs", "triton", 210.0), (512, "ag_rs", "cutlass", 105.0))  # fmt: skip
    found = list(script.scores(script.by_records([chooses]), [judges]))
    assert [(score.tokens_per_rank, score.pair[1], score.loss) for score in found] == [
        (8, "triton", pytest.approx(0.1)), (512, "cutlass", 0.0),
    ]  # fmt: skip
    said = script.summary("auto", found)
    assert (said["cells"], said["within_3_percent"], said["beyond_10_percent"]) == (2, 0.5, 0)
    assert said["worst_loss"] == pytest.approx(0.1)
    triton = list(script.scores(script.by_rule("triton", "cutlass"), [judges]))
    assert [score.loss for score in triton] == [pytest.approx(0.1), pytest.approx(1.0)]


def test_what_lies_within_the_spread_costs_nothing(script: Any) -> None:
    chooses = record((8, "ag_rs", "triton", 90.0), (8, "ag_rs", "cutlass", 100.0))
    judges = record((8, "ag_rs", "triton", 105.0), (8, "ag_rs", "cutlass", 100.0), scatter_us=2.0)
    (score,) = script.scores(script.by_records([chooses]), [judges])
    assert score.loss == 0.0
    (score,) = script.scores(lambda *_: ("nvlink", "triton"), [judges])
    assert score.loss is None
    assert script.summary("x", [score])["unmeasured"] == 1


def test_a_skew_is_scored_on_its_own(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What even routing chose, by the times of another one: the rows of both are in one file, as a sweep writes it."""
    shape = dict(zip(Setting._fields[1:], EP4[1:], strict=True))
    rows = [
        shape | {
            "placement": "EP4", "layer": "whole", "skew": skew, "tokens_per_rank": 8, "exchange": "nvlink",
            "backend": backend, "payload_dtype": "fp8", "p50_us": us, "scatter_us": 0.0, "ok": True,
        }
        for skew, backend, us in (
            ("uniform", "triton", 90.0), ("uniform", "cutlass", 100.0),
            ("zipf:1.2", "triton", 120.0), ("zipf:1.2", "cutlass", 100.0),
        )
    ]  # fmt: skip
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"date": "2026-11-28", "machine": {"gpu": EP4.device}, "rows": rows}))
    assert script.main([str(path), "--", str(path)]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    worst = {each["skew"]: each["worst_loss"] for each in said if each["chosen_by"] == "auto"}
    assert worst == {"uniform": 0.0, "zipf:1.2": pytest.approx(0.2)}
