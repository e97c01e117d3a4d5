"""Regular expressions of foreign origin, matched in time linear in the name: Python's own matcher can take for ever.

The usual syntax is read: literals, `.`, classes, escapes, groups, alternatives, repetitions, and anchors for the start
and the end, and what fnmatch knows. All patterns of a list are one graph (`graphs.py`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from moe_dist.checkpoint.graphs import MOST_PARTS, Build, Graph, Test, anchor, either, one, one_after_another, times

LONGEST = 500  # characters of a pattern
MOST_TOGETHER = 50_000  # of all patterns of a list: real ones have some thousands
_COUNTS = re.compile(r"\{(\d{1,4})\}|\{(\d{0,4}),(\d{0,4})\}")
_GROUP = re.compile(r"\((\?:|\?P<[A-Za-z_][A-Za-z0-9_]*>)?")
_CLASS = re.compile(r"\[\^?\]?(\\.|[^\]\\])*\]", re.DOTALL)
_GLOB_CLASS = re.compile(r"(!?+)(\]?+[^\]]*)\]")  # a ] at its start is one of the characters


@dataclass(frozen=True)
class Pattern:
    """Made by `parse`, `glob` or `any_of`; `text` is what it was made of."""

    text: str
    _build: Build = field(repr=False, compare=False)
    _most: int = field(default=MOST_PARTS, repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Raises re.error for what is no pattern, is too large, or is written in a way that isn't read."""
        return cls._made(text, str)

    @classmethod
    def glob(cls, text: str) -> Pattern:
        """One that matches the whole name, where `*` stands for any characters, `?` for one, `[a-c]` and `[!a-c]` for
        one of these or of the others. Raises like `parse`."""
        return cls._made(text, _from_glob)

    @classmethod
    def any_of(cls, patterns: list[Pattern]) -> Pattern:
        """One that matches where one of `patterns` does. Raises re.error where they are too much together."""
        parts = sum(pattern._graph.parts for pattern in patterns)
        if parts > MOST_TOGETHER:
            raise re.error(
                f"its {len(patterns):,} patterns, written out, have {parts:,} parts, at most {MOST_TOGETHER:,}"
            )
        builds = [pattern._build for pattern in patterns]
        return cls("|".join(pattern.text for pattern in patterns), either(builds), 2 * MOST_TOGETHER)

    def matches(self, name: str) -> bool:
        """Whether it matches from the start of `name`, as re.match has it. Raises TooMuchWork."""
        return self._graph.matches(name)

    @classmethod
    def _made(cls, text: str, spelled: Callable[[str], str]) -> Pattern:
        if len(text) > LONGEST:
            raise re.error(f"it has {len(text)} characters, at most {LONGEST} are read")
        found = cls(text, _Parser(spelled(text)).whole())
        _ = found._graph
        return found

    @cached_property
    def _graph(self) -> Graph:
        return Graph(self._build, self._most)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0

    def whole(self) -> Build:
        build = self._alternatives()
        if self.place < len(self.text):
            raise re.error("unbalanced parenthesis", self.text, self.place)
        return build

    def _ahead(self) -> str:
        return self.text[self.place : self.place + 1]

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.text, self.place)
        if found:
            self.place = found.end()
        return found

    def _alternatives(self) -> Build:
        parts = [self._sequence()]
        while self._ahead() == "|":
            self.place += 1
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else either(parts)

    def _sequence(self) -> Build:
        parts: list[Build] = []
        while self._ahead() not in ("", "|", ")"):
            parts.append(self._repeated())
        return one_after_another(parts)

    def _repeated(self) -> Build:
        at = self.place
        part, fixed = self._atom()
        bounds = self._bounds()
        if bounds is None:
            return part
        if fixed:
            raise re.error("nothing to repeat", self.text, at)
        if self._ahead() == "?":  # lazy: whether there is a match is the same
            self.place += 1
        if self._ahead() == "+" or self._bounds() is not None:
            raise re.error("multiple repeat", self.text, self.place)
        return times(part, *bounds)

    def _bounds(self) -> tuple[int, int | None] | None:
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if (sign := self._ahead()) in simple:
            self.place += 1
            return simple[sign]
        found = self._take(_COUNTS)
        if found is None or found[0] == "{,}":
            return None if found is None else (0, None)
        if found[1] is not None:
            return int(found[1]), int(found[1])
        least, most = int(found[2] or 0), int(found[3]) if found[3] else None
        if most is not None and most < least:
            raise re.error("min repeat greater than max repeat", self.text, self.place)
        return least, most

    def _atom(self) -> tuple[Build, bool]:
        """One part, and whether it is an anchor."""
        sign, at = self._ahead(), self.place
        if sign == "(":
            return self._group(), False
        if sign == "[":
            found = self._take(_CLASS)
            if not found:
                raise re.error("unterminated character set", self.text, at)
            return one(_class(found[0])), False
        if sign in ("*", "+", "?"):
            raise re.error("nothing to repeat", self.text, at)
        self.place += 1
        if sign in ("^", "$"):
            return anchor("start" if sign == "^" else "end"), True
        if sign == "\\":
            return self._escape()
        return one((lambda character: character != "\n") if sign == "." else sign.__eq__), False

    def _group(self) -> Build:
        at = self.place
        self._take(_GROUP)
        if self._ahead() == "?":
            raise re.error("look-around, flags and back references are not read", self.text, at)
        build = self._alternatives()
        if self._ahead() != ")":
            raise re.error("missing ), unterminated subpattern", self.text, at)
        self.place += 1
        return build

    def _escape(self) -> tuple[Build, bool]:
        sign = self._ahead()
        self.place += 1
        if sign in ("A", "Z"):
            return anchor("start" if sign == "A" else "end"), True
        if sign and sign in "dDsSwW":
            return one(_class("\\" + sign)), False
        if not sign or sign.isalnum():
            raise re.error(f"escape \\{sign} is not read", self.text, self.place - 1)
        return one(sign.__eq__), False


def _class(text: str) -> Test:
    with warnings.catch_warnings(action="ignore"):  # of what a later Python may read as sets in sets
        return re.compile(text).fullmatch


def _from_glob(text: str) -> str:
    """The same as a pattern, as fnmatch reads it: a `[` without its `]` stands for itself."""
    found, place = "", 0
    while place < len(text):
        sign, place = text[place], place + 1
        chosen = _GLOB_CLASS.match(text, place) if sign == "[" else None
        if chosen:
            place = chosen.end()
            inner = re.sub(r"([\\^\[])", r"\\\1", chosen[2])
            found += f"[{'^' if chosen[1] else ''}{inner}]"
        else:
            found += {"*": ".*", "?": "."}.get(sign) or re.escape(sign)
    return found + r"\Z"
