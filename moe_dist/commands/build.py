"""`moe-dist build`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from moe_dist.backends import BACKENDS
from moe_dist.commands.flags import Json
from moe_dist.commands.printing import print_json, print_line
from moe_dist.exits.exit_codes import OK, TOO_SMALL
from moe_dist.machine.machine import Machine

Name = Annotated[str, Parameter(choices=BACKENDS.names(), help="What to build.")]


def build(backend: Name, /, *, json: Json = False) -> int:
    chosen = BACKENDS.get(backend)
    chosen.build()
    state = chosen.available(Machine.detect().device)
    if json:
        print_json({"built": True} | state._asdict())
    else:
        print_line(f"{backend}: " + ("ready" if state.ok else f"built, but it can't run here: {state.reason}"))
    return OK if state.ok else TOO_SMALL
