"""What commands print as their answer."""

from __future__ import annotations

import json
from typing import Any

from moe_dist.commands.terminal import Terminal, terminal, to_standard_output
from moe_dist.messages.printable import one_line
from moe_dist.runtime.voice import speaks


def console() -> Terminal:
    """On standard output. Quiet where another of torchrun's ranks speaks."""
    return terminal(quiet=not speaks())


def print_json(document: Any, indent: int | None = None) -> None:
    with to_standard_output():
        print(json.dumps(document, allow_nan=False, indent=indent))


def print_line(text: str) -> None:
    with to_standard_output():
        console().print(one_line(text), soft_wrap=True)
