"""A real job on a real head with authentication, through the scripts in launch/."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
RAY = Path(sys.executable).parent / "ray"

pytestmark = [
    pytest.mark.timeout(150),
    pytest.mark.skipif(not RAY.exists(), reason=f"no `ray` command beside {sys.executable}"),
]


@dataclass
class Head:
    process: subprocess.Popen[bytes]
    directory: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def submit(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ROOT / "launch" / "submit.sh", *arguments],
            capture_output=True, text=True, timeout=120, env=clean(RAY_ADDRESS=self.url, **environment),
            cwd=self.directory,  # it must find the checkout by itself
        )  # fmt: skip


def clean(**changes: str) -> dict[str, str]:
    """The environment without what a user or another test may have set for Ray."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MOE_DIST_"))}
    return own | {"RAY": str(RAY), **changes}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def processes_of(directory: Path) -> list[int]:
    """Everything that Ray started for this head has the head's directory in its command or its environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            said = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if str(directory).encode() in said:
            found.append(int(process.name))
    return found


def commit_of_checkout() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Ends with no process of it left and its port free, or the tests fail."""
    directory = Path(tempfile.mkdtemp(prefix="md-", dir="/tmp"))  # Ray's sockets need a short path
    token, port = directory / "token", free_port()
    token.write_text(secrets.token_hex(32))
    environment = clean(HEAD_DIR=str(directory), DASHBOARD_PORT=str(port), RAY_AUTH_TOKEN_PATH=str(token))
    options = ["--port=0", f"--ray-client-server-port={free_port()}", "--num-cpus=2", "--num-gpus=0"]
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            [ROOT / "launch" / "head.sh", "run", *options, "--object-store-memory=104857600"],
            env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not (b"Ray runtime started" in (directory / "log").read_bytes() and listens(port)):
            said = (directory / "log").read_text()
            assert process.poll() is None, f"the head ended: {said}"
            assert time.monotonic() < deadline, f"the head did not come up: {said}"
            time.sleep(0.2)
        yield Head(process, directory, port)
    finally:
        process.terminate()
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while (left := processes_of(directory)) and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)
    assert left == []
    assert not listens(port)


def test_a_job_brings_rows_home(head: Head) -> None:
    assert (head.directory / "head.pid").read_text().strip() == str(head.process.pid)
    arguments = ["worlds=[2]", "exchanges=[ag_rs]", "tokens=[8]", "skews=[uniform]", "iters=2", "warmup=0"]
    token = str(head.directory / "token")
    before = commit_of_checkout()
    done = head.submit("compare", "--device", "cpu", *arguments, "--json", RAY_AUTH_TOKEN_PATH=token)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    document = json.loads(line)
    rows = document["rows"]
    assert sorted(row["placement"] for row in rows) == ["EP2", "TP2"]
    assert all(row["runtime"] == "ray" and row["ok"] and row["p50_us"] > 0 for row in rows)
    assert document["commit"].removesuffix("+changes") in (before, commit_of_checkout())
    assert document["command"] == "moe-dist compare --device cpu " + " ".join(arguments) + " --json"


def test_a_failing_job_fails_here_too(head: Head) -> None:
    done = head.submit("run", "--backend", "nosuch", RAY_AUTH_TOKEN_PATH=str(head.directory / "token"))
    assert done.returncode == 2, done.stdout + done.stderr  # moe-dist's own code, not Ray's 1 for every failure
    assert "no backend has this name" in done.stdout


def test_strangers_are_refused(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{head.url}/api/jobs/", timeout=20)
    assert refused.value.code == 401
    wrong = head.directory / "wrong"
    wrong.write_text(secrets.token_hex(32))
    done = head.submit("doctor", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert done.returncode != 0
    assert "submitted successfully" not in done.stdout
    assert "Invalid authentication token" in done.stderr


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RAY_AUTH_TOKEN_PATH": "/nonexistent"}, "no token: copy the cluster's into /nonexistent"),
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE=disabled"),
        ({"RAY_ADDRESS": "auto"}, "RAY_ADDRESS=auto is no dashboard URL"),
        ({"RAY": "/nonexistent/ray"}, "no `ray` command"),
    ],
)
def test_submit_says_what_is_missing(environment: dict[str, str], said: str) -> None:
    command = [ROOT / "launch" / "submit.sh", "doctor"]
    given = {"RAY_AUTH_TOKEN": "unused"} if "RAY_AUTH_TOKEN_PATH" not in environment else {}
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=clean() | given | environment)
    assert done.returncode == 2
    assert said in done.stderr
