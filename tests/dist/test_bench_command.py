"""`bench` and `--profile` on ranks, as a user calls them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from dist.test_torchrun import torchrun

from moe_dist.bench.phases import BenchResult
from moe_dist.bench.row import Document
from moe_dist.commands.cli import main

pytestmark = pytest.mark.usefixtures("local_ray")

SMALL = ["model.hidden=128", "model.intermediate=256", "model.num_experts=4", "model.top_k=2"]
SIZES = ["--batch-size", "1", "3", "--input-len", "6", "--output-len", "100", "--chunked-prefill-size", "6"]
EP2 = ["--ep", "2", "--device", "cpu"]


def ranges(path: Path) -> list[dict[str, Any]]:
    """Those that were recorded by name in a trace that a viewer would load."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    return [event for event in events if event.get("cat") == "user_annotation"]


def inside(found: list[dict[str, Any]], name: str) -> bool:
    """Whether every range of this name lies within a step."""
    steps = [(each["ts"], each["ts"] + each["dur"]) for each in found if each["name"].startswith("ProfilerStep#")]
    named = [(each["ts"], each["ts"] + each["dur"]) for each in found if each["name"] == name]
    return bool(named) and all(any(a <= begin and end <= b for a, b in steps) for begin, end in named)


def test_a_batch_with_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    traced = ["--profile", "--profile-steps", "2", "--result-filename", "r.jsonl", "--json"]
    assert main(["bench", *EP2, *SIZES, *SMALL, "--layers", "5", "--iters", "6", *traced]) == 0
    document = json.loads(capsys.readouterr().out)
    results = [BenchResult.model_validate_json(json.dumps(each)) for each in document.pop("bench")]
    rows = Document.model_validate_json(json.dumps(document)).rows
    assert sorted(row.global_tokens for row in rows) == [1, 3, 6]
    for row in rows:
        assert (row.layer, row.iters, row.ok, row.placement) == ("stack:4", 6, True, "EP2")
    p50_s = {row.global_tokens: (row.p50_us or 0.0) / 1e6 for row in rows}
    assert [BenchResult.model_validate_json(line) for line in Path("r.jsonl").read_text().splitlines()] == results
    one, three = results
    assert one.ok
    assert three.ok
    assert one.ttft == pytest.approx(5 / 4 * p50_s[6])
    assert three.ttft == pytest.approx(5 / 4 * 3 * p50_s[6])  # 18 tokens in three chunks
    assert three.latency == pytest.approx(three.ttft + 5 / 4 * 100 * p50_s[3])
    traces = sorted(path.name for path in Path("r-profile").iterdir())
    assert traces == sorted(
        f"EP2-{phase}-{tokens}tokens-eager-rank{rank}.trace.json.gz"
        for phase, sizes in (("prefill", (6,)), ("decode", (1, 3)))
        for tokens in sizes
        for rank in range(2)
    )
    for row in rows:
        for path in Path("r-profile").glob(f"*-{row.global_tokens}tokens-*"):
            found = ranges(path)
            assert sum(each["name"].startswith("ProfilerStep#") for each in found) == 2
            for stage in (name for name, time_us in row.stages_us.items() if time_us):
                assert inside(found, stage), (path.name, stage)
    assert main(["bench", *EP2, *SIZES, *SMALL, "--profile", "--profile-output-dir", "r-profile"]) == 2
    assert "holds files already, and none is overwritten" in capsys.readouterr().err


@pytest.mark.slow  # under Ray it is above
def test_a_run_s_profile_under_torchrun(tmp_path: Path) -> None:
    arguments = ["run", "--runtime", "torchrun", *EP2, "--tokens", "16", "--iters", "3", *SMALL]
    done = torchrun("-m", "moe_dist", *arguments, "--profile", "--profile-output-dir", str(tmp_path / "traces"))
    assert done.returncode == 0, done.stderr
    assert f"traces: {tmp_path}/traces/*.trace.json.gz" in done.stdout
    paths = sorted((tmp_path / "traces").iterdir())
    assert [path.name for path in paths] == [f"EP2-step-16tokens-eager-rank{rank}.trace.json.gz" for rank in range(2)]
    for path in paths:
        found = ranges(path)
        assert sum(each["name"].startswith("ProfilerStep#") for each in found) == 3
        for stage in ("dispatch", "quantize", "gemm1", "activation", "gemm2", "combine"):
            assert inside(found, stage), (path.name, stage)
