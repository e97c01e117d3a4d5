"""What a command has beside its arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from moe_dist.commands.ending import Ending


@dataclass(frozen=True)
class Call:
    """`descriptors` are those that were open when the command was called, before any of its own."""

    ending: Ending
    descriptors: frozenset[int]


ThisCall = Annotated[Call, Parameter(parse=False)]  # no flag: main() fills it in
