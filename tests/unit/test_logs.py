"""Log lines as JSON: each with its time, rank, node, number, operation and message; text where nobody asks for it."""

from __future__ import annotations

import json
import re
import socket
import warnings
from typing import Any

import pytest

from moe_dist.comm import Comm
from moe_dist.commands import terminal
from moe_dist.commands.cli import main
from moe_dist.commands.progress import Reporter
from moe_dist.errors import ConfigError
from moe_dist.messages import building, logs
from moe_dist.messages.notices import collecting, notice
from moe_dist.runtime.blame import as_failure, log_failure
from moe_dist.runtime.context import RankContext

KEYS = {"time", "level", "rank", "node", "pid", "sequence", "operation", "message"}


@pytest.fixture(autouse=True)
def no_rank_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_place", logs.Place)


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, "json")


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_text_is_as_it_was(capsys, monkeypatch):
    monkeypatch.delenv(logs.VARIABLE, raising=False)
    logs.write("a text")
    logs.write_if_json("for machines only")
    assert capsys.readouterr().err == "moe-dist: a text\n"


def test_a_process_without_a_rank(as_json, capsys):
    logs.write("a\ttext \x1b[31m\nof two lines", "warning")
    (line,) = lines(capsys)
    assert set(line) == KEYS
    assert (line["rank"], line["sequence"], line["operation"]) == (None, None, None)
    assert (line["level"], line["message"]) == ("warning", "a\ttext \x1b[31m\nof two lines")
    assert line["node"] == socket.gethostname()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])


def test_of_a_rank(as_json, capsys):
    context = RankContext(Comm(3, 4, Comm.single().device), "torchrun")
    context.progress("warming up")
    context.comm.sequence = 7
    context.pulse.note("all_gather", 7)
    logs.write("in a collective")
    context.pulse.note("", 7)
    logs.write("behind it")
    first, second, third = lines(capsys)
    assert (first["rank"], first["operation"], first["message"]) == (3, "warming up", "warming up")
    assert (second["rank"], second["sequence"], second["operation"]) == (3, 7, "all_gather")
    assert third["operation"] == "warming up"
    del context  # a context must not live on for its log lines
    logs.write("afterwards")
    assert lines(capsys)[0]["rank"] is None


def test_a_failure_has_its_traceback_in_one_line(as_json, capsys):
    context = RankContext(Comm.single(), "torchrun")
    try:
        raise ValueError("on purpose")
    except ValueError as error:
        log_failure(as_failure(error, context))
    (line,) = lines(capsys)
    assert line["level"] == "error"
    assert "rank 0 failed in starting" in line["message"]
    assert "ValueError: on purpose" in line["trace"]


def test_notices_of_a_rank_are_written_once_as_they_come(as_json, capsys):
    with collecting() as said:
        for text in ("no table", "no table"):
            notice(text)
    assert said == ["no table"]
    assert [(line["level"], line["message"]) for line in lines(capsys)] == [("warning", "no table")]


def test_notices_of_a_program_are_lines_too(as_json, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notice("no table")
    assert lines(capsys)[0]["message"] == "no table"


def test_what_a_command_says(as_json, capsys):
    terminal.say("it failed", "red")
    building.say("compiling")
    with Reporter(2) as reporter:
        reporter.shown("starting 2 ranks")
        reporter.said("rank 0: no table")
    found = [(line["level"], line["message"]) for line in lines(capsys)]
    assert found == [
        ("error", "it failed"), ("info", "compiling"), ("info", "[0/2] starting 2 ranks"),
        ("warning", "rank 0: no table"),
    ]  # fmt: skip


def test_a_quiet_rank_stays_quiet(as_json, capsys):
    with Reporter(1, quiet=True) as reporter:
        reporter.said("somebody else says it")
    assert lines(capsys) == []


def test_another_form_is_refused(monkeypatch, capsys):
    monkeypatch.setenv(logs.VARIABLE, "yaml")
    assert main(["doctor"]) == 2
    assert "MOE_DIST_LOG_FORMAT = 'yaml': is no form of log lines (legal: text, json)" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        RankContext(Comm.single(), "torchrun")


def test_a_closed_standard_error_is_no_failure(as_json, monkeypatch):
    monkeypatch.setattr(logs.sys, "stderr", None)
    logs.write("nobody hears it")
