"""Where the ranks of a process group find each other: a store on a port that was free because it is bound already, so
no other process can take it in between."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from moe_dist.comm.network import LOOPBACK, use_network_of
from moe_dist.errors import ConfigError, RankFailure
from moe_dist.machine.interfaces import address_towards

MOST_PORT = 65535
LEAST_TIMEOUT_S = 0.001  # process groups count whole milliseconds, and take none as no limit
LONGEST_TIMEOUT_S = 1e9  # thirty years: a deadline in nanoseconds still fits into 64 bits


class Meeting:
    """For ranks that a program starts by itself, as Ray actors or any other processes. One process opens it, best that
    of rank 0, and keeps it as long as the group. Every rank, that one too, goes to its `address` with `Comm.join`."""

    def __init__(self, world: int, host: str = LOOPBACK, timeout_s: float = 60.0) -> None:
        """For `world` ranks. It listens on `host` alone, an address of this machine that all ranks reach; the default
        is for ranks of one machine. `timeout_s` bounds its own waits. Raises ConfigError for a number of ranks that
        can't be, for such a timeout and for a host that this machine does not have."""
        check_ranks(0, world)
        check_timeout(timeout_s)
        try:
            self._store, self.port = serve_store(host, world, timeout_s)
        except OSError as error:
            legal = "an address of this machine"
            raise ConfigError("host", host, f"can't be listened on: {error}", legal) from None
        self.address = f"{host}:{self.port}"


def check_ranks(rank: int, world: int) -> None:
    """Raise ConfigError unless `rank` is one of `world` ranks."""
    if type(world) is not int or world < 1:
        raise ConfigError("world", world, "is the number of ranks", "1 and more")
    if type(rank) is not int or not 0 <= rank < world:
        raise ConfigError("rank", rank, f"is no rank of {world}", f"0 to {world - 1}")


def check_timeout(timeout_s: float) -> None:
    """Raise ConfigError for seconds that no process group takes."""
    if type(timeout_s) not in (int, float) or not LEAST_TIMEOUT_S <= timeout_s <= LONGEST_TIMEOUT_S:
        legal = f"seconds, {LEAST_TIMEOUT_S} to {LONGEST_TIMEOUT_S:.0f}"
        raise ConfigError("timeout_s", timeout_s, "bounds every collective", legal)


def go_to(address: str, rank: int, world: int, timeout_s: float) -> TCPStore:
    """The store of a Meeting. Raises ConfigError for what is no address, RankFailure where nobody listens there within
    `timeout_s`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= MOST_PORT:
        raise ConfigError("address", address, "is not that of a Meeting", f"host:port, the port 1 to {MOST_PORT}")
    use_network_of(address_towards(host))
    try:
        return reach_store(host, int(port), world, timeout_s)
    except Exception as error:
        cause = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise RankFailure(rank, f"meeting at {address}", 0, cause[0][:300]) from error


def serve_store(host: str, world: int, timeout_s: float) -> tuple[TCPStore, int]:
    """Open the store on `host` alone (not on every interface) and return it with its port."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind((host, 0))
        listener.listen(4096)
    except OSError:
        listener.close()
        raise
    port = listener.getsockname()[1]
    store = TCPStore(
        host, port, world, True, timedelta(seconds=timeout_s), wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )  # fmt: skip
    return store, port


def reach_store(host: str, port: int, world: int, timeout_s: float) -> TCPStore:
    return TCPStore(host, port, world, False, timedelta(seconds=timeout_s), wait_for_workers=False)
