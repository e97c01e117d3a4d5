"""`moe-dist report`: what it says of rows, which rows it lets win, and what a file from outside can't do."""

from __future__ import annotations

import csv
import json
import re
import time
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from reports import RECORDED, ROOT, document, evil, many, rows_of, written

from moe_dist.bench.answer import answers
from moe_dist.commands.cli import main
from moe_dist.errors import ConfigError
from moe_dist.exits.exit_codes import BAD_INPUT, OK
from moe_dist.report.findings import Setup, backends_beside_each_other, setups, skews_beside_each_other, told
from moe_dist.report.formats import csv_text, is_report, markdown
from moe_dist.report.page import page
from moe_dist.report.recorded import NEEDED, read_files
from moe_dist.report.svg import Scale
from moe_dist.report.tables import skews
from moe_dist.report.words import beside, phase, summary, verdict


def read(folder: Path, content: Any, name: str = "file.json") -> list[Setup]:
    (file,) = read_files([written(folder, name, content)])
    return setups(file)


def data_of(text: str) -> dict[str, Any]:
    """The rows that a page has in it, by key."""
    found = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    return {key: column if isinstance(column, list) else [column["of"][place] for place in column["at"]]
            for key, column in found["values"].items()}  # fmt: skip


class TestAnswers:
    def test_are_those_of_compare(self):
        for file in read_files([str(path) for path in RECORDED if "local" not in path.name]):
            for graph in (True, False):
                wanted = answers(row for row in file.rows if row.graph is graph)
                found = [answer for setup in setups(file) if setup.first.graph is graph for answer in setup.answers]
                assert sorted(map(str, found)) == sorted(map(str, wanted))

    def test_have_their_numbers(self, tmp_path):
        (setup,) = read(tmp_path, document(rows_of([100.0, 500.0], [120.0, 400.0])))
        said = [" ".join(verdict(answer)) for answer in setup.ends]
        assert said == [
            "TP2 ag_rs torch is fastest: 100 µs (2.00 × floor). EP2 ag_rs torch takes 120 µs (2.00 × floor), 1.20 "
            "times as long.",
            "EP2 ag_rs torch is fastest: 400 µs (2.00 × floor). TP2 ag_rs torch takes 500 µs (2.00 × floor), 1.25 "
            "times as long.",
        ]
        assert [phase(answer.best[0]) for answer in setup.ends] == ["Decode", "Step"]

    def test_claim_nothing_where_scatter_explains_a_difference_or_is_not_known(self, tmp_path):
        (setup,) = read(tmp_path, document(rows_of([100.0], [101.0])))
        assert verdict(setup.answers[0])[0] == "A tie: scatter explains the difference."
        assert beside(setup.answers[0].best) == ["tie", "1.01x, tie"]
        rows = rows_of([100.0], [300.0])
        for row in rows:
            del row["scatter_us"]
        (setup,) = read(tmp_path, document(rows))
        assert verdict(setup.answers[0])[0].startswith("No winner is claimed")
        assert beside(setup.answers[0].best) == ["fastest, not claimed", "3.00x, not claimed"]
        assert summary([setup]).startswith("Verdict: 1 comparison: nothing claimed in 1. Nothing is claimed where")

    @pytest.mark.parametrize("ok", [False, None])
    def test_rows_that_failed_or_were_not_checked_never_win(self, tmp_path, ok):
        rows = rows_of([100.0], [120.0])
        flawed = rows[0] | {"p50_us": 1.0, "backend": "wrong", "ok": ok}
        (setup,) = read(tmp_path, document([*rows, flawed]))
        assert [row.backend for row in setup.answers[0].best] == ["torch", "torch"]
        text = page(read_files([str(tmp_path / "file.json")]))
        answer = text[text.index('id="answer"') : text.index('id="charts"')]
        assert "wrong" not in answer
        assert data_of(text)["best_of_placement"] == ["fastest", "1.20x", None]
        assert ("NO: out of tolerance" if ok is False else "unchecked") in text[text.index('id="files"') :]

    @pytest.mark.parametrize(
        ("key", "value"),
        [("model", "other"), ("source", "random:1"), ("quant", "bf16"), ("token_layout", "replicated"),
         ("skew", "zipf:1.2"), ("seed", 1), ("graph", False), ("layer", "stack:2"), ("global_tokens", 65),
         ("hidden", 16), ("shared_experts", "tp")],
    )  # fmt: skip
    def test_rows_that_differ_are_not_compared(self, tmp_path, key, value):
        tp, ep = rows_of([100.0], [120.0])
        found = read(tmp_path, document([tp, ep | {key: value}]))
        assert [answer for setup in found for answer in setup.answers] == []
        assert "nothing to compare" in summary(found)

    def test_rows_of_two_files_are_not_compared(self, tmp_path):
        tp, ep = rows_of([100.0], [120.0])
        paths = [written(tmp_path, f"{name}.json", document([row])) for name, row in (("a", tp), ("b", ep))]
        assert [setup.answers for file in read_files(paths) for setup in setups(file)] == [[], []]

    def test_shares_of_a_layer_stand_for_no_placement(self, tmp_path):
        (setup,) = read(tmp_path, document(rows_of([100.0], [120.0], layer="local")))
        assert setup.answers == []
        assert setup.best == {}
        assert "one rank's share of a layer" in summary([setup])

    def test_eager_steps_are_told_where_no_graph_of_the_same_is(self, tmp_path):
        graph, eager = rows_of([100.0], [120.0]), rows_of([100.0], [120.0], graph=False)
        other = rows_of([100.0], [120.0], graph=False, skew="zipf:1.2")
        found = told(read(tmp_path, document([*eager, *graph, *other])))
        assert [(setup.first.graph, setup.first.skew) for setup in found] == [(True, "uniform"), (False, "zipf:1.2")]

    def test_routings_beside_each_other_start_with_a_valid_row(self, tmp_path):
        rows = [row for skew, us, ok in (("uniform", 50.0, False), ("zipf:1.2", 200.0, True), ("hot:2", 100.0, True))
                for row in rows_of([us], [us], skew=skew, ok=ok)[:1]]  # fmt: skip
        (file,) = read_files([written(tmp_path, "file.json", document(rows))])
        (found,) = skews_beside_each_other(file)
        assert [row.skew for row in found] == ["zipf:1.2", "hot:2", "uniform"]
        assert [line[-1] for line in skews([file]).lines] == ["1.00x", "0.50x", "0.25x, NO: out of tolerance"]

    def test_backends_beside_each_other_name_the_fastest_valid_one(self, tmp_path):
        (first, _) = rows_of([1.0], [1.0])
        times = (("a", 90.0, None), ("b", 100.0, True), ("c", 150.0, True))
        rows = [first | {"backend": name, "p50_us": us, "ok": ok} for name, us, ok in times]
        (setup,) = read(tmp_path, document(rows))
        (found,) = backends_beside_each_other(setup)
        assert list(zip([row.backend for row in found], beside(found), strict=True)) == [
            ("b", "fastest"), ("c", "1.50x"), ("a", "unchecked")]  # fmt: skip

    def test_a_cpu_says_nothing_about_gpus(self, tmp_path):
        content = document(rows_of([100.0], [120.0]))
        content["machine"] |= {"gpu": None, "cpu": "a test's CPU"}
        assert "CPU times say nothing about GPUs." in summary(read(tmp_path, content))

    def test_crossings_are_between_steps_and_decided_only_where_neither_is_a_tie(self, tmp_path):
        (setup,) = read(tmp_path, document(rows_of([100.0, 400.0], [200.0, 200.0])))
        (crossing,) = setup.crossings
        assert crossing.between == (64, 1024)
        assert crossing.tokens == pytest.approx(256)  # half-way between logarithms, 2x on either side
        assert crossing.decided
        (setup,) = read(tmp_path, document(rows_of([199.0, 400.0], [200.0, 200.0])))
        assert [crossing.decided for crossing in setup.crossings] == [False]
        (setup,) = read(tmp_path, document(rows_of([100.0, 100.0], [200.0, 200.0])))
        assert setup.crossings == []

    def test_lines_cross_in_a_step_that_takes_both_equally_long(self, tmp_path):
        (setup,) = read(tmp_path, document(rows_of([100.0, 200.0, 300.0], [150.0, 200.0, 200.0])))
        (crossing,) = setup.crossings
        assert crossing.tokens == pytest.approx(1024)
        assert (crossing.between, crossing.decided) == ((64, 16384), False)
        for times in ([100.0, 200.0, 150.0], [200.0, 100.0], [100.0, 200.0]):  # they touch there, or at an end
            (setup,) = read(tmp_path, document(rows_of(times, [150.0, 200.0, 200.0][: len(times)])))
            assert len(setup.crossings) == (times == [200.0, 100.0])


