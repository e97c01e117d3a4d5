"""The same tables as Markdown, and all rows as CSV."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from io import StringIO
from typing import Any

from moe_dist.bench.diff import UNKNOWN
from moe_dist.bench.row import Row
from moe_dist.report import tables
from moe_dist.report.all_rows import all_rows, as_table
from moe_dist.report.findings import setups, told
from moe_dist.report.page import GENERATOR
from moe_dist.report.recorded import Recorded, known
from moe_dist.report.words import phase, standing, summary, title_of, tokens_of, verdict

MARKDOWN_FIRST = "<!-- moe-dist report -->\n"
CSV_FIRST = ("file", "date", "commit", "command", "device", "best_of_placement", "refused_case", "refused_reason")
SPECIAL = re.compile(r"[\\`*\[\]|~#!]|(?<!\w)_|_(?!\w)")  # what Markdown might obey
FORMULA = ("=", "+", "-", "@")  # what a spreadsheet might compute, at the start of a text


def markdown(files: Sequence[Recorded]) -> str:
    """What the page says, without its charts."""
    parts = [(file, setups(file)) for file in files]
    found = [setup for _, of_file in parts for setup in of_file]
    lines = [MARKDOWN_FIRST, "# Tensor against expert parallelism", ""]
    for file, of_file in parts:
        lines += [f"## {escaped(f'{file.device} · {file.date[:10]} · {file.name}')}", "", escaped(summary(of_file)), ""]
        for setup in told(of_file):
            for answer in setup.ends:
                step = f"{phase(answer.best[0])}, {tokens_of(answer.best[0])}, {title_of(setup)}"
                claim, others = verdict(answer)
                lines.append(f"- {escaped(step)}: **{escaped(claim)}** {escaped(others)}")
        lines += ["", *(f"- {escaped(name)}: {escaped(value)}" for name, value in tables.provenance(file)), ""]
    of_all = [tables.comparisons(found), *tables.details(found, files), as_table(all_rows(files, found)),
              *map(tables.refused, files), tables.marked(files)]  # fmt: skip
    for table in of_all:
        if table.lines:
            lines += [f"## {escaped(table.title)}", "", *([escaped(table.note), ""] if table.note else [])]
            lines += [*markdown_table(map(escaped, table.head), [map(escaped, line) for line in table.lines]), ""]
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> list[str]:
    """Cells as they are given."""
    names = list(head)
    return [_line(names), "|" + "---|" * len(names), *map(_line, lines)]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def escaped(text: str) -> str:
    """Text of a file as text: no markup, no HTML, no link."""
    plain = SPECIAL.sub(r"\\\g<0>", text)
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def csv_text(files: Sequence[Recorded]) -> str:
    """A line for each row under the keys of docs/results.md, behind its file and what the comparison says of it; lists
    and stages as JSON. Then a line for each case that was refused. A null is empty."""
    said = standing(setup for file in files for setup in setups(file))
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*CSV_FIRST, *Row.model_fields])
    for file in files:
        origin = [file.name, file.date, file.commit, file.command, file.device]
        for row in file.rows:
            values = [getattr(row, key) if known(row, key) else UNKNOWN for key in Row.model_fields]
            writer.writerow(map(_csv_cell, [*origin, said.get(id(row), ""), "", "", *values]))
        for item in file.refused:
            cells = [*origin, "", item.case, item.reason]
            writer.writerow(map(_csv_cell, [*cells, *[""] * len(Row.model_fields)]))
    return out.getvalue()


def _csv_cell(value: Any) -> Any:
    if isinstance(value, (tuple, dict)):
        return json.dumps(value)
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def is_report(start: str) -> bool:
    """Whether a file that starts so is a report of any format."""
    page = start.startswith("<!doctype html>") and f'<meta name="generator" content="{GENERATOR}">' in start
    return page or start.startswith((MARKDOWN_FIRST, ",".join(CSV_FIRST)))
