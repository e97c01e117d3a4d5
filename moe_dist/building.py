"""How a process says on standard error that it compiles, or waits for one that does."""

from __future__ import annotations

import os
import sys

SAY_EVERY_S = 15.0


def say(text: str) -> None:
    print(f"moe-dist (pid {os.getpid()}): {text}", file=sys.stderr, flush=True)
