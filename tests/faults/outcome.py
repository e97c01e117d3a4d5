"""What came of a fault, whether that is right, and the figures of a whole run."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from faults.kinds import KINDS, Fault

GONE_S = 5.0  # for processes to be gone after the error


@dataclass
class Outcome:
    """`error`: its type's name, "" where results came. `rank`: the one that the error names. `named_s`: from the fault
    to the error, `gone_s`: from there until no process of the group was left, `again_s`: until its successors were
    ready. `left`: what was left behind."""

    fault: Fault
    runtime: str
    error: str = ""
    rank: int | None = None
    op: str = ""
    seq: int | None = None
    cause: str = ""
    named_s: float | None = None
    gone_s: float | None = None
    again_s: float | None = None
    results: Sequence[str] = ()
    left: list[str] = field(default_factory=list)

    def wrong(self, reference: Sequence[str]) -> list[str]:
        """Everything about it that is not as promised."""
        fault, kind, found = self.fault, KINDS[self.fault.kind], list(self.left)
        if self.error != kind.error:
            found.append(f"ended with {self.error or 'results'}, not with {kind.error or 'results'}")
        elif not self.error and list(self.results) != list(reference):
            found.append("other results than without a fault")
        elif self.error:
            # Where torchrun's SIGTERM has ended ranks that were still importing, all that are gone are named.
            gone = self.runtime == "torchrun" and f"rank {fault.rank}," in self.cause.replace(", which", ",")
            if self.rank != fault.rank and not (kind.any_rank or (fault.moment == "before" and gone)):
                found.append(f"rank {self.rank} was named")
            if self.error == "RankFailure" and not re.match(kind.cause, self.cause) and fault.moment != "before":
                found.append(f"its cause does not match {kind.cause}")
            if self.error == "RankFailure" and (not self.op or self.seq is None):
                found.append("operation or sequence number are missing")
            if self.named_s is None or self.named_s > fault.promise_s:
                found.append(f"named after {self.named_s} s, where {fault.promise_s:g} are promised")
        return found

    def row(self) -> dict[str, Any]:
        fault = {name: value for name, value in asdict(self.fault).items() if name not in ("marks", "device")}
        rest = {name: value for name, value in asdict(self).items() if name not in ("fault", "results", "left")}
        return fault | {"promise_s": self.fault.promise_s} | rest


def marked(fault: Fault) -> tuple[float, int] | None:
    """When the fault happened, and in which process; None where it did not."""
    try:
        when, pid = Path(fault.marks).read_text().split()
    except (OSError, ValueError):
        return None
    return float(when), int(pid)


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def wait_gone(pids: Iterable[int]) -> tuple[float, list[str]]:
    """How long until all of these processes were gone, and those that were not within GONE_S."""
    begin, left = time.monotonic(), set(pids)
    while True:
        left = {pid for pid in left if lives(pid)}
        passed = time.monotonic() - begin
        if not left or passed > GONE_S:
            return passed, [f"process {pid} is still there" for pid in sorted(left)]
        time.sleep(0.02)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each runtime and kind: how many, and how long until they were named."""
    found = []
    for runtime, kind in sorted({(row["runtime"], row["kind"]) for row in rows}):
        own = [row for row in rows if (row["runtime"], row["kind"]) == (runtime, kind)]
        entry: dict[str, Any] = {"runtime": runtime, "kind": kind, "count": len(own)}
        seconds = sorted(row["named_s"] for row in own if row["named_s"] is not None)
        if seconds and KINDS[kind].error:
            entry |= {
                "median_s": round(statistics.median(seconds), 2),
                "p95_s": round(seconds[math.ceil(0.95 * len(seconds)) - 1], 2),
                "max_s": round(seconds[-1], 2),
                "promise_s": max(row["promise_s"] for row in own),
            }
        found.append(entry)
    return found


def keep(part: str, document: dict[str, Any]) -> None:
    """One part of a run's figures, where MOE_DIST_FAULTS_OUT names a folder for them."""
    if folder := os.environ.get("MOE_DIST_FAULTS_OUT"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, f"{part}.json").write_text(json.dumps(document, indent=1))
