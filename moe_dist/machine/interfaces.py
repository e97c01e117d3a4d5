"""This machine's network interfaces, and which of them leads where."""

from __future__ import annotations

import socket
from contextlib import suppress

from moe_dist.errors import ConfigError

ANY_PORT = 9  # of a datagram that is never sent


def interfaces() -> dict[str, tuple[str, ...]]:
    """The addresses of each interface that is up, IPv4 before IPv6."""
    import psutil  # here: who only runs a layer asks for no interface

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        kinds = (socket.AF_INET, socket.AF_INET6)
        if name in up:
            found[name] = tuple(each.address.partition("%")[0] for kind in kinds for each in addresses
                                if each.family == kind)  # fmt: skip
    return found


def interface_of(address: str) -> str | None:
    """The interface that has this address; None where none has."""
    return next((name for name, addresses in interfaces().items() if address in addresses), None)


def address_of(interface: str) -> str:
    """The first address of an interface. Raises ConfigError for one that this machine does not have, or has without an
    address."""
    found = interfaces()
    if not found.get(interface):
        rule = f"{socket.gethostname()} has no such interface that is up and has an address"
        raise ConfigError("ray.interface", interface, rule, [name for name, addresses in found.items() if addresses])
    return found[interface][0]


def address_towards(host: str) -> str | None:
    """This machine's address on the way to `host`, a name or an address; None where there is no way."""
    with suppress(OSError):
        kind, _, _, _, place = socket.getaddrinfo(host, ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as sender:
            sender.connect(place)  # of a datagram socket: sends nothing, and asks the kernel for the way
            return str(sender.getsockname()[0])
    return None
