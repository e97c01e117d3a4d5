"""`moe-dist diff`: which rows of two results files became slower or faster by more than scatter explains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from unit.test_bench import printed

from moe_dist.bench.diff import Diff, compare_results, diff_table, read_results
from moe_dist.commands.cli import main
from moe_dist.errors import ConfigError

ROOT = Path(__file__).parents[2]
ROW = {"model": "m", "placement": "EP2", "exchange": "ag_rs", "backend": "torch", "graph": True, "global_tokens": 64,
       "p50_us": 100.0, "scatter_us": 1.0}  # fmt: skip


def document(*changes: dict[str, Any], **machine: Any) -> dict[str, Any]:
    return {"rows": [ROW | change for change in changes], "machine": {"count": 2, "gpu": "NVIDIA H200"} | machine}


def verdicts(diff: Diff) -> list[str]:
    return [change.verdict for change in diff.changes]


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        ({"p50_us": 104.0}, "same"),  # three times the two rows' 1.4
        ({"p50_us": 105.0}, "slower"),
        ({"p50_us": 95.0}, "faster"),
        ({"p50_us": 105.0, "scatter_us": 2.0}, "same"),
        ({"p50_us": 101.9, "scatter_us": 0.0}, "same"),
    ],
)
def test_what_scatter_explains_is_the_same(new, verdict):
    assert verdicts(compare_results(document({}), document(new))) == [verdict]


def test_of_rows_without_scatter_nothing_is_claimed():
    for changes in ({"scatter_us": None}, {"scatter_us": None, "p50_us": 200.0}):
        assert verdicts(compare_results(document({}), document(changes))) == ["unknown"]


def test_another_draw_of_the_routing_is_no_regression():
    old, new = document({"rows_per_rank": [5, 5]}), document({"rows_per_rank": [9, 1], "p50_us": 200.0})
    found = compare_results(old, new)
    assert verdicts(found) == ["other routing"]
    assert found.slower == 0
    assert verdicts(compare_results(old, document({"p50_us": 200.0}))) == ["slower"]  # which does not say


def test_a_row_out_of_tolerance_is_neither_faster_nor_slower(tmp_path, capsys):
    for name, ok in (("right", True), ("unchecked", None), ("wrong", False)):
        (tmp_path / name).write_text(json.dumps(document({"ok": ok, "p50_us": 100.0 if ok else 50.0})))
    assert main(["diff", str(tmp_path / "right"), str(tmp_path / "unchecked")]) == 0
    assert "1 faster" in capsys.readouterr().out
    assert main(["diff", str(tmp_path / "right"), str(tmp_path / "wrong")]) == 1
    assert "0 faster, 0 same; 1 have wrong numbers" in " ".join(capsys.readouterr().out.split())
    assert main(["diff", str(tmp_path / "wrong"), str(tmp_path / "right"), "--json"]) == 0
    (change,) = json.loads(capsys.readouterr().out)["changes"]
    assert (change["wrong"], change["verdict"]) == (["old"], "wrong numbers")


def test_rows_of_other_splits_are_never_compared():
    """Older files say nothing of splits; all of their rows are even."""
    ragged = {"token_split": "ragged", "p50_us": 200.0}
    found = compare_results(document({}), document({"token_split": "even"}, ragged))
    assert (verdicts(found), found.alone) == (["same"], 1)
    with pytest.raises(ConfigError, match="no configuration has times in both"):
        compare_results(document({}), document(ragged))


def test_rows_meet_whatever_their_order_and_untimed_ones_do_not_count():
    old = document({"exchange": "ag_rs"}, {"exchange": "all_to_all", "p50_us": 50.0}, {"exchange": "nvlink"})
    new = document({"exchange": "all_to_all", "p50_us": 60.0}, {"exchange": "ag_rs"}, {"exchange": "x", "p50_us": None})
    found = compare_results(old, new)
    assert {change.label: change.verdict for change in found.changes} == {"ag_rs": "same", "all_to_all": "slower"}
    assert (found.alone, found.slower) == (1, 1)
    lines = printed(diff_table(found)).splitlines()
    assert lines[-1].split() == ["all_to_all", "50", "60", "1.200", "slower"]
    assert len(printed(diff_table(found, everything=True)).splitlines()) == len(lines) + 1


def test_other_machines_are_told():
    assert compare_results(document({}), document({})).machines == ()
    other = compare_results(document({}), document({}, gpu="NVIDIA H100"))
    assert other.machines == ("2 x NVIDIA H200", "2 x NVIDIA H100")


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        (document({}, {}), document({}), "several rows of one configuration"),
        (document({}), document({"exchange": "other"}), "no configuration has times in both"),
        (document({}), document({"p50_us": None}), "no configuration has times in both"),
    ],
)
def test_what_can_not_be_compared_is_refused(old, new, rule):
    with pytest.raises(ConfigError, match=rule):
        compare_results(old, new)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": 3}', '{"rows": [3]}'])
def test_files_without_results_are_refused(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"file\.json"):
        read_results(str(path))
    with pytest.raises(ConfigError, match="can't be read"):
        read_results(str(tmp_path / "none.json"))


@pytest.mark.parametrize("value", ['"x"', "0", "-1", "NaN", "Infinity", "true", "[]", "9" * 400])
@pytest.mark.parametrize("key", ["p50_us", "scatter_us"])
def test_a_time_that_is_none_is_refused(tmp_path, key, value):
    path = tmp_path / "file.json"
    path.write_text(f'{{"rows": [{{}}, {{"p50_us": 1, "{key}": {value}}}]}}')
    if (key, value) == ("scatter_us", "0"):
        assert read_results(str(path))["rows"][1] == {"p50_us": 1, "scatter_us": 0}
        return
    with pytest.raises(ConfigError, match=rf"file\.json: rows\.1\.{key} = .* \(legal: ") as raised:
        read_results(str(path))
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"rows": [{"model": "a", "p50_us": 1}]}', 0),
        ('{"rows": [{"placement": [], "global_tokens": "x", "p50_us": 1}], "machine": {}}', 0),
        ('{"rows": [{"p50_us": 1}], "machine": [1]}', 2),
        ("[" * 100_000, 2),
    ],
)
def test_files_that_somebody_has_edited(tmp_path, capsys, text, code):
    path = tmp_path / "file.json"
    path.write_text(text)
    assert main(["diff", "--wide", str(path), str(path)]) == code
    assert ("file.json" in capsys.readouterr().err) == (code == 2)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # paths of tests are long
    for name, change in (("old", {}), ("new", {"p50_us": 120.0})):
        about = {"date": "2026-11-27T21:13:12Z", "commit": "1a2b3c4"} if name == "old" else {}
        (tmp_path / f"{name}.json").write_text(json.dumps(document(change) | about))
    old, new = str(tmp_path / "old.json"), str(tmp_path / "new.json")
    assert main(["diff", old, new]) == 7
    said = capsys.readouterr().out
    assert said.splitlines()[:2] == [
        f"old: {old}, 2026-11-27T21:13:12Z, commit 1a2b3c4, 2 x NVIDIA H200",
        f"new: {new}, not recorded, commit not recorded, 2 x NVIDIA H200",
    ]
    assert "1 rows: 1 slower, 0 faster, 0 same." in said
    assert main(["diff", new, old]) == 0
    assert main(["diff", old, old, "--json"]) == 0
    printed_json = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed_json["changes"][0]["verdict"] == "same"
    assert printed_json["old"] == printed_json["new"] == {
        "file": old, "date": "2026-11-27T21:13:12Z", "commit": "1a2b3c4", "machine": "2 x NVIDIA H200",
    }  # fmt: skip
    assert main(["diff", old, str(tmp_path)]) == 2


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*h200x*.json")), ids=lambda path: path.name)
def test_recorded_files_are_like_themselves(path):
    found = compare_results(read_results(str(path)), read_results(str(path)))
    assert found.slower == found.alone == 0