class TestFiles:
    @pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
    def test_recorded_ones_say_what_they_lack(self, path):
        text = page(read_files([str(path)]))
        keys = {key for row in json.loads(path.read_text())["rows"] for key in row}
        data = data_of(text)
        for key in ("unstaged_us", "scatter_us", "not_finite", "tokens_per_rank"):
            assert (set(map(str, data[key])) == {"not recorded"}) == (key not in keys), key
        if "scatter_us" not in keys:
            assert "fastest" not in {answer for answer in data["best_of_placement"] if answer}

    @pytest.mark.parametrize(
        ("content", "rule"),
        [
            ("", "is no JSON"),
            ("[1]", "holds no rows"),
            ('{"rows": 3}', "rows = 3: is no list of rows"),
            ('{"what": "tests/gpu"}', "holds no rows"),
            ("[" * 100_000, "nested too deeply|is no JSON"),
            (document([]), "has no row"),
            (document([{"model": "m"}]), r"rows\.0\.quant = None: is missing"),
            (document(rows_of([1.0], [1.0], floor_us=None), refused=[{"case": 1}]), r"refused\.0\.case"),
            (document(rows_of([1.0], [1.0]), notices="said"), "notices"),
        ],
    )
    def test_others_are_refused_by_name(self, tmp_path, content, rule):
        with pytest.raises(ConfigError, match=rf"(?s)bad\.json.*{rule}|{rule}.*bad\.json"):
            read_files([written(tmp_path, "bad.json", content)])

    @pytest.mark.parametrize(
        ("key", "value"),
        [("p50_us", "fast"), ("p50_us", 0.0), ("p50_us", -1.0), ("floor_us", 1e-300), ("hidden", 10**4000), ("tp", 0),
         ("graph", 1), ("stages_us", {"gemm1": "1"}), ("stages_us", {"gemm1": 1e300}), ("token_layout", "striped"),
         ("model", None), ("p50_us", float("nan")), ("rows_per_rank", [-1])],
    )  # fmt: skip
    def test_values_that_no_row_has_are_refused_by_key(self, tmp_path, key, value):
        tp, ep = rows_of([100.0], [120.0])
        path = written(tmp_path, "bad.json", document([tp, ep | {key: value}]))
        with pytest.raises(ConfigError, match=rf"bad\.json.*rows\.1\.{key}.*\(legal: ") as caught:
            read_files([path])
        assert "Input should" not in str(caught.value)  # pydantic's words say neither a rule nor what is legal

    @pytest.mark.parametrize("key", NEEDED)
    def test_a_key_without_which_nothing_is_compared(self, tmp_path, key):
        row, _ = rows_of([100.0], [120.0])
        del row[key]
        with pytest.raises(ConfigError, match=rf"rows\.0\.{key} = None: is missing"):
            read_files([written(tmp_path, "bad.json", document([row]))])

    def test_the_same_one_twice(self, tmp_path):
        path = written(tmp_path, "file.json", document(rows_of([1.0], [1.0])))
        with pytest.raises(ConfigError, match="is named twice"):
            read_files([path, str(tmp_path / "." / "file.json")])

    def test_what_is_said_of_them(self, tmp_path):
        refused = [{"case": "TP8", "reason": "no such world"}, {"case": "EP8", "reason": "no such world"}]
        content = document(rows_of([1.0], [2.0]), refused=refused, note="by hand",
                           notices=[{"text": "tuned elsewhere", "ranks": [0, 1]}])  # fmt: skip
        content["machine"].pop("triton")
        files = read_files([written(tmp_path, "file.json", content)])
        for text in (page(files), markdown(files)):
            for said in ("2 × NVIDIA H200", "triton not recorded", "flashinfer none", "driver 580.1", "abc1234",
                         "moe-dist compare", "2026-11-27T10:00:00Z", "no such world", "TP8", "by hand",
                         "rank 0, 1: tuned elsewhere", "2 cases refused"):  # fmt: skip
                assert said in text, said

    def test_all_recorded_files_make_a_report_and_those_without_rows_are_named(self, tmp_path, capsys):
        paths = sorted(map(str, (ROOT / "benchmarks").glob("*.json")))
        assert main(["report", *paths, "--out", str(tmp_path / "all.html")]) == OK
        out, err = capsys.readouterr()
        assert f"rows of {len(RECORDED)} files" in out
        left_out = err.splitlines()
        assert "2026-11-27-gpu-tests.json is left out: it holds no rows of results" in left_out[0]
        assert len(paths) == len(RECORDED) + len(left_out)

    def test_files_without_rows_alone_are_an_error(self, tmp_path, capsys):
        paths = [written(tmp_path, f"{name}.json", content) for name, content in (("a", document([])), ("b", "{}"))]
        assert main(["report", *paths, "--out", str(tmp_path / "none.html")]) == BAD_INPUT
        assert re.search(r"file = \['.*a\.json', '.*b\.json'\]: hold no rows of results \(legal: ",
                         capsys.readouterr().err)  # fmt: skip
        assert not (tmp_path / "none.html").exists()


