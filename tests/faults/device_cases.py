"""Faults in ranks on their devices: which, in which order, and what came of them, in rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from faults.bench import Bench
from faults.device_work import Setup, load, work
from faults.kinds import Fault

from moe_dist.runtime.context import RaySpec

KINDS = ("SIGKILL", "spin", "SIGSTOP", "raise", "tensor_memory", "stuck")
MODULES = ("faults.bench", "faults.device_work", "faults.inject", "faults.kinds", "faults.work")  # pickled by value
# Longer than anything that is promised here, and than one rank's kernels take to compile after another's.
SPEC = RaySpec(collective_timeout_s=30.0, start_timeout_s=120.0)
CALL_S = 180.0  # of loading too, which compiles
# Of four works, 0 and 1 of one exchange, 0 and 2 of one mode: each begins with two that differ in both.
ORDERS = ((0, 3, 1, 2), (1, 2, 0, 3), (3, 0, 2, 1), (2, 1, 3, 0))
Case = tuple[Fault, tuple[str, str]]


def cases(world: int, device: str, setup: Setup) -> list[Case]:
    """Every kind in every (exchange, mode). The first of them have each kind, and the first two of a kind have both
    exchanges and both modes. Rank, step and moment change from one to the next."""
    found: list[Case] = []
    for turn in range(len(setup.works)):
        for place, kind in enumerate(KINDS):
            number, of = len(found), setup.works[ORDERS[place % 4][turn]]
            moment = ("between", "launched")[(turn + place // 2) % 2] if kind != "stuck" else "between"
            rank = (place + turn) % world
            found.append((Fault(number, kind, moment, 1 + number % 8, rank, world, device=device), of))
    return found


def tried(
    planned: list[Case],
    setup: Setup,
    folder: Path,
    budget_s: float,
    left: Callable[[], list[str]] = list,
    keep: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each case that was begun within the budget, and for the first of each kind whatever they take; and what
    is wrong of all. `keep` gets the rows so far after each case."""
    begin, rows, wrong = time.monotonic(), [], []
    world, device = planned[0][0].world, planned[0][0].device
    given = {"load": load, "work": work, "given": (setup,), "works": setup.works, "left": left, "call_s": CALL_S}
    bench = Bench(world, device, SPEC, **given)
    ready_s = time.monotonic() - begin
    try:
        for fault, (exchange, mode) in planned:
            started = time.monotonic()
            if len(rows) >= len(KINDS) and started - begin > budget_s:
                break
            struck = replace(fault, marks=str(folder / str(fault.number)))
            outcome = bench.tried(struck, exchange, mode)
            found = outcome.wrong(bench.reference)
            wrong += [f"{struck} in {exchange}, {mode}: {each}: {outcome}" for each in found]
            times = {"ready_s": ready_s, "took_s": time.monotonic() - started}
            rows.append({"exchange": exchange, "mode": mode} | outcome.row() | times | {"wrong": found})
            print(struck, exchange, mode, outcome.error, outcome.named_s, outcome.gone_s, outcome.again_s, found,
                  flush=True)  # fmt: skip
            keep(rows)
    finally:
        bench.group.close()
    return rows, wrong
