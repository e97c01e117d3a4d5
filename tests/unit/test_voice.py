"""Who speaks: every process that runs a command alone, whatever its environment says, and one of torchrun's ranks."""

from __future__ import annotations

import json
import os

import pytest

from moe_dist import cli
from moe_dist.runtime import voice

TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*TORCHRUN, voice.CODE_FILE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("moe_dist.ending.LAST_WORDS_S", 0.0)
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
    monkeypatch.setattr(cli, "group_starter", lambda *_: pytest.fail("started"))
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
    monkeypatch.setattr(cli, "group_starter", lambda *_: pytest.fail("started"))
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
