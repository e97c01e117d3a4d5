"""Which network interface gloo and NCCL use. Each would choose one by itself: gloo by the host's name, which on many
machines leads nowhere or to the loopback interface, NCCL by the names of interfaces."""

from __future__ import annotations

import os

from moe_dist.machine.interfaces import interface_of
from moe_dist.machine.network import GLOO, NCCL

LOOPBACK = "127.0.0.1"

_ours: dict[str, str] = {}  # what was set here; anything else in these variables is the user's


def use_network_of(address: str | None, named: bool = False) -> None:
    """Make gloo and NCCL use the interface of `address`, which is one of this machine's; the next process groups do.
    What the user has set in their variables stays, unless the interface was `named` for these ranks. An address that is
    no interface's here changes nothing."""
    if address == LOOPBACK:
        _set(GLOO, "lo", True)  # NCCL joins GPUs of one machine without a network
        return
    interface = interface_of(address) if address else None
    if interface is not None:
        _set(GLOO, interface, named)
        _set(NCCL, f"={interface}", named)  # exactly this one: NCCL takes eth for eth0 and eth1


def _set(name: str, value: str, anyway: bool) -> None:
    if anyway or os.environ.get(name) in (None, _ours.get(name)):
        os.environ[name] = _ours[name] = value


def network_said() -> str:
    """The interfaces that these variables name, as the end of a message; empty where they name none."""
    named = [f"{name}={os.environ[name]}" for name in (GLOO, NCCL) if os.environ.get(name, "lo") != "lo"]
    return f" ({', '.join(named)})" if named else ""
