"""What ranks tell each other on the CPU beside their collectives: a few numbers, and texts where numbers differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_dist.comm.others import known_elsewhere
from moe_dist.comm.wires import gather_into
from moe_dist.errors import ConfigError, shown
from moe_dist.messages.counts import noun

Facts = Mapping[str, str]  # a field's name to its value in words

MODULUS = 1 << 62  # what is told are int64
MOST_FIELDS = 6  # of those that differ, which a message names


class Teller:
    """Of one process group, by its backend for tensors of a CPU. Each call is collective and waits `timeout_s` at
    most."""

    def __init__(self, rank: int, world: int, group: dist.ProcessGroup | None, timeout_s: float) -> None:
        self.rank, self.world, self._group = rank, world, group
        self._timeout = timedelta(seconds=timeout_s)

    def numbers(self, mine: Sequence[int]) -> list[list[int]]:
        """Every rank's, in the order of ranks; all give as many."""
        given = torch.tensor([mine], dtype=torch.int64, device="cpu")
        everyone = given.new_empty(self.world, len(mine))
        gather_into(everyone, given, group=self._group, async_op=True).wait(self._timeout)
        found: list[list[int]] = everyone.tolist()
        return found

    def texts(self, mine: str) -> list[str]:
        """Every rank's, of any length."""
        content = mine.encode()
        lengths = [length for (length,) in self.numbers([len(content)])]
        given = torch.zeros(1, max(1, *lengths), dtype=torch.uint8, device="cpu")
        if content:
            given[0, : len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        everyone = given.new_empty(self.world, given.shape[1])
        gather_into(everyone, given, group=self._group, async_op=True).wait(self._timeout)
        return [bytes(row[:length].numpy()).decode() for row, length in zip(everyone, lengths, strict=True)]

    def compare(self, facts: Facts) -> None:
        """Raises ConfigError on all ranks where a field differs. One small collective where none does."""
        if len({told for (told,) in self.numbers([digest(facts)])}) > 1:
            self.refuse(facts)

    def refuse(self, facts: Facts) -> None:
        """For ranks that know already that their facts differ."""
        told = [json.loads(text) for text in self.texts(json.dumps(dict(facts)))]
        check_alike(told, self.rank, known_elsewhere(self._group))


def digest(facts: Facts) -> int:
    return number_of(json.dumps(dict(facts), sort_keys=True))


def number_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % MODULUS


def check_alike(told: Sequence[Facts], rank: int, elsewhere: str = "") -> None:
    """Raise ConfigError for the first field that ranks have with different values, which names the others too. A field
    that a rank does not have is none of its affair. `elsewhere`: see known_elsewhere."""
    differing = {}
    for field in dict.fromkeys(name for facts in told for name in facts):
        groups = by_value([facts.get(field) for facts in told])
        if len(groups) > 1:
            differing[field] = "; ".join(f"{ranks_in_words(ranks)}: {value}" for value, ranks in groups.items())
    if not differing:
        return
    (field, said), *others = differing.items()
    rule = f"must be the same on all ranks ({said})"
    if others:
        named = [f"{name} ({values})" for name, values in others[: MOST_FIELDS - 1]]
        left = len(others) - len(named)
        rule += f"; so must {', '.join(named)}" + (f" and {left} more" if left else "")
    raise ConfigError(field, told[rank].get(field), rule + elsewhere)


def by_value(values: Sequence[str | None]) -> dict[str, list[int]]:
    """Each value that is there, to the ranks that have it."""
    found: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        if value is not None:
            found.setdefault(value if len(value) <= 80 else shown(value), []).append(rank)
    return found


def ranks_in_words(ranks: Sequence[int]) -> str:
    return f"{noun(len(ranks), 'rank')} {', '.join(map(str, ranks))}"