class Elements(HTMLParser):
    """Every element and attribute of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


@pytest.mark.parametrize("low", [1.0, 1.03, 1.3, 1.9, 4.4, 9.2, 470.0])
@pytest.mark.parametrize("times", [1.26, 2.0, 7.0, 300.0, 1e9])
def test_every_axis_has_numbers(low, times):
    ticks = Scale(low, low * times, 0.0, 100.0).ticks()
    assert 1 <= len(ticks) <= 6
    assert ticks == sorted(set(ticks))


class TestPage:
    def test_text_of_a_file_is_text(self, tmp_path):
        text = page(read_files([evil(tmp_path)]))
        harmless = page(read_files([written(tmp_path, "file.json", document(rows_of([100.0], [120.0])))]))
        found, wanted = Elements(text), Elements(harmless)
        assert found.names.count("script") == wanted.names.count("script") == 2
        assert set(found.names) <= set(wanted.names) | {"details", "summary"}
        assert not [name for name, _ in found.attributes if name.startswith("on")]
        assert "\u2028" not in text
        assert "alert(1)" in data_of(text)["model"][0]

    def test_markdown_and_csv_obey_no_text_either(self, tmp_path):
        files = read_files([evil(tmp_path)])
        assert "<script" not in markdown(files)
        assert "<img" not in markdown(files)
        rows = rows_of([100.0], [120.0], model="=1+1")
        (line, *_) = csv.DictReader(StringIO(csv_text(read_files([written(tmp_path, "file.json", document(rows))]))))
        assert line["model"] == "'=1+1"

    def test_asks_nothing_of_any_network(self):
        text = page(read_files(list(map(str, RECORDED))))
        assert not re.search(r"(?i)(https?:|//[a-z]|@import|url\()", re.sub(r"(?m)^\s*//.*$|  // .*$", "", text))
        found = Elements(text)
        addresses = [value for name, value in found.attributes if name in ("src", "href", "action", "xlink:href")]
        assert all(value.startswith("#") for value in addresses)
        assert not {"link", "img", "iframe", "object", "embed"} & set(found.names)

    def test_its_policy_lets_nothing_else_run(self, tmp_path):
        text = page(read_files([evil(tmp_path)]))
        policy = dict(Elements(text).attributes)  # the last `content` is of color-scheme
        assert "default-src 'none'; script-src 'sha256-" in text
        assert "unsafe" not in text.split("<style>")[0]
        assert policy["charset"] == "utf-8"

    def test_every_row_is_in_its_table_and_its_data(self):
        files = read_files(list(map(str, RECORDED)))
        text, count = page(files), sum(len(file.rows) for file in files)
        table = text[text.index('<table id="all">') : text.index('<section id="files">')]
        assert table.count("<tr") == count + 1
        assert {len(column) for column in data_of(text).values()} == {count}

    def test_ten_thousand_rows(self, tmp_path):
        path = written(tmp_path, "many.json", many(10_000))
        start = time.process_time()
        text = page(read_files([path]))
        assert time.process_time() - start < 10  # 4 on one core
        assert len(text.encode()) < 15e6


class TestCommand:
    def test_the_page(self, tmp_path, capsys):
        path, out = written(tmp_path, "file.json", document(rows_of([100.0], [120.0]))), tmp_path / "new" / "page.html"
        assert main(["report", path, "--out", str(out)]) == 0
        assert "2 rows of 1 file" in capsys.readouterr().out
        assert is_report(out.read_text())
        assert main(["report", path, "--out", str(out)]) == 0
        assert "is overwritten: it holds an earlier report" in capsys.readouterr().err

    def test_where_the_page_goes_without_a_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main(["report", written(tmp_path, "file.json", document(rows_of([100.0], [120.0])))]) == 0
        assert is_report((tmp_path / "report.html").read_text())

    @pytest.mark.parametrize("name", ["markdown", "csv"])
    def test_other_formats_go_to_standard_output(self, tmp_path, capsys, name):
        path = written(tmp_path, "file.json", document(rows_of([100.0], [120.0])))
        assert main(["report", path, "--format", name]) == 0
        text = capsys.readouterr().out
        assert is_report(text)
        out = tmp_path / "report"
        for _ in range(2):
            assert main(["report", path, "--format", name, "--out", str(out)]) == 0
            assert out.read_text() == text

    @pytest.mark.parametrize("content", ["a letter", '{"rows": []}', "<!doctype html><title>another page</title>"])
    def test_nothing_else_is_overwritten(self, tmp_path, capsys, content):
        path = written(tmp_path, "file.json", document(rows_of([100.0], [120.0])))
        out = Path(written(tmp_path, "other", content))
        assert main(["report", path, "--out", str(out)]) == 2
        assert "is no report of moe-dist" in capsys.readouterr().err
        assert out.read_text() == content

    def test_nor_is_what_it_reads(self, tmp_path, capsys):
        path = written(tmp_path, "file.json", document(rows_of([100.0], [120.0])))
        before = Path(path).read_text()
        assert main(["report", path, "--out", path]) == 2
        assert "which this command reads" in capsys.readouterr().err
        assert Path(path).read_text() == before

    @pytest.mark.parametrize("arguments", [[], ["none.json"], ["x.json", "--format", "pdf"]])
    def test_bad_input(self, arguments, capsys):
        assert main(["report", *arguments]) == 2
        assert "Traceback" not in capsys.readouterr().err


class TestCsv:
    def test_has_every_row_and_every_refused_case(self, tmp_path):
        rows = rows_of([100.0, 300.0], [120.0, 200.0])
        del rows[0]["config"]
        content = document(rows, refused=[{"case": "TP8", "reason": "no room"}])
        lines = list(csv.DictReader(StringIO(csv_text(read_files([written(tmp_path, "file.json", content)])))))
        assert [line["best_of_placement"] for line in lines] == ["fastest", "1.20x", "1.50x", "fastest", ""]
        assert lines[0]["config"] == "not recorded"
        assert (lines[1]["config"], lines[1]["p50_us"]) == ("", "120.0")
        assert (lines[-1]["refused_case"], lines[-1]["refused_reason"], lines[-1]["model"]) == ("TP8", "no room", "")


class TestMarkdown:
    def test_tables_have_as_many_cells_as_columns(self):
        text = markdown(read_files(list(map(str, RECORDED))))
        head: int | None = None
        for line in text.splitlines():
            if not line.startswith("|"):
                head = None
                continue
            cells = len(re.split(r"(?<!\\)\|", line))
            assert head in (None, cells), line
            head = cells
