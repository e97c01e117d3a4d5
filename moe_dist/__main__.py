"""The command's start: what can go wrong before there is a command ends as it does in one (commands/ending.py)."""

from __future__ import annotations

import sys

from moe_dist.exits.exit_codes import INTERRUPTED, TOO_SMALL
from moe_dist.runtime import voice


def main() -> int:
    try:
        from moe_dist.commands.cli import main as command
    except KeyboardInterrupt:  # torch alone takes seconds to import
        return _ended("interrupted", INTERRUPTED)
    except ImportError as error:
        return _ended(f"this installation lacks something: {error}", TOO_SMALL)
    return command()


def _ended(said: str, code: int) -> int:
    voice.together(voice.torchrun_is_meant(sys.argv[1:]))
    if voice.speaks():
        print(f"moe-dist: {said}", file=sys.stderr)
    if problem := voice.leave_code(code):
        print(f"moe-dist: {problem}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
