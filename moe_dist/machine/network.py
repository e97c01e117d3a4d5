"""Which network interface gloo and NCCL take, and what to set where they take a wrong one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from moe_dist.machine.interfaces import Interface

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


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
