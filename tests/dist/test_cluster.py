"""The Ray cluster under the ranks: closed, started within its time, and missed when it goes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults.outcome import wait_gone

from moe_dist.errors import ConfigError, ResourceError
from moe_dist.runtime import cluster
from moe_dist.runtime.context import RaySpec
from moe_dist.runtime.probe import probe

RAY_VARIABLES = ("RAY_", "TMPDIR")

# A stranger on this machine, without the token. ray.init would not even come so far: it takes the machine's address for
# 127.0.0.1, where nobody listens.
STRANGER = """
import os, sys
import ray
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).get_all_node_info()
except ray.exceptions.AuthenticationError:
    os._exit(42)
os._exit(0)
"""


def only_line(err: str) -> str:
    """Of standard error, but for progress."""
    lines = [line for line in err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1, err
    return lines[0]


def clean(**changes: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(RAY_VARIABLES)}
    return own | changes


def family(pid: int) -> set[int]:
    """A process and everything that descends from it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, before = {pid}, 0
    while len(found) > before:
        before = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found


def listening(pids: set[int]) -> set[str]:
    """Addresses and ports, as the kernel writes them, at which these processes listen."""
    inodes = set()
    for pid in pids:
        try:
            inodes |= {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
        except OSError:
            continue
    tables = (Path(f"/proc/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6"))
    rows = [line.split() for table in tables for line in table]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def measuring() -> Iterator[subprocess.Popen[str]]:
    """`moe-dist run` on a cluster of its own, in an environment that would leave Ray open, once it measures."""
    arguments = ["run", "--ep", "2", "--tokens", "4", "--iters", "1000000", "case_timeout_s=100", "--device", "cpu"]
    small = ["model.hidden=128", "model.intermediate=256", "model.num_experts=4", "model.top_k=2", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_dist", *arguments, *small],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean(RAY_AUTH_MODE="disabled", HOME="/proc"),
    )  # fmt: skip
    try:
        assert process.stderr is not None
        while "timing" not in (line := process.stderr.readline()):
            assert line, "it ended before it measured"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_private_cluster_is_closed_and_missed(measuring: subprocess.Popen[str]) -> None:
    """One start serves both, because it takes seconds. HOME can't be written to, which nothing here needs."""
    everything = family(measuring.pid)
    hosts = {place.rpartition(":")[0] for place in listening(everything)}
    assert hosts <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, in both tables
    (gcs,) = [pid for pid in everything if "gcs_server" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]]
    (place,) = listening({gcs})
    address = f"127.0.0.1:{int(place.rpartition(':')[2], 16)}"
    stranger = subprocess.run([sys.executable, "-c", STRANGER, address], capture_output=True, timeout=60, env=clean())
    assert stranger.returncode == 42, stranger.stderr.decode()

    os.kill(gcs, signal.SIGKILL)
    begin = time.monotonic()
    out, err = measuring.communicate(timeout=30)
    assert time.monotonic() - begin < 20.0  # 5 s are promised, on a CPU that has nothing else to do
    assert measuring.returncode == 5
    told = f"the Ray cluster at {address} was lost while tiny EP2 ag_rs torch 4 sharded tokens uniform eager: timing"
    line = only_line(err)
    assert line.startswith(f"moe-dist: {told}")
    assert ": its head (GCS) does not answer: " in line
    assert json.loads(out)["error"] == "ClusterLost"
    deadline = time.monotonic() + 10
    while any(map(alive, everything)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in everything if alive(pid)] == []


@pytest.fixture
def port() -> Iterator[int]:
    """Accepts and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_that_never_answers(port: int) -> None:
    command = [sys.executable, "-m", "moe_dist", "run", "--ep", "2", "--device", "cpu", "ray.start_timeout_s=4"]
    begin = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=clean(RAY_ADDRESS=f"127.0.0.1:{port}")
    )
    assert time.monotonic() - begin < 20.0  # imports included
    assert done.returncode == 2
    said = f"ray.address = '127.0.0.1:{port}': something listens there, but did not answer as a Ray head within 2 s"
    assert said in only_line(done.stderr)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "refused"),
        ("nosuch.invalid:6379", "can't be joined"),
        ("127.0.0.1:99999", "can't be joined"),
        ("6379", "can't be joined"),
        ("ray://127.0.0.1:10001", "ranks need a driver inside the cluster"),
        ("http://127.0.0.1:8265", "ranks need a driver inside the cluster"),
    ],
)
def test_an_address_that_is_none(address: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        probe(address, 10.0)
    assert raised.value.field == "ray.address"
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("base", ["/tmp/" + "long" * 20, "/tmp/kürzer"])
@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_that_sockets_do_not_fit_in(
    name: str, base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, base)
    chosen = Path(cluster._short_folder())
    assert chosen.stat().st_mode & 0o777 == 0o700
    assert len(str(chosen).encode()) <= cluster.LONGEST_FOLDER
    assert capsys.readouterr().err == (
        f"moe-dist: {name} = {base!r} can't hold Ray's sockets (at most 36 bytes of ASCII): using {chosen}\n"
    )
    chosen.rmdir()


def test_a_signal_that_comes_while_ray_starts_ends_the_command_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own shutdown of a cluster that is half started took five seconds, and crashed now and then."""
    happened: list[Any] = []

    def interrupted(**_: Any) -> None:
        happened.append("ray.init")
        raise KeyboardInterrupt

    for name in cluster.AUTHENTICATION:
        monkeypatch.setenv(name, "before")  # which is there again afterwards, or not at all
    monkeypatch.setattr(cluster, "_users_own", {})
    monkeypatch.setattr(cluster, "_reread_authentication", lambda: None)
    monkeypatch.setattr(cluster, "_short_folder", lambda: "/nowhere")
    monkeypatch.setattr(cluster.ray, "init", interrupted)
    monkeypatch.setattr(cluster.atexit, "register", happened.append)
    with pytest.raises(KeyboardInterrupt):
        cluster._start(RaySpec())
    end, *later = happened
    assert later == ["ray.init"]
    monkeypatch.setattr(cluster.psutil.Process, "children", lambda *_, **__: [])
    monkeypatch.setattr(cluster, "_leave", happened.append)
    end()  # no signal has come
    monkeypatch.setattr(cluster, "code_after_signal", lambda: 130)
    end()
    assert happened[2:] == [130]


