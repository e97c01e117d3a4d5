"""`--lines`: results as JSON, an object a line, each written when it is there."""

from __future__ import annotations

import json
from typing import Any

from moe_dist.bench.row import Failed, Provenance, Refused, Result, Row

KINDS: dict[type[Result], str] = {Provenance: "run", Row: "row", Refused: "refused", Failed: "failed"}
LINES_BEGIN = '{"kind": "run"'
LISTS = {"row": "rows", "refused": "refused", "failed": "failed"}


def line(result: Result) -> str:
    """Its keys behind `kind`: run, row, refused or failed."""
    found = {"kind": KINDS[type(result)]} | result.model_dump(mode="json")
    return json.dumps(found, allow_nan=False) + "\n"


def read_document(text: str) -> Any:
    """What a results file holds, of either form. Of lines it is the last run's document as far as they tell it: keys of
    the run, and `rows`, `refused` and `failed`. Raises ValueError."""
    if not text.startswith(LINES_BEGIN):
        return json.loads(text)
    found: dict[str, Any] = {"rows": [], "refused": [], "failed": []}
    for entry in map(json.loads, text.splitlines()):
        kind = entry.pop("kind", None) if isinstance(entry, dict) else None
        if kind == "run":
            found.update(entry)
        elif kind in LISTS:
            found[LISTS[kind]].append(entry)
        else:
            raise ValueError("a line of it is no run, row, refused or failed case")
    return found
