"""A store on a port that was free because it is bound already: no other process can take it in between."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

LOOPBACK = "127.0.0.1"


def serve_store(host: str, world: int, timeout_s: float) -> tuple[TCPStore, int]:
    """Open the store on `host` alone (not on every interface) and return it with its port."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(4096)
    port = listener.getsockname()[1]
    store = TCPStore(
        host, port, world, True, timedelta(seconds=timeout_s), wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )  # fmt: skip
    return store, port


def reach_store(host: str, port: int, world: int, timeout_s: float) -> TCPStore:
    return TCPStore(host, port, world, False, timedelta(seconds=timeout_s), wait_for_workers=False)


def bind_gloo(host: str) -> None:
    """Make gloo use the interface of `host`. It would look the host's name up, which fails on many machines."""
    if host == LOOPBACK:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"


def open_sockets() -> set[str]:
    """This process's sockets, by the names that the kernel gives them."""
    return {name for name in _descriptors().values() if name.startswith("socket:")}


def break_sockets(names: set[str]) -> None:
    """End the connections over these sockets, under whoever waits at them. gloo has no abort of its own in torch: a
    blocked collective ends when its connection does, or at the timeout."""
    for descriptor, name in _descriptors().items():
        if name in names:
            with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                connection.getpeername()  # fails where it listens: gloo dies of a listener that doesn't
                connection.shutdown(socket.SHUT_RDWR)


def _descriptors() -> dict[int, str]:
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that was open to list them
            found[int(number)] = os.readlink(f"/proc/self/fd/{number}")
    return found
