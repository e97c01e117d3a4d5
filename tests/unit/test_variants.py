"""benchmarks/variants.py: who runs when, and what of it is printed. Runs themselves are `moe-dist compare`'s."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "variants.py"))
TIMES = {"old": iter([100.0, 104.0]), "new": iter([90.0, 92.0])}


def results(variant: str) -> dict[str, Any]:
    case = {"model": "tiny", "placement": "EP2", "exchange": "ag_rs", "backend": "torch", "graph": False}
    return {"rows": [case | {"tokens_per_rank": 8, "skew": "uniform", "p50_us": next(TIMES[variant])}]}


def test_variants_take_turns_forwards_and_backwards(tmp_path, monkeypatch, capsys):
    started = []

    def run(variant: Any, ranks: int, arguments: list[str]) -> dict[str, Any]:
        started.append((variant.name, variant.settings, ranks, arguments))
        return results(variant.name)

    monkeypatch.setitem(SCRIPT["main"].__globals__, "run", run)
    out = tmp_path / "out.json"
    variants = [f"--variant=old={ROOT}", f"--variant=new={ROOT},engine.layer.SOMETHING=3"]
    monkeypatch.setattr(sys, "argv", ["variants.py", str(out), *variants, "--ranks", "2", "--", "tokens=[16]"])
    assert SCRIPT["main"]() == 0
    old, new = ("old", {}, 2, ["tokens=[16]"]), ("new", {"engine.layer.SOMETHING": 3}, 2, ["tokens=[16]"])
    assert started == [old, new, new, old]
    assert [each["variant"] for each in json.loads(out.read_text())["runs"]] == ["old", "new", "new", "old"]
    printed = capsys.readouterr().out
    assert "102.0 µs" in printed
    assert "-11.0 µs  -10.8%" in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize("text", ["new", "new=/nowhere", f"={ROOT}", f"new={ROOT},engine.layer.X=word"])
def test_what_is_no_variant_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"NAME=TREE|VALUE is a number"):
        SCRIPT["Variant"].of(text)


def test_a_constant_that_is_not_there_is_refused():
    with pytest.raises(SystemExit, match=r"kernels\.triton\.pipeline has no SUM_BLOCKS"):
        SCRIPT["as_rank"]({"kernels.triton.pipeline.SUM_BLOCKS": 1}, [])
