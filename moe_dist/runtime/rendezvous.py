"""A store on a port that was free because it is bound already: no other process can take it in between."""

from __future__ import annotations

import os
import socket
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
