"""benchmarks/variants.py: who runs when, and what of it is printed. Runs themselves are `moe-dist compare`'s."""

from __future__ import annotations

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
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


def test_a_variant_that_fails_ends_the_comparison(tmp_path, monkeypatch, capfd):
    """Also where it has written its rows, as with one out of tolerance."""

    def ended(command: list[str], **_: Any) -> SimpleNamespace:
        Path(command[command.index("--out") + 1]).write_text('{"rows": []}')
        return SimpleNamespace(returncode=1, stdout=b"a row is out of tolerance")

    monkeypatch.setattr(subprocess, "run", ended)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["variants.py", str(out), f"--variant=old={ROOT}"])
    assert SCRIPT["main"]() == 1
    said = capfd.readouterr().err
    assert "a row is out of tolerance" in said
    assert "old failed; see above" in said
    assert not out.exists()


@pytest.mark.parametrize("text", ["new", "new=/nowhere", f"={ROOT}", f"new={ROOT},engine.layer.X=word"])
def test_what_is_no_variant_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"NAME=TREE|VALUE is a number"):
        SCRIPT["Variant"].of(text)


def test_a_constant_that_is_not_there_is_refused():
    with pytest.raises(SystemExit, match=r"kernels\.triton\.pipeline has no SUM_BLOCKS"):
        SCRIPT["as_rank"]({"kernels.triton.pipeline.SUM_BLOCKS": 1}, [])


def test_a_constant_that_others_have_imported_by_name_is_refused(monkeypatch):
    """They would go on with the old one, and the row would be labelled with the new one. Set in all places it goes."""
    import moe_dist.model.quantization  # has it by name

    monkeypatch.setattr(moe_dist.model.spec, "BLOCK", moe_dist.model.spec.BLOCK)
    with pytest.raises(SystemExit, match=r"model\.spec\.BLOCK has a copy in each of .*model\.quantization\.BLOCK"):
        SCRIPT["as_rank"]({"model.spec.BLOCK": 64}, [])
    assert moe_dist.model.spec.BLOCK == 128
    found = SCRIPT["holders"]("moe_dist.model.spec", "BLOCK")
    started = []
    monkeypatch.setattr(runpy, "run_module", lambda *given, **named: started.append(sys.argv))
    monkeypatch.setattr(sys, "argv", [])
    for name in found:
        place, _, constant = name.rpartition(".")
        monkeypatch.setattr(f"moe_dist.{place}.{constant}", 128)
    SCRIPT["as_rank"]({"model.spec.BLOCK": 128} | dict.fromkeys(found, 128), ["compare"])
    assert started == [["moe-dist", "compare"]]


@pytest.mark.parametrize("text", ['"word"', "null", "[1]"])
def test_a_value_that_is_no_number_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="VALUE is a number"):
        SCRIPT["Variant"].of(f"new={ROOT},engine.layer.X={text}")


@pytest.mark.parametrize(
    ("given", "said"),
    [([f"--variant=a={ROOT}", f"--variant=a={ROOT}"], "--variant: a, a: each needs a name of its own"),
     ([f"--variant=a={ROOT}", "--turns=0"], "--turns 0: at least 1")],
)  # fmt: skip
def test_what_would_compare_nothing_is_refused(given, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["variants.py", str(tmp_path / "out.json"), *given])
    with pytest.raises(SystemExit):
        SCRIPT["main"]()
    assert said in capsys.readouterr().err


def test_cases_that_differ_in_one_key_are_not_mixed():
    common = {"model": "tiny", "placement": "EP2", "exchange": "nvlink", "backend": "torch", "graph": True}
    rows = [
        common | {"tokens_per_rank": 8, "skew": "uniform", "p50_us": us, "token_layout": layout, "layer": "whole"}
        for layout, us in (("sharded", 100.0), ("replicated", 300.0))
    ]
    lines = SCRIPT["table"]([{"variant": "old", "results": {"rows": rows}}], ["old"])
    assert [line.strip() for line in lines if "layout" in line] == ["token_layout sharded", "token_layout replicated"]
    assert ["100.0 µs" in lines[2], "300.0 µs" in lines[5]] == [True, True]
