"""Network interfaces: which there are, which one gloo and NCCL take, and what to set where they take a wrong one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


@dataclass(frozen=True)
class Interface:
    """`addresses`: IPv4 and IPv6, without link-local ones. `mbits`: its speed in Mbit/s, 0 where nobody knows."""

    name: str
    addresses: tuple[str, ...]
    up: bool
    mbits: int
    loopback: bool


def interfaces() -> list[Interface]:
    """All that have an address, the loopback one last."""
    import psutil

    states, found = psutil.net_if_stats(), []
    for name, given in psutil.net_if_addrs().items():
        addresses = tuple(
            each.address.partition("%")[0]
            for each in given
            if each.family == socket.AF_INET or (each.family == socket.AF_INET6 and not each.address.startswith("fe80"))
        )
        state = states.get(name)
        if addresses and state is not None:
            loopback = all(address == "::1" or address.startswith("127.") for address in addresses)
            found.append(Interface(name, addresses, state.isup, state.speed, loopback))
    return sorted(found, key=lambda each: (each.loopback, -each.mbits, each.name))


def own_addresses(host: str | None = None) -> list[str]:
    """What this machine's name resolves to, which is where gloo listens unless it is told an interface; empty where
    the name resolves to nothing."""
    try:
        found = socket.getaddrinfo(host or socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def gloos_choice(here: Iterable[Interface], addresses: Iterable[str]) -> Interface | None:
    """The interface of the machine's own name; None where it is on none of them, as in many containers."""
    by_address = {address: each for each in here for address in each.addresses}
    return next((by_address[address] for address in addresses if address in by_address), None)


def chosen_by(variable: str, text: str, here: Iterable[Interface]) -> list[str]:
    """The interfaces that a variable's value takes. NCCL's names are beginnings of names, "=name" is that one alone,
    and "^" in front takes all others; gloo's are names, separated by commas."""
    names = [each.name for each in here]
    if variable == GLOO:
        return [name for name in text.split(",") if name in names]
    without, text = text.startswith("^"), text.removeprefix("^")
    exact, text = text.startswith("="), text.removeprefix("=")
    listed = [part for part in text.split(",") if part]
    taken = [name for name in names if any(name == part if exact else name.startswith(part) for part in listed)]
    return [name for name in names if name not in taken] if without else taken


def settings(name: str, names: Iterable[str]) -> dict[str, str]:
    """The variables that make gloo and NCCL use one interface. NCCL takes the beginning of a name, so that one which
    another begins with gets a "="."""
    alone = not any(other != name and other.startswith(name) for other in names)
    return {GLOO: name, NCCL: name if alone else f"={name}"}


def wrong_settings(here: Iterable[Interface], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variable to value, of those that are set to what takes no interface of this machine."""
    known = list(here)
    return {
        variable: environment[variable]
        for variable in (GLOO, NCCL)
        if environment.get(variable) and not chosen_by(variable, environment[variable], known)
    }
