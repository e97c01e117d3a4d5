"""What a rank knows while it works. Functions that run on ranks take it first: `function(context, *arguments)`."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field, field_validator

from moe_dist.comm import Comm
from moe_dist.comm.meeting import LONGEST_TIMEOUT_S
from moe_dist.errors import ConfigError
from moe_dist.machine.machine import cores
from moe_dist.machine.nodes import Strategy
from moe_dist.messages import logs
from moe_dist.messages.printable import encodable
from moe_dist.model.spec import Flag, Name, Seconds, Section
from moe_dist.runtime.pulse import Pulse
from moe_dist.runtime.voice import check_log_format

RankFunction = Callable[..., Any]


@dataclass
class RankContext:
    """`memo` keeps what is dear to make (weights) between calls; `status` is what progress displays show. `pulse` tells
    other processes of this machine the same, and which collective this rank is in."""

    comm: Comm
    runtime: str  # "ray" or "torchrun"
    memo: dict[str, Any] = field(default_factory=dict)
    status: str = "starting"
    status_since: float = field(default_factory=time.monotonic)
    pulse: Pulse = field(default_factory=Pulse)

    def __post_init__(self) -> None:
        self.comm.noted = self.pulse.note
        check_log_format()
        own = weakref.ref(self)  # what holds a process group until the process exits can abort gloo

        def place() -> logs.Place:
            here = own()
            if here is None:
                return logs.Place()
            return logs.Place(here.rank, here.comm.sequence, here.pulse.op or here.status)

        logs.of_rank(place)

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def world(self) -> int:
        return self.comm.world

    @property
    def device(self) -> torch.device:
        return self.comm.device

    @property
    def watched_by(self) -> Callable[[str], None] | None:
        """What shows how far something long is; None for torchrun's ranks, whose standard error is the user's."""
        return self.progress if self.runtime == "ray" else None

    def progress(self, status: str, limit_s: float | None = None) -> None:
        """What this rank does from now on. `limit_s`: the most seconds that it then takes from one collective to the
        next, and in one; a rank of the watcher's machine that takes longer fails its group. None: `timeout_s` of the
        call and the collectives' own timeout are the only limits, as loading and compiling need it. Raises ConfigError
        for a limit that can't be."""
        if limit_s is not None and not (type(limit_s) in (int, float) and 0 < limit_s <= LONGEST_TIMEOUT_S):
            legal = f"seconds, more than 0, up to {LONGEST_TIMEOUT_S:.0f}, or None"
            raise ConfigError("limit_s", limit_s, "bounds the time between two collectives", legal)
        self.status, self.status_since = encodable(status), time.monotonic()
        self.pulse.status(self.status, limit_s or 0.0)
        logs.write_if_json(self.status)

    def lift_limit(self) -> None:
        """Between two calls nobody expects this rank in a collective."""
        self.pulse.status(self.status)


class RaySpec(Section):
    """How ranks are placed and how long anything may take. CPU ranks share cores, GPU ranks own one GPU each."""

    section = "ray"

    address: Name | None = None  # a running cluster; None: RAY_ADDRESS if set, else a private one on this machine
    # All ranks on one node, on as few as can be, or spread over all: Ray's placement groups.
    strategy: Strategy = "STRICT_PACK"
    # Of gloo and NCCL, on every node; None: that of the node's address in Ray, and between ranks of one node none.
    interface: Annotated[str, Field(pattern=r"^[^\s/=,:]{1,15}$")] | None = None
    cpus_per_rank: float = Field(default=0.25, strict=True, ge=1e-4, le=1024, allow_inf_nan=False)
    start_timeout_s: Seconds = 60.0
    collective_timeout_s: Annotated[Seconds, Field(ge=0.1)] = 60.0  # process groups count whole milliseconds
    silence_timeout_s: Seconds = 30.0  # a rank without a sign of life for so long is given up
    restarts: Annotated[int, Field(strict=True, ge=0, le=1000)] = 0  # in all, of a group that has failed
    verbose: Flag = False  # shows what Ray and the ranks write to their logs

    @field_validator("cpus_per_rank")
    @classmethod
    def _whole_cpus(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise ConfigError("ray.cpus_per_rank", value, "Ray gives parts of one CPU, or whole ones", "0.25, 1, 2, …")
        return value


class Group(Protocol):
    """A set of ranks that runs a function on each and returns the results in rank order. `nodes`: how many ranks are on
    each node; ranks are numbered node by node."""

    world: int
    runtime: str
    nodes: tuple[int, ...]

    def run(self, function: RankFunction, *arguments: Any, timeout_s: float, shown: Callable[[str], None]) -> list[Any]:
        """Raises RankFailure, or what the function itself raised. `shown` gets progress texts while it runs."""

    def describe(self) -> Sequence[str]:
        """One line a rank: where it runs."""

    def close(self) -> None: ...


def limit_threads(ranks_here: int) -> None:
    """Share the host's cores among the ranks on it; more threads than cores only fight."""
    torch.set_num_threads(max(1, cores() // ranks_here))
