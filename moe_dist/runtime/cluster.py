"""The Ray cluster under the ranks: joined, or started for this process alone; closed to strangers, and watched.

Whoever reaches a Ray cluster can run code on it. A private one therefore has token authentication whatever the
environment says, with a token of its own that is never written down, and listens on the loopback interface.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import signal
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import ray
from ray._private import ray_constants

from moe_dist.comm.network import LOOPBACK
from moe_dist.errors import ClusterLost, ConfigError, MoeDistError, ResourceError
from moe_dist.exits.exit_codes import CLUSTER_LOST
from moe_dist.exits.signals import came, code_after_signal, starting
from moe_dist.files import require_text
from moe_dist.messages import logs
from moe_dist.runtime.context import RaySpec
from moe_dist.runtime.probe import probe
from moe_dist.runtime.pulse import stopped
from moe_dist.runtime.services import Greeter

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to anyone, unless the user asked for them
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of other ranks: the group's one error says what counts

OLDEST_RAY = (2, 52)  # the first with token authentication
LONGEST_FOLDER = 40  # bytes: what Ray appends for its sockets is up to 65, and a Unix socket's path holds 107
AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_K8S_TOKEN_AUTH")
SERVERS = {"gcs_server": "head (GCS)", "raylet": "node (raylet)"}  # by Ray's kinds of processes
AGAIN_S = 2.0

_users_own: dict[str, str | None] = {}  # the environment before a private cluster's token took its place


def connect(spec: RaySpec | None = None) -> None:
    """Join a running Ray cluster, or start a private one on this machine that ends with this process.

    Raises ConfigError for an address that can't be joined and for what Ray can't take over from this process,
    ResourceError where Ray finds no place or does not start, all of them within `spec.start_timeout_s`.
    """
    if ray.is_initialized():
        return
    spec = spec or RaySpec()
    found = tuple(int(part) for part in ray.__version__.split(".")[:2] if part.isdigit())
    if found < OLDEST_RAY:
        raise ConfigError("ray", ray.__version__, "this release has no token authentication", "2.52 and newer")
    _require_text()
    address = spec.address or os.environ.get("RAY_ADDRESS")
    with nullcontext() if spec.verbose else _quiet(), _kept_signal(signal.SIGTERM):
        if address and address != "local":
            _join(address, spec)
        else:
            _start(spec)


def _logging(spec: RaySpec) -> dict[str, Any]:
    """Nothing that the user can't act on, unless it is asked for."""
    return {"logging_level": logging.INFO if spec.verbose else logging.ERROR, "log_to_driver": spec.verbose}


def _require_text() -> None:
    """Ray hands these on to ranks, as UTF-8 only."""
    with suppress(FileNotFoundError):  # a working directory that is gone is somebody else's error
        require_text("working directory", os.getcwd(), "folder that Ray starts in")
    for field, values in (("argument", sys.argv), ("sys.path", sys.path)):
        for value in values:
            require_text(field, value)


def _join(address: str, spec: RaySpec) -> None:
    timeout_s = spec.start_timeout_s
    for name, value in _users_own.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    _users_own.clear()
    _make_token_file_private()
    found = probe(address, timeout_s / 2)
    if found.token_wanted:
        os.environ["RAY_AUTH_MODE"] = "token"  # what is there is a Ray head, wants a token, and the user has one
    _reread_authentication()
    legal = "host:port of a running head, or auto"
    try:
        with starting(_end_children), _limit(timeout_s / 2):
            ray.init(address=found.address, **_logging(spec))
    except Exception as error:
        with suppress(Exception):
            ray.shutdown()
        raise ConfigError("ray.address", address, f"can't be joined: {first_line(error)}", legal) from error


def _start(spec: RaySpec) -> None:
    for name in AUTHENTICATION:
        _users_own.setdefault(name, os.environ.pop(name, None))
        os.environ.pop(name, None)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # Else ray.init waits in C++, without an end, for a first worker that ranks may never use.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    _reread_authentication()
    folder = _short_folder()
    # Called before Ray's own, which was registered when Ray was imported; a signal may come while Ray starts, too.
    atexit.register(_end_after_signal)
    try:
        # Ray waits in C++ until the raylet is up, on a busy machine for many seconds, and no handler of Python's runs.
        with starting(_end_children), _limit(spec.start_timeout_s), _loopback_only():
            ray.init(
                address="local",  # without it Ray would join any cluster that `ray start` left a note of here
                include_dashboard=False, object_store_memory=100 << 20, configure_logging=spec.verbose,
                _temp_dir=folder, _node_ip_address=LOOPBACK, **_logging(spec),
            )  # fmt: skip
    except MoeDistError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, TimeoutError):
            raise _no_place(folder, error) from error
        with suppress(Exception):
            ray.shutdown()
        found = f"none that starts ({first_line(error)})"
        raise ResourceError("Ray", "a cluster on this machine", found, f"Ray's logs are in {folder}.") from error
    if places := _open_to_the_network():
        say(f"this release of Ray listens beyond 127.0.0.1 ({', '.join(places)}); its token is what guards it")


