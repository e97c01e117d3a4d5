"""How a process says that it compiles, or waits for one that does: on standard error, or to whoever runs it."""

from __future__ import annotations

import os

from moe_dist.messages import logs
from moe_dist.messages.notices import live, notice

SAY_EVERY_S = 15.0


def say(text: str, *, progress: bool = False) -> None:
    """`progress`: only how far it is, which nobody wants to read afterwards."""
    if not live(text):
        logs.write(text, before=f"moe-dist (pid {os.getpid()}): ")
    elif not progress:
        notice(text)
