"""launch/carry.py: a results file in a job's log, and what becomes of it on the way."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "carry.py"
CONTENT = json.dumps({"rows": [{"key": f"{number:x}" * 40, "p50_us": number / 7} for number in range(2000)]}).encode()


@pytest.fixture(scope="module")
def carry():
    spec = importlib.util.spec_from_file_location("carry", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def brought(carry, lines, path, kept=(), monkeypatch=None):
    if monkeypatch is not None:
        monkeypatch.setattr(carry, "kept_log", lambda *_: [f"{line}\n" for line in kept])
    return carry.bring([f"{line}\n" for line in lines], path, "http://head", "job-1", live=True)


def test_a_file_comes_home_between_other_lines(carry, tmp_path, capsys):
    log = ["begin of the log", *carry.Parcel.lines(CONTENT), "end of the log"]
    assert len(log) > 5  # in several pieces
    assert brought(carry, log, tmp_path / "out.json") == 0
    assert (tmp_path / "out.json").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    said = capsys.readouterr()
    assert said.out == "begin of the log\nend of the log\n"
    assert f"results of job job-1 are in {tmp_path / 'out.json'}" in said.err


def test_a_last_line_without_an_end_is_shown(carry, tmp_path, capsys):
    first, *rest = carry.Parcel.lines(CONTENT)
    assert brought(carry, [f"no newline{first}", *rest], tmp_path / "out.json") == 0
    assert capsys.readouterr().out.startswith("no newline")


@pytest.mark.parametrize("gap", ["first", "middle", "last", "damaged"])
def test_a_log_with_a_gap_is_read_again_from_the_cluster(carry, tmp_path, gap, monkeypatch):
    whole = list(carry.Parcel.lines(CONTENT))
    holed = list(whole)
    if gap == "damaged":
        holed[2] = holed[2][:-4] + "AAAA"
    else:
        del holed[{"first": 0, "middle": 2, "last": -1}[gap]]
    path = tmp_path / "out.json"
    assert brought(carry, holed, path, kept=holed, monkeypatch=monkeypatch) == 6
    assert not path.exists()
    assert brought(carry, holed, path, kept=whole, monkeypatch=monkeypatch) == 0
    assert path.read_bytes() == CONTENT


def test_no_file_is_said_and_changes_nothing(carry, tmp_path, capsys, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("before")
    assert brought(carry, ["log", f"{carry.MARK} none (No such file)"], path) == 6
    assert "the job has written none" in capsys.readouterr().err
    assert brought(carry, ["log"], path, kept=["log"], monkeypatch=monkeypatch) == 6  # it still runs, or was killed
    assert f"launch/submit.sh --fetch job-1 --out {path}" in capsys.readouterr().err
    assert path.read_text() == "before"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda path: None, ""),
        (lambda path: path.write_text('{"rows": [], "refused": []}'), ""),
        (lambda path: path.write_text("a letter"), "holds something else"),
        (lambda path: path.write_text('{"rows": []}'), "holds something else"),
        (lambda path: path.write_text("[]"), "holds something else"),
        (lambda path: path.mkdir(), "no regular file"),
    ],
)
def test_what_is_there_already_is_results_or_stays(carry, tmp_path, made, said):
    made(tmp_path / "out.json")
    problem = carry.check(tmp_path / "out.json")
    assert (said in problem) if said else problem is None


FAKE = """
import os, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
print("arguments", *sys.argv[1:-1], flush=True)
{body}
"""


def started(tmp_path, body):
    (tmp_path / "moe_dist").mkdir()
    (tmp_path / "moe_dist" / "__main__.py").write_text(FAKE.format(body=body))
    command = [sys.executable, str(SCRIPT), "run", "rows.json", "compare", "tokens=[8]"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True, **pipes)


@pytest.mark.parametrize(
    ("body", "code", "content"),
    [
        ("out.write_text('rows')", 0, b"rows"),
        ("out.write_text('some'); sys.exit(4)", 4, b"some"),
        ("sys.exit(2)", 2, None),
        ("os.kill(os.getpid(), 9)", 137, None),
    ],
)
def test_on_the_cluster_the_code_and_what_was_written_are_kept(carry, tmp_path, body, code, content):
    process = started(tmp_path, body)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == code
    parcel = carry.Parcel()
    shown = "".join(parcel.take(line) for line in io.StringIO(out))
    assert shown == "arguments compare tokens=[8] --out\n"
    assert (parcel.content, parcel.missing) == (content, content is None)
    assert [path.name for path in tmp_path.iterdir()] == ["moe_dist"]


def test_a_stopped_job_still_brings_its_rows(carry, tmp_path):
    """Ray sends SIGTERM to the job's processes; the command saves what it has and ends by itself."""
    body = "import signal\nsignal.signal(15, lambda *_: (out.write_text('some'), os._exit(143)))\ntime.sleep(60)"
    process = started(tmp_path, body)
    assert process.stdout.readline().startswith("arguments")
    time.sleep(0.3)  # its handler is set right after
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    parcel = carry.Parcel()
    for line in io.StringIO(out):
        parcel.take(line)
    assert (process.returncode, parcel.content) == (143, b"some")