def _open_to_the_network() -> list[str]:
    """Where the private cluster's processes listen but for the loopback interface: `_loopback_only` leans on a switch
    that another release of Ray may not have."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                address = connection.laddr
                if connection.status == psutil.CONN_LISTEN and address.ip not in (
                    LOOPBACK,
                    "::1",
                    f"::ffff:{LOOPBACK}",
                ):
                    found.add(f"{address.ip}:{address.port}")
    return sorted(found)


def _no_place(folder: str, error: OSError) -> ResourceError:
    hint = f"{error.strerror or first_line(error)}; set RAY_TMPDIR to a folder with a short path."
    return ResourceError("place for Ray's files", "a folder that can be written to", error.filename or folder, hint)


def _reread_authentication() -> None:
    """Ray reads these variables once, when it is imported; this process may have imported it under others."""
    raylet: Any = ray._raylet
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _make_token_file_private() -> None:
    """A token that others can read is none. As ssh does with keys, but what is ours is mended."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    try:
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        mode = path.stat().st_mode
    except (OSError, RuntimeError):  # RuntimeError: this user has no home directory, so no token in it
        return
    if not stat.S_ISREG(mode) or not mode & 0o077:
        return
    try:
        path.chmod(0o600)
    except OSError as error:
        rule = f"others can read this file (mode {stat.S_IMODE(mode):o}): {error.strerror}"
        raise ConfigError("RAY_AUTH_TOKEN_PATH", str(path), rule, "a file of your own with mode 600") from None
    say(f"{path} could be read by others (mode {stat.S_IMODE(mode):o}); it is private now (mode 600)")


def _short_folder() -> str:
    """Where Ray's logs and sockets go: its own choice, unless that is too long for sockets or not ASCII."""
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    base = os.environ.get(name) or "/tmp"
    if not os.path.isabs(base):
        raise ConfigError(
            name, base, "Ray's files would go below whatever folder this is started in", "an absolute path"
        )
    folder = os.path.join(base, "ray")
    try:
        if folder.isascii() and len(folder) <= LONGEST_FOLDER:
            os.makedirs(folder, exist_ok=True)
            return folder
        chosen = tempfile.mkdtemp(prefix="moe-dist-", dir="/tmp")
    except OSError as error:
        raise _no_place(folder, error) from error
    say(f"{name} = {base!r} can't hold Ray's sockets (at most {LONGEST_FOLDER - 4} bytes of ASCII): using {chosen}")
    return chosen


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Ray's own switch of macOS and Windows, where its local clusters listen on the loopback interface. On Linux it
    would take the machine's address even where 127.0.0.1 was asked for, and listen on every interface."""
    before = getattr(ray_constants, "ENABLE_RAY_CLUSTER", None)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray prints its services' deaths to standard output even with log_to_driver=False; we say it ourselves."""
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    logger = logging.getLogger("ray")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(max(before, logging.ERROR))


@contextmanager
def _kept_signal(number: signal.Signals) -> Iterator[None]:
    """ray.init takes SIGTERM over, with an exit code of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)
    try:
        yield
    finally:
        if callable(before):
            signal.signal(number, before)


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """TimeoutError inside after so long, as far as the main thread's Python can be interrupted; Ray's waits are short
    ones in loops."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"Ray was not up within {seconds:g} s (ray.start_timeout_s)")

    handler = signal.signal(signal.SIGALRM, over)
    # Again and again: Ray may catch it where it tidies up.
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    deadline = time.monotonic() + seconds
    try:
        yield
        if time.monotonic() > deadline:
            over(0, None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)


class Watch:
    """Notices within seconds that the cluster is gone. Ray itself tries for a minute to reach it again, then aborts."""

    def __init__(self, silence_timeout_s: float) -> None:
        node: Any = ray._private.worker._global_node
        self.address = node.gcs_address
        places = dict(zip(SERVERS.values(), (self.address, _raylet_address(node)), strict=True))
        self._own = dict(node.all_processes)  # by kind; empty if we joined
        self._all = psutil.Process().children(recursive=True) if self._own else []
        reached = {name: place for name, place in places.items() if place}
        self._greeter = Greeter(reached, silence_timeout_s, self._stopped)

    def seen_all(self) -> None:
        """Remember the processes that are there now: they end with a private cluster that breaks."""
        if self._own:
            self._all = psutil.Process().children(recursive=True)

    def check(self, doing: str, suspicious: bool = False) -> None:
        """Raise ClusterLost if the cluster is gone. `suspicious`: a rank died, so ask at once, and once is enough."""
        if suspicious and not self._greeter.causes:
            self._greeter.ask()
        if not self._greeter.causes:
            return
        self._abandon()
        name, cause = next(iter(self._greeter.causes.items()))
        raise ClusterLost(self.address, doing, f"its {name} {cause}")

    def ends_by_signal(self) -> bool:
        """Whether a signal ends this process, and a private cluster with it. What sends one to a whole group of
        processes (`timeout`, a terminal that is closed) has sent it to that cluster's head too, and Ray would wait for
        it."""
        return bool(self._own) and came()

    def close(self) -> None:
        self._greeter.close()

    def _stopped(self) -> str | None:
        """Which server of a private cluster is."""
        for kind, name in SERVERS.items():
            if any(stopped(each.process.pid) for each in self._own.get(kind, ())):
                return name
        return None

    def _abandon(self) -> None:
        """Without its cluster, Ray's shutdown takes ten seconds and may crash this process: it ends without Ray's
        leave, with the exit code of a lost cluster. What is left of a private cluster is ended here."""
        for process in self._all:
            with suppress(psutil.Error):
                process.kill()
        atexit.register(_leave)  # the last to be registered is the first to run


def _leave(code: int = CLUSTER_LOST) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)


def _end_after_signal() -> None:
    """Where a signal has ended the command, its private cluster goes with it at once: Ray's shutdown takes five seconds
    for that, and may crash on one that is half started. All of its processes are children of this one."""
    if (code := code_after_signal()) is not None:
        _end_children()
        _leave(code)


def _end_children() -> None:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.kill()


def _raylet_address(node: object) -> str | None:
    own = ray.get_runtime_context().get_node_id()
    for found in ray.nodes():
        if found["NodeID"] == own:
            return f"{found['NodeManagerAddress']}:{found['NodeManagerPort']}"
    return None


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def say(text: str) -> None:
    logs.write(text)
