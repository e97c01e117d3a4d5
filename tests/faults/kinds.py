"""Which faults there are, at which moments, and what must come of each. A seeded list of them is one run's plan."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import cycle, islice

SOON_S = 5.0  # the promise: from the fault, or from where its limit runs out, to the error
LIMIT_S, COLLECTIVE_S = 1.5, 4.0  # of a step, where a kind needs one; of every collective
SLOW_S = 1.0  # of work that is slow and within its limit


@dataclass(frozen=True)
class Kind:
    """`cause`: what the error's must match. `limited`: the rank lives and does nothing, so that only a limit tells.
    `error`: its type, "" where the right result must come. `any_rank`: which of two ends is named is open. `of_device`:
    its device fails and its host goes on; on a CPU they are one."""

    cause: str
    error: str = "RankFailure"
    limited: bool = False
    any_rank: bool = False
    of_device: bool = False


NOT_OVER = r"(in no collective for|not over after) \d+\.\d s, where its limit is 1\.5 s|.*where its limit is 1\.5 s"
DIED = r"its process died"
KINDS = {
    "none": Kind("", error=""),
    "pause": Kind("", error=""),  # stopped and woken within a second
    "slow": Kind("", error=""),
    "SIGKILL": Kind(DIED),
    "SIGSEGV": Kind(DIED),
    "exit_code": Kind(DIED),
    "SIGSTOP": Kind(r".*its process is stopped"),
    "raise": Kind(r"ValueError: on purpose"),
    "memory": Kind(r"MemoryError"),
    "tensor_memory": Kind(r"RuntimeError: .*can't allocate memory|OutOfMemoryError: CUDA out of memory"),
    "sys_exit": Kind(r"SystemExit: 3"),
    "return": Kind(r"returned after \d+ collectives"),
    "spin": Kind(NOT_OVER, limited=True),
    "spin_in_c": Kind(NOT_OVER, limited=True),  # lets no other thread of its process run
    "sleep": Kind(NOT_OVER, limited=True),
    # All ranks' hosts then wait for their devices, and those of the others for this one's.
    "stuck": Kind(NOT_OVER, limited=True, any_rank=True, of_device=True),
    "sockets": Kind(r".*[Cc]onnection", any_rank=True),
    "wrong_ids": Kind(r"", error="ConfigError"),
    "wrong_dtype": Kind(r"", error="ConfigError"),
}
HANGS = tuple(name for name, kind in KINDS.items() if kind.limited and not kind.of_device)
INPUTS = ("wrong_ids", "wrong_dtype")
DEATHS = ("SIGKILL", "SIGSEGV", "exit_code")
RAISED = ("raise", "memory", "tensor_memory", "sys_exit")
COLLECTIVES = 25  # of ten steps, at least: the numbers to strike at
# What may happen when. Before there is a group, and while weights are loaded, nobody is given a limit.
MOMENTS: dict[str, tuple[str, ...]] = {
    "before": (*DEATHS, "SIGSTOP"),
    "loading": (*DEATHS, *RAISED, "SIGSTOP", "slow"),
    "collective": (*DEATHS, *RAISED, *HANGS, "SIGSTOP", "sockets", "pause", "slow"),
    "between": (*DEATHS, *RAISED, *HANGS, *INPUTS, "SIGSTOP", "return", "pause", "slow", "none"),
    "captured": (
        *DEATHS,
        *RAISED,
        *HANGS,
        "SIGSTOP",
        "pause",
    ),  # in a step as a graph records it, where a replay would be
    "ending": (*DEATHS, *RAISED, *HANGS, "SIGSTOP", "pause", "none"),
}


@dataclass(frozen=True)
class Fault:
    """The `at`-th step or collective, counted from 0. `marks`: the file that gets the time when it happens. `device`:
    where tensors are."""

    number: int
    kind: str
    moment: str
    at: int
    rank: int
    world: int
    marks: str = ""
    device: str = "cpu"

    @property
    def limit_s(self) -> float | None:
        return LIMIT_S if KINDS[self.kind].limited or (self.kind == "slow" and self.moment != "loading") else None

    @property
    def promise_s(self) -> float:
        """From the fault to its error. Of a rank that does not even join, the others learn when joining times out."""
        if KINDS[self.kind].limited:
            return LIMIT_S + SOON_S
        return COLLECTIVE_S + SOON_S if (self.moment, self.kind) == ("before", "SIGSTOP") else SOON_S

    def __str__(self) -> str:
        return f"{self.number}: {self.kind} {self.moment} {self.at}, rank {self.rank} of {self.world}"


def drawn(seed: int, count: int, worlds: tuple[int, ...] = (2, 3, 4)) -> list[Fault]:
    """`count` faults: every kind at every moment in turn, with rank, world and number drawn. In the order of worlds, so
    that a group can be used again."""
    draw = random.Random(seed)
    pairs = [(kind, moment) for moment, kinds in MOMENTS.items() for kind in kinds]
    draw.shuffle(pairs)
    faults = [_one(draw, number, *pair, worlds) for number, pair in enumerate(islice(cycle(pairs), count))]
    return sorted(faults, key=lambda fault: fault.world)


def _one(draw: random.Random, number: int, kind: str, moment: str, worlds: tuple[int, ...]) -> Fault:
    world = draw.choices(worlds, weights=[5, 2, 1][: len(worlds)])[0]  # larger groups take longer to start
    at = draw.randrange(COLLECTIVES) if moment == "collective" else draw.randrange(1, 10, 2)
    return Fault(number, kind, moment, at, draw.randrange(world), world)
