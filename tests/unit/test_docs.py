"""What docs hold that is made from something else is what that something gives."""

from __future__ import annotations

import re
import sys
from pathlib import Path

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
