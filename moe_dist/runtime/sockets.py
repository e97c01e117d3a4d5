"""The sockets of this process, and the end of connections that somebody waits at."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


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
