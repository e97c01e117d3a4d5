"""How the layers run that transformers' own switches make: those have no place for it."""

from __future__ import annotations

from dataclasses import dataclass

from moe_dist.backends import BACKENDS
from moe_dist.comm.meeting import LEAST_TIMEOUT_S, LONGEST_TIMEOUT_S
from moe_dist.errors import ConfigError
from moe_dist.exchange import EXCHANGES
from moe_dist.model.spec import MOST_TOKENS

AUTO = "auto"


@dataclass(frozen=True)
class Settings:
    """`exchange`, `backend`: names, `auto`, or None for the default of the tokens' layout and of the machine.
    `graph_buckets`: sizes of step, ascending, for each of which every layer captures one CUDA graph; larger steps run
    eagerly. `timeout_s`: bounds every wait for other ranks (None: the process group's own). Raises ConfigError."""

    exchange: str | None = None
    backend: str | None = None
    graph_buckets: tuple[int, ...] = ()
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        for field, names in (("exchange", EXCHANGES.names()), ("backend", BACKENDS.names())):
            given = getattr(self, field)
            if given is not None and given not in (AUTO, *names):
                raise ConfigError(field, given, f"no {field} has this name", (AUTO, *names))
        buckets, legal = self.graph_buckets, f"a tuple of integers from 1 to {MOST_TOKENS}, ascending"
        if not isinstance(buckets, tuple) or any(type(each) is not int for each in buckets):
            raise ConfigError("graph_buckets", buckets, "are sizes of steps", legal)
        if sorted(set(buckets)) != list(buckets) or any(not 1 <= each <= MOST_TOKENS for each in buckets):
            raise ConfigError("graph_buckets", buckets, "are not ascending sizes of steps", legal)
        timeout = self.timeout_s
        if timeout is not None and (
            type(timeout) not in (int, float) or not LEAST_TIMEOUT_S <= timeout <= LONGEST_TIMEOUT_S
        ):
            legal = f"seconds, {LEAST_TIMEOUT_S} to {LONGEST_TIMEOUT_S:.0f}"
            raise ConfigError("timeout_s", timeout, "bounds every wait for other ranks", legal)
