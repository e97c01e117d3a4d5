"""What is under the ranks goes, or the user ends it all: a whole command, and seconds until it has ended cleanly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults.kinds import SOON_S
from faults.outcome import keep, shared_memory, wait_gone

pytestmark = pytest.mark.faults

LAUNCHER = Path(__file__).parent.parent.parent / "launch" / "torchrun.sh"
SMALL = ["model.hidden=128", "model.intermediate=256", "model.num_experts=4", "model.top_k=2"]
LONG = ["run", "--ep", "2", "--tokens", "4", "--iters", "1000000", "--device", "cpu", "--json", "case_timeout_s=100"]
TORCHRUN_S = 10.0  # with torchrun's own end
UP_S = 15.0  # for torchrun and two ranks to start, on a busy machine
LOST, HUNG_UP, INTERRUPTED, TERMINATED = 5, 129, 130, 143  # exit codes
rows: list[dict[str, Any]] = []


def started(runtime: str) -> subprocess.Popen[str]:
    """`moe-dist run`, once it measures."""
    command = [sys.executable, "-m", "moe_dist"]
    if runtime == "torchrun":
        command = [str(LAUNCHER), "--standalone", "--nproc-per-node", "2", "-m", "moe_dist"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["TORCHRUN"] = str(Path(sys.executable).parent / "torchrun")
    process = subprocess.Popen(
        [*command, *LONG, "--runtime", runtime, *SMALL],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    if runtime == "torchrun":  # whose progress is no line before it ends
        time.sleep(UP_S)
        return process
    while "timing" not in (line := process.stderr.readline()):
        assert line, "it ended before it measured"
    return process


def server(process: subprocess.Popen[str], name: str) -> int:
    (pid,) = [each.pid for each in psutil.Process(process.pid).children(recursive=True) if name in each.name()]
    return pid


CASES = [
    ("ray", "gcs_server", signal.SIGKILL, LOST),
    ("ray", "gcs_server", signal.SIGSTOP, LOST),
    ("ray", "raylet", signal.SIGKILL, LOST),
    ("ray", "raylet", signal.SIGSTOP, LOST),
    ("ray", "the command", signal.SIGINT, INTERRUPTED),
    ("ray", "the command", signal.SIGTERM, TERMINATED),
    ("ray", "the terminal", signal.SIGHUP, HUNG_UP),
    ("ray", "the terminal", signal.SIGTERM, TERMINATED),
    ("torchrun", "the terminal", signal.SIGINT, INTERRUPTED),
    ("torchrun", "the command", signal.SIGTERM, TERMINATED),
]


@pytest.mark.parametrize(("runtime", "what", "number", "code"), CASES)
def test_the_command_ends_soon_and_leaves_nothing(runtime: str, what: str, number: signal.Signals, code: int) -> None:
    memory = shared_memory()
    process = started(runtime)
    everything = [each.pid for each in psutil.Process(process.pid).children(recursive=True)]
    begin = time.monotonic()
    if what == "the terminal":  # every process of the group in front has it, as those of `timeout` have
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid if what == "the command" else server(process, what), number)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    seconds = time.monotonic() - begin
    gone_s, left = wait_gone(everything)
    left += [f"/dev/shm/{name}" for name in shared_memory() - memory]
    told = json.loads(out.splitlines()[-1])
    rows.append({
        "runtime": runtime, "what": what, "signal": number.name, "ended_s": round(seconds, 2),
        "gone_s": round(gone_s, 2), "exit_code": process.returncode, "message": told.get("message", ""),
    })  # fmt: skip
    keep("clusters", {"rows": rows})
    assert process.returncode == code, err
    assert left == []
    if code == LOST:
        assert told["error"] == "ClusterLost"
        assert ("GCS" if what == "gcs_server" else "raylet") in told["message"] or number == signal.SIGKILL
    assert seconds <= (SOON_S if runtime == "ray" else TORCHRUN_S)
