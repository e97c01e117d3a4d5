"""Numbers of things in sentences, in the singular where there is one."""

from __future__ import annotations


def count_of(count: int, thing: str, things: str = "") -> str:
    """`1 row`, `2,048 rows`. `things`: the plural where it is not made with an s; `thing` may be several words whose
    last one takes it."""
    return f"{count:,} {thing if count == 1 else things or thing + 's'}"


def are(count: int) -> str:
    """The verb after so many: `is` or `are`."""
    return "is" if count == 1 else "are"


def have(count: int) -> str:
    return "has" if count == 1 else "have"
