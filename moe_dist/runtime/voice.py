"""Under torchrun every rank runs the whole program: which one speaks for all, and with which exit code it all ends."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from moe_dist.errors import ConfigError, RankFailure
from moe_dist.exits.signals import ENDING
from moe_dist.messages import logs
from moe_dist.runtime.pulse import ranks_here, siblings_ended_by

CODE_FILE = (
    "MOE_DIST_EXIT_CODE_FILE"  # set by launch/torchrun.sh: torchrun itself ends with 1 whatever a rank ended with
)
TORCHRUNS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MOST_RANKS, LAST_PORT = 1 << 20, (1 << 16) - 1

_mute: set[int] = set()  # ranks that were found dead or stopped
_left = False  # whether this process has left an exit code
_together = False  # whether this process works as one of torchrun's ranks


class Launched(NamedTuple):
    """What torchrun told this process in its environment."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def launched() -> Launched:
    """Raises ConfigError where the environment is not torchrun's, or half of it is missing or wrong."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        raise ConfigError("runtime", "torchrun", "this process was not started by torchrun", ("ray",))
    if missing := [name for name in TORCHRUNS if name not in os.environ]:
        rule = "missing from the environment that torchrun gives every rank"
        raise ConfigError(", ".join(missing), None, rule, f"all of {', '.join(TORCHRUNS)}, or runtime ray")
    world = _number("WORLD_SIZE", 1, MOST_RANKS)
    rank = _number("RANK", 0, world - 1)
    local_world = _number("LOCAL_WORLD_SIZE", 1, world)
    local_rank = _number("LOCAL_RANK", 0, local_world - 1)
    if not os.environ["MASTER_ADDR"]:
        raise ConfigError("MASTER_ADDR", "", "is where the ranks' store is", "a host's name or address")
    _number("MASTER_PORT", 0, LAST_PORT)
    return Launched(rank, world, local_rank, local_world)


def check_log_format() -> None:
    """Raise ConfigError where the environment asks for log lines of no known form."""
    given = os.environ.get(logs.VARIABLE) or "text"
    if given not in logs.FORMATS:
        raise ConfigError(logs.VARIABLE, given, "is no form of log lines", logs.FORMATS)


def _number(name: str, least: int, most: int) -> int:
    given, legal = os.environ[name], f"{least} to {most}"
    if not (given.isascii() and given.isdigit() and len(given) < 10 and least <= int(given) <= most):
        raise ConfigError(name, given, "is no such number as torchrun gives every rank", legal)
    return int(given)


def together(ranks_of_torchrun: bool) -> None:
    """Whether this process and torchrun's others run one command between them, which one of them speaks for. A
    scheduler sets RANK too, and what a rank of some other program starts has its parent's whole environment."""
    global _together
    _together = ranks_of_torchrun
    if not ranks_of_torchrun:
        _mute.clear()


def torchrun_is_meant(arguments: Iterable[str]) -> bool:
    """Whether a command line has `--runtime torchrun`, in any of its forms: known before it is parsed, or can be."""
    return any(argument.rpartition("=")[2] == "torchrun" for argument in arguments)


def mute(ranks: Iterable[int]) -> None:
    _mute.update(ranks)


def speaks() -> bool:
    """Whether this process prints: each alone does; of torchrun's ranks, rank 0 or the lowest one that still can."""
    if not _together:
        return True
    try:
        rank = launched().rank
    except ConfigError:  # which is what it has to say
        return True
    return rank not in _mute and all(lower in _mute for lower in range(rank))


def death() -> RankFailure | None:
    """That of a rank of this machine whose process is gone and has left no exit code, or None: SIGTERM comes from
    torchrun then, and nobody wished to end the run. From now on that rank is passed over. Without launch/torchrun.sh
    nobody knows whether a rank that is gone has spoken."""
    if not _together:
        return None
    try:
        if Path(os.environ[CODE_FILE]).read_text():
            return None
        here = launched()
    except (KeyError, OSError, ValueError, ConfigError):
        return None
    first = here.rank - here.local_rank
    there = ranks_here()
    gone = [rank for rank in range(first, first + here.local_world) if rank not in there]
    if not gone or siblings_ended_by(ENDING):  # which has come to all
        return None
    mute(gone)
    too = ", ".join(f"rank {rank}" for rank in gone[1:])
    also = f"; so did {too}, which SIGTERM may have ended: torchrun's report says who was first" if too else ""
    return RankFailure(gone[0], "starting or ending", 0, f"its process died{also}")


def leave_code(code: int) -> str:
    """Leave `code` for launch/torchrun.sh, if this is the rank that speaks and no other one has left its own. Never
    raises: what went wrong, or ""."""
    global _left
    path = os.environ.get(CODE_FILE)
    if path and speaks():
        try:
            # A FIFO that nobody reads would be waited for.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            with open(descriptor, "r+") as file:
                if not (before := file.read()) or _left:
                    file.seek(0)
                    file.write(str(code))
                    if before:
                        file.truncate()
                    _left = True
        except (OSError, ValueError) as error:
            problem = getattr(error, "strerror", None) or error
            return f"the exit code {code} can't be written to {CODE_FILE} = {path}: {problem}"
    return ""
