"""What ranks had to say while they ran a function, on its way to who called it: each text once, with its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_dist.messages.notices import by_text, notice, with_ranks
from moe_dist.runtime.voice import speaks


def heard(outcomes: Sequence[tuple[Any, tuple[str, ...]]]) -> list[Any]:
    """The results of all ranks, in their order. What they had to say beside them becomes this process's notices; under
    torchrun, where every rank gets all results, those of the rank that speaks."""
    results, said = zip(*outcomes, strict=True)
    _tell(by_text(said))
    return list(results)


def said_before(error: BaseException) -> None:
    """The same for what a rank had to say before it failed."""
    _tell(getattr(error, "notices", {}))


def _tell(said: dict[str, list[int]]) -> None:
    if speaks():
        for line in with_ranks(said):
            notice(line)