def test_a_folder_that_can_not_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nothing")
    with pytest.raises(ResourceError, match=r"place for Ray's files.*set RAY_TMPDIR"):
        cluster._short_folder()


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_folder_below_whatever_the_working_directory_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, "relative")
    with pytest.raises(ConfigError, match=f"{name} = 'relative'.*legal: an absolute path"):
        cluster._short_folder()
    assert list(tmp_path.iterdir()) == []


def test_a_token_that_others_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(0o644)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    cluster._make_token_file_private()
    assert token.stat().st_mode & 0o777 == 0o600
    assert "could be read by others (mode 644)" in capsys.readouterr().err

    def refused(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    token.chmod(0o644)
    monkeypatch.setattr(Path, "chmod", refused)
    with pytest.raises(ConfigError, match=r"others can read this file \(mode 644\)"):
        cluster._make_token_file_private()


def test_a_user_without_a_home_has_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    cluster._make_token_file_private()


def test_too_old_a_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "__version__", "2.51.1")
    with pytest.raises(ConfigError, match=r"ray = '2\.51\.1': this release has no token authentication"):
        cluster.connect(cluster.RaySpec())


@pytest.mark.parametrize("what", ["argument", "sys.path", "working directory"])
def test_what_ray_can_not_take_over_is_named(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda **_: pytest.fail("started"))
    if what == "argument":
        monkeypatch.setattr(sys, "argv", [*sys.argv, "x\udcff"])
    elif what == "sys.path":
        monkeypatch.syspath_prepend(str(tmp_path / "x\udcff"))
    else:
        (tmp_path / "x\udcff").mkdir()
        monkeypatch.chdir(tmp_path / "x\udcff")
    with pytest.raises(ConfigError, match=f"^{what} = .*no UTF-8 text"):
        cluster.connect(cluster.RaySpec())


@pytest.mark.parametrize("error", [RuntimeError("no"), ValueError("no"), TimeoutError("no")])
def test_a_cluster_that_never_was_is_not_lost(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", fail)
    monkeypatch.setattr(cluster, "_users_own", {})
    for name in cluster.AUTHENTICATION:
        monkeypatch.setenv(name, "mine")
    with pytest.raises(ResourceError, match=r"none that starts \(.*no\) available\. Ray's logs are in "):
        cluster.connect(cluster.RaySpec())


def test_what_starts_too_slowly_is_stopped() -> None:
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not up within 0\.2 s"), cluster._limit(0.2), suppress(TimeoutError):
        time.sleep(30)  # suppressed as Ray does where it tidies up
    assert time.monotonic() - begin < 5.0
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 0  # pytest-timeout's own is set again


@pytest.mark.slow
def test_a_first_worker_that_does_not_come_is_waited_for_within_the_start() -> None:
    """ray.init would wait in C++ for the workers that Ray starts beforehand, where no limit of Python's reaches it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_dist", "run", "--ep", "2", "--device", "cpu", "ray.start_timeout_s=15"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean(),
    )  # fmt: skip
    try:
        workers: list[psutil.Process] = []
        while not workers:
            assert process.poll() is None
            workers = [each for each in psutil.Process(process.pid).children(recursive=True) if is_worker(each)]
        workers[0].suspend()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 4, err
        assert "in starting (first sign of life)" in err
        assert "no answer within 15 s" in err
        assert wait_gone([each.pid for each in workers])[1] == []
    finally:
        process.kill()
        for each in workers:
            with suppress(psutil.Error):
                each.kill()


def is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return any(part.endswith("default_worker.py") for part in process.cmdline())
    return False


@pytest.mark.slow
def test_a_cluster_that_listens_beyond_the_loopback_interface_is_said() -> None:
    """As with a release of Ray that does not know the switch for that."""
    code = (
        "from contextlib import nullcontext; from moe_dist.runtime import cluster; "
        "from moe_dist.runtime.context import RaySpec; "
        "cluster._loopback_only = nullcontext; cluster.connect(RaySpec())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=clean())
    assert done.returncode == 0, done.stderr
    assert "listens beyond 127.0.0.1" in done.stderr
