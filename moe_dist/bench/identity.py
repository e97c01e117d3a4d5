"""Which case a row is of: a key that two rows share only where everything that decides them is the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from moe_dist.backends import BACKENDS
from moe_dist.bench.case import Case
from moe_dist.engine.plan import Plan
from moe_dist.machine.switches import debug_asked_for
from moe_dist.messages.notices import collecting
from moe_dist.tables import find_table

PACKAGE = Path(__file__).parents[1]
DIGITS = 32


def case_key(case: Case, plan: Plan, runtime: str) -> str:
    """The first DIGITS of the SHA-256 of canonical JSON: the whole case; what the plan made of it, with the tuning
    tables that this machine has for it; the files of its checkpoint by name, size and time of change; what starts the
    ranks; and whether the debug mode is on, which takes time in every step."""
    labels = {
        "parallel": plan.parallel.label,
        "token_layout": plan.token_layout,
        "choices": [asdict(replace(choice, why="")) for choice in plan.choices],
        "combine_dtype": plan.combine_dtype,
        "graph": plan.graph,
    }
    return digest(
        {
            "case": case.model_dump(mode="json", exclude={"profile", "record_routing"}),  # change no time
            "plan": labels,
            "tables": _tables(plan),
            "checkpoint": _files(case.source.checkpoint),
            "runtime": runtime,
            "debug": debug_asked_for(),
        }
    )


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:DIGITS]


def _tables(plan: Plan) -> list[Any]:
    backend = BACKENDS.get(plan.backend)
    with collecting():  # ranks look for the same tables, and say what is to be said of them
        found = [find_table(part.shape, backend.table_revision) for part in plan.parts()]
    return [table and table.document() for table in found]


def _files(checkpoint: str | None) -> list[tuple[str, int, int]]:
    if checkpoint is None:
        return []
    files = ((path.name, path.stat()) for path in sorted(Path(checkpoint).iterdir()) if path.is_file())
    return [(name, status.st_size, status.st_mtime_ns) for name, status in files]


@cache
def code_digest() -> str:
    """Of every file of this package: a commit with changes, or an installation without one, may be any code."""
    total = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            total.update(f"{path.relative_to(PACKAGE)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return total.hexdigest()[:DIGITS]
