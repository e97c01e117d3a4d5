"""benchmarks/exchange_alone.py on two CPU ranks: what it times are steps, and it says what was sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dist.test_torchrun import torchrun

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_run(tmp_path):
    out = tmp_path / "out.json"
    sizes = ["--model", "tiny", "--tokens", "4", "64", "--replicated", "4", "--iters", "3"]
    done = torchrun(str(ROOT / "benchmarks" / "exchange_alone.py"), str(out), *sizes)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["command"].startswith("benchmarks/exchange_alone.py out.json --model tiny")
    rows = found["alone"]
    assert [(row["placement"], row["exchange"], row["tokens_per_rank"]) for row in rows] == [
        (placement, exchange, tokens)
        for placement in ("EP2", "TP2") for exchange in ("ag_rs", "all_to_all") for tokens in (4, 64)
    ]  # fmt: skip
    for row in rows:
        assert row["p50_us"] > 0
        assert row["gbps"] == pytest.approx(row["bytes_sent"] / row["p50_us"] / 1e3)
    sent = {(row["placement"], row["exchange"], row["tokens_per_rank"]): row["bytes_sent"] for row in rows}
    assert sent["EP2", "ag_rs", 64] == 16 * sent["EP2", "ag_rs", 4]
    assert sent["EP2", "all_to_all", 64] <= sent["TP2", "all_to_all", 64]  # where each row goes to each rank
    (beside,) = found["beside"]
    assert (beside["exchange"], beside["global_tokens"]) == ("all_reduce", 4)
    assert min(beside["p50_us"], beside["backend_us"]) > 0
    assert max(map(len, done.stdout.splitlines())) <= 80
