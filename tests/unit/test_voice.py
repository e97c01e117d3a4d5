"""Who speaks: every process that runs a command alone, whatever its environment says, and one of torchrun's ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from unit.test_bench import row

from moe_dist.commands import cli, measuring
from moe_dist.errors import RankFailure
from moe_dist.runtime import pulse, voice

TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*TORCHRUN, voice.CODE_FILE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("moe_dist.commands.ending.LAST_WORDS_S", 0.0)
    monkeypatch.setattr(voice, "_left", False)
    yield
    voice.together(False)


def environment(monkeypatch, **changes: str | None) -> None:
    for name, value in (TORCHRUN | changes).items():
        if value is not None:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize("rank", ["1", "abc", "", "-1"])
def test_a_rank_of_something_else_speaks(rank, monkeypatch, capsys, tmp_path):
    """A scheduler sets RANK for every process that it starts."""
    monkeypatch.setenv("RANK", rank)
    assert cli.main(["plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["placement"] == "single"
    assert cli.main(["plan"]) == 0
    assert "single" in capsys.readouterr().out
    assert cli.main(["demo-checkpoint", str(tmp_path / "made")]) == 0
    assert "checkpoint of random weights" in capsys.readouterr().out
    assert cli.main(["run", "--model", "nosuch"]) == 2
    assert "model = 'nosuch'" in capsys.readouterr().err


def test_what_a_rank_of_another_program_starts_speaks(monkeypatch, capsys):
    environment(monkeypatch)
    assert cli.main(["plan"]) == 0
    assert "single" in capsys.readouterr().out
    assert cli.main(["run"]) == 2
    assert "legal: --runtime torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("word", [["--runtime", "torchrun"], ["runtime=torchrun"]])
def test_of_torchrun_s_ranks_one_speaks(word, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "group_starter", lambda *_: pytest.fail("started"))
    environment(monkeypatch)
    assert cli.main(["run", *word, "--backend", "nosuch"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["run", *word, "--backend", "nosuch"]) == 2
    assert "'nosuch'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RANK", None, "RANK = None: missing"),
        ("RANK", "", "RANK = '': is no such number"),
        ("RANK", "abc", "RANK = 'abc': is no such number"),
        ("RANK", "2", "(legal: 0 to 1)"),
        ("WORLD_SIZE", "x", "WORLD_SIZE = 'x': is no such number"),
        ("WORLD_SIZE", None, "WORLD_SIZE = None: missing"),
        ("LOCAL_RANK", None, "LOCAL_RANK = None: missing"),
        ("LOCAL_WORLD_SIZE", "0", "LOCAL_WORLD_SIZE = '0'"),
        ("MASTER_ADDR", None, "MASTER_ADDR = None: missing"),
        ("MASTER_ADDR", "", "MASTER_ADDR = ''"),
        ("MASTER_PORT", "99999", "MASTER_PORT = '99999'"),
    ],
)
def test_half_of_torchrun_s_environment_is_bad_input(name, value, said, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "group_starter", lambda *_: pytest.fail("started"))
    environment(monkeypatch, **{name: value})
    assert cli.main(["run", "--runtime", "torchrun", "--ep", "2", "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["missing folder", "folder", "nul", "fifo"])
def test_an_exit_code_that_can_not_be_left_is_one_line(kind, monkeypatch, capsys, tmp_path):
    path = {"missing folder": tmp_path / "none" / "code", "folder": tmp_path}.get(kind, tmp_path / "fifo")
    if kind == "fifo":
        os.mkfifo(path)
    if kind == "nul":  # no environment holds one; a caller's dictionary may
        monkeypatch.setattr(voice.os, "environ", {voice.CODE_FILE: "a\0b"})
    else:
        monkeypatch.setenv(voice.CODE_FILE, str(path))
    said = "the exit code 4 can't be written to MOE_DIST_EXIT_CODE_FILE = "
    assert voice.leave_code(4).startswith(said)
    if kind != "nul":
        assert cli.main(["plan", "--model", "nosuch"]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("moe-dist: " + said.replace("4", "2"))


def test_a_code_of_another_rank_stays(monkeypatch, tmp_path):
    path = tmp_path / "code"
    path.write_text("4")
    monkeypatch.setenv(voice.CODE_FILE, str(path))
    assert voice.leave_code(143) == ""
    assert path.read_text() == "4"
    path.write_text("")
    for code in (130, 0):  # two commands in one process: the last one counts
        assert voice.leave_code(code) == ""
        assert path.read_text() == str(code)


def test_a_rank_that_was_passed_over_says_nothing(monkeypatch, tmp_path):
    environment(monkeypatch, RANK="0", LOCAL_RANK="0")
    monkeypatch.setenv(voice.CODE_FILE, str(tmp_path / "code"))
    voice.together(True)
    assert voice.speaks()
    voice.mute([0])
    assert not voice.speaks()
    assert voice.leave_code(143) == ""
    assert not (tmp_path / "code").exists()


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([], "no row is in {}"),
        ([row()], "1 row is on standard output; {} has those that the lost rank wrote"),
    ],
)
def test_who_speaks_for_a_lost_rank_says_what_that_one_has_kept(rows, kept, monkeypatch, capsys, tmp_path):
    def run_cases(planned, start, timeout_s, outcome, *rest):
        outcome.rows.extend(rows)
        voice.mute([0])
        raise RankFailure(0, "o", 2, "died")

    monkeypatch.setattr(measuring, "run_cases", run_cases)
    environment(monkeypatch)
    path = tmp_path / "out.json"
    command = ["run", "--runtime", "torchrun", "--ep", "2", "--device", "cpu", "--json", "--out", str(path)]
    assert cli.main(command) == 4
    found = capsys.readouterr()
    document = json.loads(found.out)
    assert document["kept"] == kept.format(path)
    assert document.get("results", {}).get("rows", []) == [each.model_dump(mode="json") for each in rows]
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["run", "--runtime", "torchrun"], True),
        (["run", "--runtime=torchrun"], True),
        (["run", "runtime=torchrun"], True),
        (["plan", "--model", "tiny"], False),
        ([], False),
    ],
)
def test_what_a_command_line_means(arguments, meant):
    assert voice.torchrun_is_meant(arguments) is meant


@pytest.fixture
def rank_1(monkeypatch, tmp_path):
    """Starts rank 1 of the same torchrun, whose environment this process has as rank 0. `number` ends rank 1."""
    mine = TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}
    started = []

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", "print(1, flush=True); input()"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=os.environ | TORCHRUN, **pipes))
        started[-1].stdout.readline()
        return started[-1]

    def known(process: psutil.Process) -> dict[str, str]:
        return mine if process.pid == os.getpid() else real(process)

    real = psutil.Process.environ
    monkeypatch.setattr(psutil.Process, "environ", known)
    monkeypatch.setattr(os, "getppid", os.getpid)  # torchrun is the parent of both
    environment(monkeypatch, RANK="0", LOCAL_RANK="0")
    (tmp_path / "code").touch()
    monkeypatch.setenv(voice.CODE_FILE, str(tmp_path / "code"))
    voice.together(True)
    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_rank_that_is_gone_without_a_code_has_died(rank_1, monkeypatch, tmp_path):
    process = rank_1()
    assert process.pid in pulse.ranks_here()[1]
    assert voice.death() is None
    process.kill()
    process.wait()  # as torchrun does before it sends SIGTERM to the others
    assert str(voice.death()) == "rank 1 failed in starting or ending (sequence number 0): its process died"
    (tmp_path / "code").write_text("2")
    assert voice.death() is None
    monkeypatch.delenv(voice.CODE_FILE)
    assert voice.death() is None


def test_ranks_that_one_sigterm_ends_have_not_died(rank_1):
    process = rank_1()
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while not pulse.siblings_ended_by([signal.SIGTERM]):
        assert time.monotonic() < deadline
    assert voice.death() is None
