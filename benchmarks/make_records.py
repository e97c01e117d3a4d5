"""moe_dist/records_shipped from the recorded files: python benchmarks/make_records.py. A test compares the two.

What `auto` needs of a row, one line each. The files whose rows are shipped are named here: those of the last code that
each setting was measured with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_dist.engine.records import KEYS, SHIPPED

FOLDER = Path(__file__).parent
NAMES = (
    "2026-11-22-h200x4", "2026-11-27-h200x2-backends", "2026-11-28-h200x2-compare", "2026-11-28-h200x2-sweep",
    "2026-11-28-h200x4-nvlink",
)  # fmt: skip


def main() -> None:
    SHIPPED.mkdir(exist_ok=True)
    for name in NAMES:
        (SHIPPED / f"{name}.json").write_text(shipped(name))


def shipped(name: str) -> str:
    """The text of a shipped record."""
    document: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    head = {key: document[key] for key in ("date", "commit", "command")}
    head |= {"machine": {key: document["machine"].get(key) for key in ("gpu", "count", "torch", "triton")}}
    rows = [{key: row[key] for key in KEYS if key in row} for row in document["rows"]]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows if row.get("p50_us"))
    opening = json.dumps(head, indent=1).removesuffix("\n}")
    return f'{opening},\n "rows": [\n{lines}\n ]\n}}\n'


if __name__ == "__main__":
    main()
