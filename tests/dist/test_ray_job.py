"""A real job on a real head with authentication, through the scripts in launch/."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    given = ("compare", "--device", "cpu", "--out", "rows.json", *arguments, "--json")
    done = head.submit(*given, RAY_AUTH_TOKEN_PATH=token)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    document = json.loads(line)
    rows = document["rows"]
    assert sorted(row["placement"] for row in rows) == ["EP2", "TP2"]
    assert all(row["runtime"] == "ray" and row["ok"] and row["p50_us"] > 0 for row in rows)
    assert document["commit"].removesuffix("+changes") in (before, commit_of_checkout())
    assert document["command"] == "moe-dist compare --device cpu " + " ".join(arguments) + " --json --out rows.json"
    home = head.directory / "rows.json"  # where the command was typed; no disk is shared
    assert json.loads(home.read_text()) == document
    (job,) = set(re.findall(r"moe-dist-\d{8}-\d{6}-\d+", done.stdout))
    assert f"results of job {job} are in {home}" in done.stderr
    assert "moe-dist-results:" not in done.stdout  # the lines that carry it are not shown
    fetched = head.submit("--fetch", job, "--out", "again.json", RAY_AUTH_TOKEN_PATH=token)
    assert fetched.returncode == 0, fetched.stderr
    assert (head.directory / "again.json").read_bytes() == home.read_bytes()


def test_a_failing_job_fails_here_too(head: Head) -> None:
    token = str(head.directory / "token")
    done = head.submit("run", "--backend", "nosuch", "--out=none.json", RAY_AUTH_TOKEN_PATH=token)
    assert done.returncode == 2, done.stdout + done.stderr  # moe-dist's own code, not Ray's 1 for every failure
    assert "no backend has this name" in done.stdout
    assert "none.json is as it was; the job has written none" in done.stderr
    assert not (head.directory / "none.json").exists()


def test_strangers_are_refused(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{head.url}/api/jobs/", timeout=20)
    assert refused.value.code == 401
    wrong = head.directory / "wrong"
    wrong.write_text(secrets.token_hex(32))
    done = head.submit("doctor", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert done.returncode == 2
    assert "submitted successfully" not in done.stdout
    assert "Invalid authentication token" in done.stderr


def test_a_driver_joins_with_the_token_alone(head: Head) -> None:
    """RAY_AUTH_MODE is not set: the head that answers says that it wants a token, and there is one."""
    (gcs,) = set(re.findall(r"ray start --address='(\S+)'", (head.directory / "log").read_text()))
    command = [sys.executable, "-m", "moe_dist", "run", "--ep", "2", "--tokens", "4", "--iters", "0", "--device", "cpu"]

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        known = clean(RAY_ADDRESS=gcs, HOME=str(head.directory), **environment)
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=known)

    joined = run(RAY_AUTH_TOKEN_PATH=str(head.directory / "token"))
    assert joined.returncode == 0, joined.stderr
    assert (head.directory / "token").stat().st_mode & 0o777 == 0o600
    refused = run()
    assert refused.returncode == 2
    assert f"ray.address = '{gcs}': can't be joined: it wants a token; set RAY_AUTH_TOKEN_PATH" in refused.stderr


@pytest.fixture
def stranger() -> Iterator[tuple[str, list[str]]]:
    """A web server that is no Ray: its URL, and every request's Authorization header that it was sent."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(str(self.headers))
            self.send_error(404)

        do_POST = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()


def test_a_port_that_is_taken_and_a_token_that_stays(stranger: tuple[str, list[str]], tmp_path: Path) -> None:
    url, seen = stranger
    token = "0123456789abcdef" * 4
    environment = clean(HEAD_DIR=str(tmp_path), DASHBOARD_PORT=url.rpartition(":")[2], RAY_AUTH_TOKEN=token)
    for command in ("start", "run"):
        launched = [ROOT / "launch" / "head.sh", command]
        done = subprocess.run(launched, capture_output=True, text=True, timeout=30, env=environment)
        assert done.returncode == 2
        assert "the port is taken" in done.stderr
    command = [ROOT / "launch" / "submit.sh", "doctor"]
    environment = clean(RAY_ADDRESS=url, RAY_AUTH_TOKEN=token)
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment)
    assert done.returncode == 2
    assert f"no token was sent: {url} is no Ray dashboard that wants a token (HTTP 404)" in done.stderr
    assert seen
    assert not any(token in headers for headers in seen)


def test_whose_a_port_is() -> None:
    """What head.sh asks after its start: another process may have taken the port in between."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])

        def belongs(port: str, pid: int) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, ROOT / "launch" / "service.py", "belongs", port, str(pid)]
            return subprocess.run(command, capture_output=True, text=True, timeout=30)

        assert belongs(port, os.getpid()).returncode == 0
        with subprocess.Popen(["sleep", "60"]) as other:
            assert "the port is taken" in belongs(port, other.pid).stdout
            other.kill()
        assert "nothing listens" in belongs(str(free_port()), os.getpid()).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--out"], "--out: give a file here"),
        (["run", "--out="], "--out: give a file here"),
        (["run", "--out", "a", "--out=b"], "--out is given twice"),
        (["compare", "--resume", "--out", "a.json"], "--resume: the job can't read a results file of this machine"),
        (["tune", "--out", "tables"], "--out: of tune it is a folder"),
        (["run", "--lines", "rows.jsonl"], "--lines rows.jsonl: would lie in the job's own folder"),
        (["run", "--record-routing=a.pt"], "--record-routing a.pt: would lie in the job's own folder"),
        (["run", "record_routing=a.pt"], "record_routing a.pt: would lie in the job's own folder"),
        (["bench", "--result-filename", "a.jsonl"], "--result-filename a.jsonl: would lie in the job's own folder"),
        (["bench", "--profile-output-dir", "a"], "--profile-output-dir a: would lie in the job's own folder"),
        (["run", "--profile"], "--profile: give --profile-output-dir too"),
        (["--fetch", "job-1"], "--fetch job-1: give --out FILE too"),
        (["--fetch"], "--fetch: give a job's id"),
        (["--fetch", "job-1", "--out", "a", "run"], "--fetch job-1: takes no command (run)"),
        (["run", "--out", "nosuch/a.json"], "/nosuch/a.json: its folder "),
    ],
)
def test_submit_says_what_is_wrong_with_its_flags(arguments: list[str], said: str, tmp_path: Path) -> None:
    """Before anything is asked of a cluster."""
    command = [ROOT / "launch" / "submit.sh", *arguments]
    known = clean(RAY_AUTH_TOKEN="unused")
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=known, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr


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
