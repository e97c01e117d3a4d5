"""One of something takes the singular."""

from __future__ import annotations

from moe_dist.messages.counts import count_of, noun, part_of, verb


def test_singular_and_plural() -> None:
    assert [count_of(count, "row") for count in (0, 1, 2048)] == ["0 rows", "1 row", "2,048 rows"]
    assert count_of(1, "process", "processes") == "1 process"
    assert count_of(2, "process", "processes") == "2 processes"
    assert [part_of(part, 3, "row") for part in (0, 1, 2)] == ["0 of 3 rows are", "1 of 3 rows is", "2 of 3 rows are"]
    assert part_of(1, 1, "case", "agree") == "1 of 1 case agrees"
    assert [verb(1, each) for each in ("are", "have", "were", "stand")] == ["is", "has", "was", "stands"]
    assert [noun(count, "token") for count in (1, 2)] == ["token", "tokens"]
