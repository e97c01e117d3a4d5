"""This machine's network interfaces, and which of them leads where."""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass

from moe_dist.errors import ConfigError

ANY_PORT = 9  # of a datagram that is never sent


@dataclass(frozen=True)
class Interface:
    """`addresses`: IPv4 before IPv6, without link-local ones. `mbits`: its speed in Mbit/s, 0 where nobody knows."""

    name: str
    addresses: tuple[str, ...]
    up: bool
    mbits: int
    loopback: bool


def interfaces() -> list[Interface]:
    """All that have an address, the fastest first and the loopback one last."""
    import psutil  # here: who only runs a layer asks for no interface

    states, found = psutil.net_if_stats(), []
    for name, given in psutil.net_if_addrs().items():
        by_kind = {kind: [each.address.partition("%")[0] for each in given if each.family == kind]
                   for kind in (socket.AF_INET, socket.AF_INET6)}  # fmt: skip
        links = [address for address in by_kind[socket.AF_INET6] if not address.startswith("fe80")]
        addresses, state = (*by_kind[socket.AF_INET], *links), states.get(name)
        if addresses and state is not None:
            loopback = all(address == "::1" or address.startswith("127.") for address in addresses)
            found.append(Interface(name, addresses, state.isup, state.speed, loopback))
    return sorted(found, key=lambda each: (each.loopback, -each.mbits, each.name))


def interface_of(address: str) -> str | None:
    """The interface that is up and has this address; None where none has."""
    return next((each.name for each in interfaces() if each.up and address in each.addresses), None)


def address_of(interface: str) -> str:
    """The first address of an interface. Raises ConfigError for one that this machine does not have, or has without an
    address."""
    found = {each.name: each.addresses[0] for each in interfaces() if each.up}
    if interface not in found:
        rule = f"{socket.gethostname()} has no such interface that is up and has an address"
        raise ConfigError("ray.interface", interface, rule, list(found))
    return found[interface]


def address_towards(host: str) -> str | None:
    """This machine's address on the way to `host`, a name or an address; None where there is no way."""
    with suppress(OSError):
        kind, _, _, _, place = socket.getaddrinfo(host, ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as sender:
            sender.connect(place)  # of a datagram socket: sends nothing, and asks the kernel for the way
            return str(sender.getsockname()[0])
    return None


def own_addresses(host: str | None = None) -> list[str]:
    """What this machine's name resolves to, which is where gloo listens unless it is told an interface; empty where
    the name resolves to nothing."""
    try:
        found = socket.getaddrinfo(host or socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(address[0]) for *_, address in found))
