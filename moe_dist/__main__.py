"""The command's start: what can go wrong before there is a command ends as it does in one (`moe_dist.ending`)."""

from __future__ import annotations

import sys

from moe_dist.exit_codes import INTERRUPTED, TOO_SMALL


def main() -> int:
    try:
        from moe_dist.cli import main as command
    except KeyboardInterrupt:  # torch alone takes seconds to import
        print("moe-dist: interrupted", file=sys.stderr)
        return INTERRUPTED
    except ImportError as error:
        print(f"moe-dist: this installation lacks something: {error}", file=sys.stderr)
        return TOO_SMALL
    return command()


if __name__ == "__main__":
    raise SystemExit(main())
