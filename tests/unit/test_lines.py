"""`--lines`: a line of JSON for every result, whole lines whatever happens, and read back as a results file is."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from unit.test_bench import CPU, row

from moe_dist.bench.diff import compare_results, read_results
from moe_dist.bench.results import Outcome, provenance
from moe_dist.bench.row import Failed, Refused, Row
from moe_dist.bench.sweep import Step
from moe_dist.commands import kept as keeping
from moe_dist.commands.cli import main
from moe_dist.commands.flags import Measuring
from moe_dist.commands.kept import Kept, open_places
from moe_dist.errors import ConfigError, OutputError

FAILED = Failed(key="f", run=0, case="c", error="RankFailure", rank=1, op="o", reason="r", exit_code=4)
REFUSED = Refused(case="c", reason="too wide")
CALL = SimpleNamespace(descriptors=None)


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(keeping, "say", lines.append)
    return lines


def kept(stack, path, outcome=None, **measuring):
    asked = Measuring(lines=str(path), **measuring)
    output, lines = open_places(stack, asked, CALL, [], as_json=False, resume=False)
    return Kept(
        SimpleNamespace(kept="", as_json=False), asked, output, lines, False, provenance(CPU), outcome or Outcome()
    )


def entries(path):
    return [json.loads(each) for each in path.read_text().splitlines()]


def step(ended):
    return Step(ended, 1, None)


def test_each_result_is_there_at_once(stack, tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    results = kept(stack, path, Outcome(refused=[REFUSED]))
    results.begin(0)
    assert [entry["kind"] for entry in entries(path)] == ["run", "refused"]
    assert entries(path)[0] == {"kind": "run"} | provenance(CPU).model_dump(mode="json") | {"date": results.about.date}
    for ended, kinds in ((None, []), (row(), ["row"]), (FAILED, ["row", "failed"])):
        results.keep(step(ended))
        assert [entry["kind"] for entry in entries(path)[2:]] == kinds
    first = entries(path)[2]
    assert first.pop("kind") == "row"
    assert Row.model_validate_json(json.dumps(first)) == row()


def test_what_a_resumed_run_keeps_comes_first(stack, tmp_path):
    path = tmp_path / "rows.jsonl"
    outcome = Outcome(rows=[row(key="a"), row(key="unfinished")], earlier=[provenance(CPU)])
    results = kept(stack, path, outcome)
    results.begin(1)
    results.keep(step(row(key="b", run=1)))
    assert [(entry["kind"], entry.get("key")) for entry in entries(path)] == [
        ("run", None), ("run", None), ("row", "a"), ("row", "b"),
    ]  # fmt: skip


def test_a_file_of_lines_is_read_as_results_are(stack, tmp_path):
    path = tmp_path / "rows.jsonl"
    results = kept(stack, path, Outcome(refused=[REFUSED]))
    results.begin(0)
    for ended in (row(tp=2), FAILED, row(ep=2)):
        results.keep(step(ended))
    found = read_results(str(path))
    assert [each["placement"] for each in found["rows"]] == ["TP2", "EP2"]
    assert (len(found["refused"]), len(found["failed"]), found["machine"]["cpu"]) == (1, 1, "a test's CPU")
    assert [change.verdict for change in compare_results(found, found).changes] == ["same", "same"]
    with ExitStack() as again, pytest.raises(ConfigError, match="another command that is running writes to it"):
        kept(again, path)
    stack.close()
    with ExitStack() as again:
        kept(again, path).begin(0)  # earlier results are replaced
    assert len(entries(path)) == 1


@pytest.mark.parametrize("rest", ['{"kind": "other"}\n', "[]\n", '{"kin'])
def test_other_lines_are_refused(tmp_path, rest):
    path, text = tmp_path / "rows.jsonl", '{"kind": "run"}\n' + rest
    path.write_text(text)
    with pytest.raises(ConfigError, match="is no JSON"):
        read_results(str(path))
    assert main(["run", "--device", "cpu", "--lines", str(path)]) == 2
    assert path.read_text() == text


@pytest.mark.parametrize("rest", ['{"kind": "row", "mod', "\0" * 40])
def test_lines_whose_last_one_was_cut_are_replaced(stack, tmp_path, said, rest):
    """A machine that goes down cuts it, and the command is begun again as it was."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"kind": "run", "date": "then"}\n' + rest)
    kept(stack, path).begin(0)
    assert [entry["kind"] for entry in entries(path)] == ["run"]


