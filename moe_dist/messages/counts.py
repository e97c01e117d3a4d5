"""Numbers of things in sentences: one of them takes the singular, and so does the verb behind it."""

from __future__ import annotations

ODD = {"are": "is", "have": "has", "were": "was"}


def count_of(count: int, thing: str, things: str = "") -> str:
    """`1 row`, `2,048 rows`. `things`: the plural where it is not made with an s; `thing` may be several words whose
    last one takes it."""
    return f"{count:,} {thing if count == 1 else things or thing + 's'}"


def part_of(part: int, count: int, thing: str, many: str = "are") -> str:
    """`1 of 3 rows is`, `2 of 3 rows are`. `many`: the verb after several."""
    return f"{part:,} of {count_of(count, thing)} {verb(part, many)}"


def verb(count: int, many: str) -> str:
    """`agree` after several, `agrees` after one."""
    return many if count != 1 else ODD.get(many, many + "s")


def noun(count: int, thing: str) -> str:
    """Without the number, where that has another form."""
    return thing if count == 1 else thing + "s"
