"""launch/torchrun.sh around a torchrun that is a few lines of bash: exit codes, and where signals go."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[2] / "launch" / "torchrun.sh"


@pytest.fixture
def launched(tmp_path):
    """Start the script with such a torchrun. `code` in it leaves an exit code as a rank does."""

    def start(body: str, *arguments: str) -> subprocess.Popen:
        torchrun = tmp_path / "torchrun"
        torchrun.write_text(f"#!/bin/bash\ncode() {{ echo -n $1 >$MOE_DIST_EXIT_CODE_FILE; }}\n{body}\n")
        torchrun.chmod(0o755)
        environment = os.environ | {"TORCHRUN": str(torchrun), "TMPDIR": str(tmp_path)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [str(LAUNCHER), *(arguments or ("-m", "moe_dist", "run"))]
        return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)

    yield start
    assert [path.name for path in tmp_path.iterdir()] == ["torchrun"]


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("code 0", 0, ""),
        ("code 1; exit 1", 1, ""),
        ("code 4; exit 1", 4, ""),
        ("code 143; exit 1", 143, ""),
        ("exit 2", 2, ""),
        ("exit 1", 4, "a rank failed without an exit code of moe-dist's; see above"),
        ("code 0; exit 1", 4, "a rank died after its work was done; see above"),
        ("exit 0", 4, "the ranks ended before their work did"),
    ],
)
def test_exit_codes(launched, body, code, said):
    process = launched(body)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, f"launch/torchrun.sh: {said}\n" if said else "")


def test_a_program_that_leaves_no_code_ends_well(launched):
    process = launched("exit 0", "layer.py")
    assert (process.wait(30), process.stderr.read()) == (0, "")


WAIT = "echo ready; for i in {1..600}; do sleep 0.1; done"


@pytest.mark.parametrize(
    ("number", "everyone", "code"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143), (signal.SIGHUP, False, 129)],
)
@pytest.mark.parametrize("left", [True, False])
def test_signals_reach_torchrun_and_have_their_codes(launched, number, everyone, code, left):
    """Ctrl-C goes to all of the terminal's processes. In a script's background they would ignore it."""
    word = signal.Signals(number).name[3:]
    process = launched(f"trap 'echo got {word}; {f'code {code};' if left else ''} exit 1' {word}; {WAIT}")
    assert process.stdout.readline() == "ready\n"
    (os.killpg if everyone else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, f"got {word}\n")
    assert err == ("" if left else "launch/torchrun.sh: ended by a signal\n")


def test_a_signal_that_was_ignored_from_the_start_stays_so(launched):
    """nohup"""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = launched("echo ready; sleep 1; code 0")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGHUP)
    assert process.wait(30) == 0
    process.communicate()
