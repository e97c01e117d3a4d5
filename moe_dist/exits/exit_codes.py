"""What the command's exit codes mean. Each has one meaning, so that a script can act on it."""

from __future__ import annotations

from moe_dist.errors import ClusterLost, InstallationError, MoeDistError, OutputError, RankFailure, ResourceError

OK = 0
OUT_OF_TOLERANCE = 1
BAD_INPUT = 2
TOO_SMALL = 3
RANK_FAILED = 4
CLUSTER_LOST = 5
NOT_WRITTEN = 6
SLOWER = 7
GONE = 8
UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h
HUNG_UP = 129  # 128 + the signal's number, as shells have it
INTERRUPTED = 130
BROKEN_PIPE = 141
TERMINATED = 143

# docs/usage.md and `moe-dist --help` list these.
MEANINGS = {
    OK: "fine",
    OUT_OF_TOLERANCE: "a number is out of tolerance",
    BAD_INPUT: "bad input, including what can't run here",
    TOO_SMALL: "the machine or the cluster is too small, or lacks something",
    RANK_FAILED: "a rank failed",
    CLUSTER_LOST: "the Ray cluster was lost",
    NOT_WRITTEN: "results or other output could not be written",
    SLOWER: "a row of `diff` became slower by more than scatter explains",
    GONE: "a row of `diff`, timed in the old file, is missing in the new one",
    UNEXPECTED: "an unexpected error, a fault of moe_dist: please report it",
    HUNG_UP: "the terminal was closed (SIGHUP)",
    INTERRUPTED: "interrupted (Ctrl-C)",
    BROKEN_PIPE: "the reader of the output has gone",
    TERMINATED: "terminated (SIGTERM)",
}

_OF_ERRORS = {
    ResourceError: TOO_SMALL,
    InstallationError: TOO_SMALL,
    RankFailure: RANK_FAILED,
    ClusterLost: CLUSTER_LOST,
    OutputError: NOT_WRITTEN,
}


def code_of(error: MoeDistError) -> int:
    """The exit code of an error that moe_dist raised on purpose."""
    return next((code for cls, code in _OF_ERRORS.items() if isinstance(error, cls)), BAD_INPUT)
