"""What commands print as their answer, or write in its place."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from typing import Any

from moe_dist.bench.output import Output, said
from moe_dist.bench.row import Result, Row
from moe_dist.commands.terminal import Terminal, terminal, to_standard_output
from moe_dist.errors import OutputError
from moe_dist.messages.printable import one_line
from moe_dist.runtime.voice import speaks


def console() -> Terminal:
    """On standard output. Quiet where another of torchrun's ranks speaks."""
    return terminal(quiet=not speaks())


def print_json(document: Any, indent: int | None = None) -> None:
    with to_standard_output():
        print(json.dumps(document, allow_nan=False, indent=indent))


def print_csv(rows: Sequence[Result]) -> None:
    """A line for each row, under the keys of docs/results.md; lists and stages as JSON. Only the rank that speaks."""
    if not speaks():
        return
    with to_standard_output():
        columns = list(type(rows[0]).model_fields if rows else Row.model_fields)
        writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = row.model_dump(mode="json")
            writer.writerow({k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in values.items()})


def print_line(text: str) -> None:
    with to_standard_output():
        console().print(one_line(text), soft_wrap=True)


def write_once(output: Output, text: str) -> None:
    """All that is written there. Raises OutputError."""
    try:
        output.write(text)
    except OSError as error:
        raise OutputError(output.path, said(error)) from None
    finally:
        if output.claim is not None:
            output.claim.close()
