"""Two nodes of a Ray cluster on this machine: each has network interfaces, processes and a host name of its own, in
Linux namespaces that are made here and end here. One cable joins them."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
HEAD, WORKER = "10.89.7.1", "10.89.7.2"  # inside of the namespaces only, so that nothing outside can have them
GCS = f"{HEAD}:6379"
GPUS = 4  # that the worker says it has, and the head none
START_S = 60.0


def unavailable() -> str:
    """Why there can be no such nodes here; empty: there can."""
    if shutil.which("ip") is None or shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return "needs the commands ip, unshare and nsenter"
    if not RAY.exists():
        return f"no `ray` command beside {sys.executable}"
    name = f"md-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode != 0:
        return f"network namespaces can't be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


class Node:
    """One of the two. `cable`: the name of its network interface."""

    def __init__(self, number: int, address: str, directory: Path, environment: dict[str, str]) -> None:
        self.name, self.cable, self.address = (
            f"md{number}-{os.getpid()}",
            f"mdc{number}x{os.getpid() % 100_000}",
            address,
        )
        self.directory, self.environment = directory / str(number), environment
        self.directory.mkdir()
        self.process: subprocess.Popen[bytes] | None = None
        run("ip", "netns", "add", self.name)

    def wire(self) -> None:
        run("ip", "-n", self.name, "addr", "add", f"{self.address}/24", "dev", self.cable)
        run("ip", "-n", self.name, "link", "set", "lo", "up")
        run("ip", "-n", self.name, "link", "set", self.cable, "up")

    def start(self, *options: str) -> None:
        """Its raylet, which starts everything else on it; all of that ends with the first process of the namespace."""
        ray = [
            RAY, "start", "--block", "--disable-usage-stats", f"--node-ip-address={self.address}", "--num-cpus=2",
            "--object-store-memory=100000000", f"--temp-dir={self.directory}", *options,
        ]  # fmt: skip
        log = self.directory / "log"
        with open(log, "wb") as said:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, "unshare", "--pid", "--uts", "--fork", "--mount-proc",
                 "--kill-child", "sh", "-c", f"hostname {self.name}; exec \"$@\"", "sh", *ray],
                env=self.environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_S
        while b"Ray runtime started" not in log.read_bytes():
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def popen(self, *command: str | Path, **environment: str) -> subprocess.Popen[str]:
        """A command on this node, beside its raylet."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        first = children.read_text().split()[0]
        return subprocess.Popen(
            ["nsenter", "-t", first, "-n", "-p", "-m", "-u", *map(str, command)],
            env=self.environment | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/tmp",
        )  # fmt: skip

    def kill(self) -> None:
        """As if its power failed, but that its kernel still refuses connections."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(timeout=20)
            self.process = None

    def cut(self) -> None:
        """Pull its cable."""
        run("ip", "-n", self.name, "link", "set", self.cable, "down")

    def end(self) -> None:
        self.kill()
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)


class Cluster:
    """`head` and `worker`, with two CPUs each. Use as a context manager."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="md-", dir="/tmp"))  # Ray's sockets need a short path
        own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MOE_DIST_", "GLOO_"))}
        environment = own | {
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PYTHONPATH": str(ROOT), "RAY_ADDRESS": GCS,
        }  # fmt: skip
        self.head, self.worker = (
            Node(number, address, self.directory, environment) for number, address in ((1, HEAD), (2, WORKER))
        )

    def __enter__(self) -> Cluster:
        try:
            ours, theirs = ((node.cable, "netns", node.name) for node in (self.head, self.worker))
            run("ip", "link", "add", *ours, "type", "veth", "peer", "name", *theirs)
            for node in (self.head, self.worker):
                node.wire()
            self.head.start("--head", "--port=6379", "--include-dashboard=false")
            self.start_worker()
        except BaseException:
            self.__exit__()
            raise
        return self

    def start_worker(self) -> None:
        """Again, where it was killed or cut off."""
        self.worker.kill()
        run("ip", "-n", self.worker.name, "link", "set", self.worker.cable, "up")
        self.worker.start(f"--address={GCS}", f"--num-gpus={GPUS}")

    def __exit__(self, *_: object) -> None:
        for node in (self.worker, self.head):
            node.end()
        with suppress(OSError):
            shutil.rmtree(self.directory)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=20)


def finish(process: subprocess.Popen[str], timeout_s: float) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command; it is ended where it takes longer."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"not done within {timeout_s:g} s: {out}{err}") from None
    return process.returncode, out, err
