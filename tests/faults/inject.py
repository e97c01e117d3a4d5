"""A fault in a rank, at its moment."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from faults.kinds import INPUTS, SLOW_S, Fault
from torch import Tensor

from moe_dist.model.routing import Routing
from moe_dist.runtime.sockets import break_sockets

CYCLES_PER_S = 2_000_000_000  # of a GPU's clock, at most about


class Left(Exception):
    """Ends the work of the rank that is to return early."""


class Injector:
    """Strikes once, on the fault's own rank. Without a context there is no group yet."""

    def __init__(self, fault: Fault, rank: int, context: Any = None) -> None:
        self._fault, self._context = fault, context
        self._mine = fault.kind != "none" and rank == fault.rank
        self._others = pids_of_others(context) if context is not None and fault.kind == "sockets" else []
        if self._mine and fault.moment == "collective" and context is not None:
            self._count, self._noted = 0, context.comm.noted
            context.comm.noted = self._note

    def at(self, moment: str, number: int | None = None) -> None:
        now = moment == self._fault.moment and number in (None, self._fault.at)
        if self._mine and now and self._fault.kind not in INPUTS:
            strike(self._fault, self._others)

    def _note(self, op: str, sequence: int) -> None:
        self._noted(op, sequence)
        if op:
            self._count += 1
            if self._count == self._fault.at + 1:
                strike(self._fault, self._others)

    @contextmanager
    def within(self, number: int, layer: Any) -> Iterator[None]:
        """Of a step: between its exchange and its arithmetic."""
        if not (self._mine and self._fault.moment == "captured" and number == self._fault.at):
            yield
            return
        forward = layer.backend.forward

        def struck(*arguments: Any) -> Any:
            strike(self._fault, self._others)
            return forward(*arguments)

        layer.backend.forward = struck
        try:
            yield
        finally:
            layer.backend.forward = forward

    def given(self, x_TH: Tensor, routing: Routing, number: int) -> tuple[Tensor, Routing]:
        """A step's inputs, corrupted where that is the fault."""
        if not self._mine or number != self._fault.at or self._fault.kind not in INPUTS:
            return x_TH, routing
        mark(self._fault)
        if self._fault.kind == "wrong_dtype":
            return x_TH.half(), routing
        ids_1K = torch.full((1, routing.ids_TK.shape[1]), 99, dtype=torch.int32)
        weights = torch.cat([routing.weights_TK, torch.ones_like(ids_1K, dtype=torch.float32)])
        return torch.cat([x_TH, x_TH.new_zeros(1, x_TH.shape[1])]), Routing(
            torch.cat([routing.ids_TK, ids_1K]), weights
        )


def mark(fault: Fault) -> None:
    """When, on the clock that all processes of a machine share, and which process."""
    with open(fault.marks, "w") as file:
        file.write(f"{time.monotonic()} {os.getpid()}")


def strike(fault: Fault, others: list[int]) -> None:
    kind = fault.kind
    mark(fault)
    if kind.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[kind])
        time.sleep(5)  # a stop may reach another thread first
    elif kind == "pause":
        subprocess.Popen(["/bin/sh", "-c", f"sleep 0.8; kill -CONT {os.getpid()}"], start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind in ("slow", "sleep"):
        time.sleep(SLOW_S if kind == "slow" else 120.0)
    elif kind == "exit_code":
        os._exit(7)
    elif kind == "sys_exit":
        sys.exit(3)
    elif kind == "raise":
        raise ValueError("on purpose")
    elif kind == "memory":
        bytearray(1 << 62)
    elif kind == "tensor_memory":
        torch.empty(1 << 50, dtype=torch.uint8, device=fault.device)
    elif kind == "stuck":
        _stick(fault.device)
    elif kind == "return":
        raise Left
    elif kind == "spin":
        _spin()
    elif kind == "spin_in_c":
        re.match(r"(a+)+$", "a" * 40 + "b")
    elif kind == "sockets":
        break_sockets(_connections_to(others))
    else:
        raise ValueError(f"no fault of the name {kind}")


def _stick(device: str) -> None:
    """Nothing that is launched from here on begins within two minutes."""
    if device == "cpu":
        time.sleep(120.0)
    else:
        torch.cuda._sleep(120 * CYCLES_PER_S)


def _spin() -> None:
    while True:
        pass


def pids_of_others(context: Any) -> list[int]:
    own = torch.tensor([[os.getpid()]], dtype=torch.int64)
    everyone = context.comm.all_gather([own])[0].flatten().tolist()
    return [pid for pid in everyone if pid != os.getpid()]


def _connections_to(pids: list[int]) -> set[str]:
    """This process's sockets whose other ends belong to these processes, by the kernel's names."""
    ends = {each.laddr for pid in pids for each in psutil.Process(pid).net_connections("tcp")}
    found = set()
    for each in psutil.Process().net_connections("tcp"):
        if each.raddr and each.raddr in ends and each.fd >= 0:
            found.add(os.readlink(f"/proc/self/fd/{each.fd}"))
    return found
