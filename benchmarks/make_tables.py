"""docs/performance.md from the recorded files: python benchmarks/make_tables.py. A test compares the two."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import wrap
from typing import Any

from moe_dist.report.formats import markdown_table

FOLDER = Path(__file__).parent
TARGET = FOLDER.parent / "docs" / "performance.md"
HEAD = """# Performance: all recorded tables

Made from the files in [benchmarks/](../benchmarks) by `python benchmarks/make_tables.py`; nothing here is written by
hand. Times are µs, p50, an iteration being as long as its slowest rank; the fastest of a line is bold. `floor` is the
larger of arithmetic and weight traffic on the busiest rank, exchange not counted; where placements differ in it, it is
the smallest. Tokens are those of one rank. Stages, p99, scatter, bytes and balance of every row are in the files;
[results.md](results.md) says what their keys mean. Routings of one name are one draw within a file, not between files:
the draws of zipf:1.2 changed on 27 and 28 November 2026.
"""
Row = dict[str, Any]


def main() -> None:
    TARGET.write_text(page())


def page() -> str:
    """The whole page."""
    files = sorted(FOLDER.glob("20*.json"), reverse=True)
    parts = [section(path.name, document) for path in files if "rows" in (document := json.loads(path.read_text()))]
    return "\n".join([HEAD, *parts]).rstrip() + "\n"


def section(name: str, document: dict[str, Any]) -> str:
    rows: list[Row] = [row for row in document["rows"] if row.get("p50_us")]
    machine = document["machine"]
    versions = ", ".join(f"{key} {machine[key]}" for key in ("driver", "torch", "triton", "nccl") if machine.get(key))
    command = " ".join(document["command"].split())
    lines = [
        f"## {name.removesuffix('.json')}",
        "",
        f"{machine['count']} × {machine['gpu']}, {versions}. {document['date'][:10]}, commit {document['commit'][:7]}.",
        f"[File](../benchmarks/{name}). Command:",
        "",
        f"    {command}",
        "",
    ]
    if note := document.get("note"):
        lines += [*wrap(f"Note: {note}", 120), ""]
    local = rows[0].get("layer") == "local"
    if local:
        lines += ["One rank's share of the layer, no exchange; tokens are the rows that enter it.", ""]
    for key in dict.fromkeys(map(group_of, rows)):
        lines += table([row for row in rows if group_of(row) == key], key, local)
    return "\n".join(lines)


def group_of(row: Row) -> tuple[str, ...]:
    """Rows of one table: what may be compared, and eager steps apart from graphs."""
    layout = "" if row["token_layout"] == "sharded" else f", tokens {row['token_layout']}"
    if (split := row.get("token_split", "even")) != "even":
        layout += f", split {split}"
    mode = "in a CUDA graph" if row["graph"] else "eager"
    return row["model"], f"{row['world']} rank{'s' * (row['world'] > 1)}", row["skew"] + layout, mode


def table(rows: list[Row], key: tuple[str, ...], local: bool) -> list[str]:
    """Lines of tokens, and of backends where there are several; columns of placements and exchanges."""

    def column_of(row: Row) -> str:
        return f"`{row['backend']}`" if local else f"{row['placement']} `{row['exchange']}`"

    def line_of(row: Row) -> tuple[Any, ...]:
        return (row["global_tokens"], row["placement"]) if local else (row["tokens_per_rank"], f"`{row['backend']}`")

    columns = list(dict.fromkeys(map(column_of, rows)))
    model, ranks, skew, mode = key
    lines = []
    for line in sorted(dict.fromkeys(map(line_of, rows))):
        of_line = [row for row in rows if line_of(row) == line]
        cells = {column_of(row): row["p50_us"] for row in of_line}
        if len(cells) < len(of_line):
            raise ValueError(f"{key}, {line}: several rows for one cell")
        floors = [row["floor_us"] for row in of_line if row.get("floor_us")]
        best = min(cells.values())
        shown = [_cell(cells.get(column), best) for column in columns]
        floor = f"{min(floors):,.0f}" if floors else "-"
        lines.append([f"{line[0]:,}", line[1], floor, *shown])
    head = ["tokens", "shard" if local else "backend", "floor", *columns]
    return [f"**{model}**, {ranks}, routing {skew}, {mode}", "", *markdown_table(head, lines), ""]


def _cell(value: float | None, best: float) -> str:
    if value is None:
        return "-"
    return f"**{value:,.0f}**" if value == best else f"{value:,.0f}"


if __name__ == "__main__":
    main()
