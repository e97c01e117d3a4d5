"""`moe-dist report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from moe_dist.bench.output import open_output, said
from moe_dist.commands.call import ThisCall
from moe_dist.commands.printing import print_line, write_once
from moe_dist.commands.terminal import say, to_standard_output
from moe_dist.errors import ConfigError
from moe_dist.exits.exit_codes import OK
from moe_dist.messages.counts import count_of
from moe_dist.report.formats import csv_text, is_report, markdown
from moe_dist.report.page import page
from moe_dist.report.recorded import read_files

Files = Annotated[list[str], Parameter(help="Results files (what --out of run, compare or check gave), side by side.")]
Out = Annotated[
    str | None, Parameter(help="Where it is written (default: report.html; Markdown and CSV to standard output).")
]
Format = Annotated[Literal["html", "markdown", "csv"], Parameter(help="One page with charts, its tables, or all rows.")]
MADE = {"html": page, "markdown": markdown, "csv": csv_text}
FIRST = 1024  # bytes by which a report is known


def report(files: Files, /, *, out: Out = None, format: Format = "html", call: ThisCall) -> int:
    found = read_files(files, say)
    target = out or ("report.html" if format == "html" else None)
    output = open_output(target, say, call.descriptors, files, older=_older_report) if target else None
    text = MADE[format](found)
    if output is None:
        with to_standard_output():
            sys.stdout.write(text)
        return OK
    write_once(output, text)
    if not output.on_standard_output:
        rows = sum(len(file.rows) for file in found)
        print_line(f"report: {output.path}, {count_of(rows, 'row')} of {count_of(len(found), 'file')}")
    return OK


def _older_report(path: Path) -> str:
    """What is there, for the line that says that it is overwritten. ConfigError for anything but a report."""
    try:
        with open(path, "rb") as file:
            start = file.read(FIRST).decode(errors="replace")
    except OSError as error:
        raise ConfigError(
            "out", str(path), f"can't be read: {said(error)}", "a new name, or an earlier report"
        ) from None
    if not is_report(start):
        rule = "is there already and is no report of moe-dist; it is not overwritten"
        raise ConfigError("out", str(path), rule, "a new name, or an earlier report")
    return "an earlier report"
