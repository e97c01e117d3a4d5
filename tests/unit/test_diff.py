"""`moe-dist diff`: which rows of two results files became slower or faster by more than scatter explains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from unit.test_bench import printed

from moe_dist.bench.case import Case
from moe_dist.bench.diff import Diff, Missing, compare_results, diff_table, read_results
from moe_dist.commands.cli import main
from moe_dist.errors import ConfigError
from moe_dist.model.spec import MoESpec, ParallelSpec, WorkloadSpec

ROOT = Path(__file__).parents[2]
ROW = {"model": "m", "placement": "EP2", "exchange": "ag_rs", "backend": "torch", "graph": True, "global_tokens": 64,
       "p50_us": 100.0, "scatter_us": 1.0}  # fmt: skip

SMALL = {"hidden": 128, "intermediate": 128, "num_experts": 4, "top_k": 2}


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
    assert "0 faster, 0 same; 1 has wrong numbers" in " ".join(capsys.readouterr().out.split())
    assert main(["diff", str(tmp_path / "wrong"), str(tmp_path / "right"), "--json"]) == 0
    (change,) = json.loads(capsys.readouterr().out)["changes"]
    assert (change["wrong"], change["verdict"]) == (["old"], "wrong numbers")


def test_rows_of_other_splits_are_never_compared():
    """Older files say nothing of splits; all of their rows are even."""
    ragged = {"token_split": "ragged", "p50_us": 200.0}
    found = compare_results(document({}), document({"token_split": "even"}, ragged))
    assert (verdicts(found), found.added) == (["same"], 1)
    with pytest.raises(ConfigError, match="no configuration has times in both"):
        compare_results(document({}), document(ragged))


def test_rows_meet_whatever_their_order_and_untimed_ones_do_not_count():
    old = document({"exchange": "ag_rs"}, {"exchange": "all_to_all", "p50_us": 50.0}, {"exchange": "nvlink"})
    new = document({"exchange": "all_to_all", "p50_us": 60.0}, {"exchange": "ag_rs"}, {"exchange": "x", "p50_us": None})
    found = compare_results(old, new)
    assert {change.label: change.verdict for change in found.changes} == {"ag_rs": "same", "all_to_all": "slower"}
    assert (found.added, found.slower) == (0, 1)
    assert found.missing == [Missing("nvlink", None)]
    lines = printed(diff_table(found)).splitlines()
    assert lines[-1].split() == ["all_to_all", "50", "60", "1.200", "slower"]
    assert len(printed(diff_table(found, everything=True)).splitlines()) == len(lines) + 1


WHOLE = {"token_layout": "sharded", "token_split": "even", "skew": "zipf:1.2", "layer": "whole", "key": "a"}


@pytest.mark.parametrize(
    ("kind", "entry", "row"),
    [
        ("failed", {"key": "a", "case": "however it is called"}, {}),
        ("failed", {"key": "b", "case": "m EP2 nvlink torch 64 sharded tokens zipf:1.2 graph"}, {}),
        ("refused", {"case": "m EP2 auto auto 64 sharded tokens ragged zipf:1.2 graph"}, {"token_split": "ragged"}),
        ("refused", {"case": "m EP2 nvlink torch 64 sharded tokens file:/a b/c.npz eager"},
         {"skew": "file:0123456789ab", "graph": False}),
        ("refused", {"case": "m EP2 nvlink torch 64 sharded tokens zipf:1.2 graph × 4 layers"}, {"layer": "stack:4"}),
    ],
)  # fmt: skip
def test_a_row_that_failed_or_was_refused_is_told_with_its_reason(kind, entry, row):
    old, new = document(WHOLE | {"key": "c"}, WHOLE | {"exchange": "nvlink"} | row), document(WHOLE)
    others = {"case": "m EP2 other torch 64 sharded tokens zipf:1.2 graph", "reason": "another"}
    found = compare_results(old, new | {kind: [others, entry | {"reason": "too\nlong"}, None]})
    (missing,) = found.missing
    assert (missing.listed, missing.reason, found.added) == (kind, "too\\nlong", 0)
    assert compare_results(old, new | {kind: [others]}).missing[0].listed is None


def test_rows_of_our_own_cases_are_found_by_their_label():
    """What `_case` makes of a row is what `Case.label` makes of its case."""
    work = {"tokens": 64, "token_layout": "sharded", "token_split": "ragged", "skew": "zipf:1.2"}
    case = Case(model=MoESpec(**SMALL), parallel=ParallelSpec(ep=2), exchange="ag_rs", backend="torch", layers=3,
                workload=WorkloadSpec(**work))  # fmt: skip
    row = ROW | WHOLE | {"model": case.model.name, "graph": False, "layer": "stack:3", "token_split": "ragged"}
    other = row | {"exchange": "all_reduce"}
    new = {"rows": [other], "failed": [{"key": "b", "case": case.label, "reason": "it hung"}]}
    assert [row.listed for row in compare_results({"rows": [row, other]}, new).missing] == ["failed"]


@pytest.mark.parametrize(
    ("rows", "more", "code", "said"),
    [
        ([{}], {}, 8, "1 row of both: 0 slower, 0 faster, 1 same; 1 of old's 2 rows is missing in new."),
        ([{}, {"exchange": "nvlink", "p50_us": None}], {}, 8, "is missing in new (1 not timed there)."),
        ([{"p50_us": 200.0}], {}, 7, "1 of old's 2 rows is missing in new."),
        ([{"ok": False}], {}, 1, "1 of old's 2 rows is missing in new."),
        ([{}, {"exchange": "nvlink"}, {"exchange": "x"}], {}, 0, "2 same; 1 is in new only."),
        ([], {"failed": [WHOLE | {"reason": "no memory"}]}, 8, "0 rows of both: 0 slower, 0 faster, 0 same; 2 of old's"
         " 2 rows are missing in new (1 failed there)."),
    ],
)  # fmt: skip
def test_a_row_that_is_gone_is_no_success(tmp_path, capsys, monkeypatch, rows, more, code, said):
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "old").write_text(json.dumps(document({}, {"exchange": "nvlink", "key": "a"})))
    (tmp_path / "new").write_text(json.dumps(document(*rows) | more))
    files = [str(tmp_path / "old"), str(tmp_path / "new")]
    assert main(["diff", *files]) == code
    out = capsys.readouterr().out
    assert said in out
    assert ("only in old" in out) == ("missing" in said)
    assert main(["diff", *files, "--json"]) == code
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["missing"]) == (2 if not rows else "missing" in said)
    assert found["added"] == ("in new only" in said)


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
    assert "1 row of both: 1 slower, 0 faster, 0 same." in said
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
    assert (found.slower, found.missing, found.added) == (0, [], 0)
