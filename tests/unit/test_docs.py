"""What docs hold that is made from something else is what that something gives."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def test_the_tables_of_the_docs_are_those_of_the_recorded_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import make_tables

    try:
        assert make_tables.page() == (ROOT / "docs" / "performance.md").read_text(), "run `make docs`"
    finally:
        del sys.modules["make_tables"]


def test_the_whole_model_of_the_readme_is_that_of_the_docs_which_the_tests_run() -> None:
    _, program = re.findall(r"```python\n.*?```", (ROOT / "README.md").read_text(), re.S)
    assert program in (ROOT / "docs" / "integration.md").read_text()
    assert len([line for line in program.splitlines()[1:-1] if line]) <= 11


def test_the_page_of_choices_is_that_of_the_recorded_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import make_choosing

    try:
        assert make_choosing.page() == (ROOT / "docs" / "choosing.md").read_text(), "run `make docs`"
    finally:
        for name in ("make_choosing", "make_tables", "score_auto"):
            del sys.modules[name]


def test_the_figures_of_operations_are_those_of_the_recorded_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import make_operations

    try:
        assert make_operations.page() == (ROOT / "docs" / "operations.md").read_text(), "run `make docs`"
        document = json.loads(make_operations.RECORD.read_text())
    finally:
        del sys.modules["make_operations"]
    faults = document["ray"]["faults"] + document["torchrun"]["faults"]
    assert len(faults) >= 200
    for fault in faults:
        assert fault["wrong"] == [], fault
        if fault["error"]:
            assert fault["named_s"] <= fault["promise_s"], fault


def test_each_line_of_choices_is_what_its_rows_say() -> None:
    """Read without the page's own code."""
    text = (ROOT / "docs" / "choosing.md").read_text().split("## What a rule costs")[0]
    rows: list[dict[str, Any]] = []
    checked = 0
    for line in text.splitlines():
        if found := re.search(r"\[file\]\(\.\./benchmarks/(.*)\)\)", line):
            rows = json.loads((ROOT / "benchmarks" / found[1]).read_text())["rows"]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 6 or not cells[0][:1].isdigit():
            continue
        first, *others = (rows[int(number) - 1] for number in cells[5].split(", "))
        assert cells[1] == f"{first['placement']} `{first['exchange']}` `{first['backend']}`"
        assert cells[2] == f"{first['p50_us']:,.0f}"
        assert {row["tokens_per_rank"] for row in (first, *others)} == {int(cells[0].replace(",", ""))}
        assert len({(row["model"], row["world"], row["skew"], row["graph"]) for row in (first, *others)}) == 1
        for told, row in zip(cells[4].split("; "), others, strict=True):
            assert f" {row['p50_us'] / first['p50_us']:.2f}x" in told
            assert row["p50_us"] >= first["p50_us"]
            scatters = [each.get("scatter_us") for each in (first, row)]
            if None in scatters:
                assert "tie" not in told, "measuring.md: nothing is claimed"
            else:
                explained = max(3 * math.hypot(*scatters), 0.02 * first["p50_us"])
                assert told.endswith(", tie") == (row["p50_us"] - first["p50_us"] <= explained)
        checked += 1
    assert checked > 50


def test_a_cell_that_two_rows_claim_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import make_tables

    row = {"model": "m", "world": 2, "skew": "uniform", "token_layout": "sharded", "graph": True, "placement": "EP2",
           "exchange": "ag_rs", "backend": "torch", "tokens_per_rank": 8, "p50_us": 3.0, "floor_us": 1.0}  # fmt: skip
    other = row | {"exchange": "all_to_all", "p50_us": 2.0}
    lines = make_tables.table([row, other], make_tables.group_of(row), local=False)
    assert lines[-2] == "| 8 | `torch` | 1 | 3 | **2** |"
    with pytest.raises(ValueError, match="several rows for one cell"):
        make_tables.table([row, row], make_tables.group_of(row), local=False)