@contextmanager
def no_more_than(size):
    """No file may become larger."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def test_older_results_stay_until_there_is_room_for_a_beginning(stack, tmp_path, said):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"kind": "run", "date": "then"}\n')
    results = kept(stack, path)
    with no_more_than(100):
        results.begin(0)
    assert path.read_text() == '{"kind": "run", "date": "then"}\n'
    results.keep(step(row(key="a")))
    assert [(entry["kind"], entry.get("date") == "then") for entry in entries(path)] == [("run", False), ("row", False)]
    assert len(said) == 2  # that it is overwritten, that it can't be


def test_a_line_without_room_is_taken_back_and_written_later(stack, tmp_path, said):
    path = tmp_path / "rows.jsonl"
    results = kept(stack, path)
    results.begin(0)
    before = path.read_text()
    with no_more_than(len(before) + 100):
        results.keep(step(row(key="a")))
        results.keep(step(row(key="b")))
        assert path.read_text() == before
        assert len(said) == 1
        assert "can't be written" in said[0]
        assert isinstance(results.lines.problem, OutputError)
    results.keep(step(row(key="c")))
    assert [entry.get("key") for entry in entries(path)] == [None, "a", "b", "c"]
    assert results.lines.problem is None


def test_what_somebody_else_has_written_stays(stack, tmp_path, said):
    path = tmp_path / "rows.jsonl"
    results = kept(stack, path)
    results.begin(0)
    path.write_text("somebody's")
    results.keep(step(row()))
    assert path.read_text() == "somebody's"
    assert "something else has written to it" in said[0]


def test_a_pipe_without_a_reader_is_tried_once(stack, said):
    reading, writing = os.pipe()
    results = kept(stack, f"/dev/fd/{writing}")
    results.begin(0)
    assert json.loads(os.read(reading, 1 << 16))["kind"] == "run"
    os.close(reading)
    for _ in range(2):
        results.keep(step(row()))
    os.close(writing)
    assert said == [f"/dev/fd/{writing} can't be written: Broken pipe; measuring goes on"]
    with pytest.raises(OutputError, match="lines are missing"):
        results.finish(sweep=True)


def test_places_that_meet_are_refused(stack, tmp_path, capfd):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ConfigError, match="is where --out goes"):
        kept(stack, path, out=str(tmp_path / "." / "rows.jsonl"))
    for arguments in (["--json"], ["--csv"], ["--out", "/dev/fd/1"]):
        assert main(["run", "--device", "cpu", "--lines", "/dev/stdout", *arguments]) == 2
        assert "where --" in capfd.readouterr().err


def test_standard_output_gets_lines_and_nothing_else(tmp_path: Path):
    program = (
        "import sys; from moe_dist.bench.row import Row; from moe_dist.bench.sweep import Step\n"
        "from moe_dist.commands import cli, measuring\n"
        "def run_cases(planned, start, timeout_s, outcome, shown, said, step_done, *rest):\n"
        f"    outcome.put(Row.model_validate_json({row().model_dump_json()!r}))\n"
        "    step_done(Step(outcome.rows[0], 0, None))\n"
        "measuring.run_cases = run_cases; sys.exit(cli.main())"
    )
    command = [sys.executable, "-c", program, "compare", "--device", "cpu", "--lines", "/dev/stdout"]
    done = subprocess.run(
        ["bash", "-c", '"$@" > rows.jsonl && cat rows.jsonl', "bash", *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(each)["kind"] for each in done.stdout.splitlines()] == ["run", "row"]
