"""Regular expressions of foreign origin, matched in time linear in the name: Python's own matcher can take for ever.

The usual syntax is read: literals, `.`, classes, escapes, groups, alternatives, repetitions, and anchors for the start
and the end. A pattern is a graph whose states are walked all at once (Thompson 1968), so that nothing is tried twice.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

LONGEST = 500  # characters of a pattern
MOST_STATES = 2_000  # after repetitions like {3,8} are written out
_COUNTS = re.compile(r"\{(\d{1,4})\}|\{(\d{0,4}),(\d{0,4})\}")
_GROUP = re.compile(r"\((\?:|\?P<[A-Za-z_][A-Za-z0-9_]*>)?")
_CLASS = re.compile(r"\[\^?\]?(\\.|[^\]\\])*\]", re.DOTALL)

Test = Callable[[str], object]
Build = Callable[["_Graph", int], int]  # gives the state where the part begins, whose end leads to the given one
ACCEPT = 0


@dataclass(frozen=True)
class Pattern:
    """Made by `parse`; `text` is what it was made of."""

    text: str
    _build: Build = field(repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Raises re.error for what is no pattern, is too large, or is written in a way that isn't read."""
        if len(text) > LONGEST:
            raise re.error(f"it has {len(text)} characters, at most {LONGEST} are read")
        found = cls(text, _Parser(text).whole())
        _ = found._graph
        return found

    def matches(self, name: str) -> bool:
        """Whether it matches from the start of `name`, as re.match has it."""
        return self._graph.matches(name)

    @cached_property
    def _graph(self) -> _Graph:
        return _Graph(self._build)


class _Graph:
    """`steps[state]`: the test that a character must pass and the state behind it. `ways[state]`: states that are
    reached for nothing, `at` the start or the end of a name only, or anywhere (None)."""

    def __init__(self, build: Build) -> None:
        self.steps: list[tuple[Test, int] | None] = [None]
        self.ways: list[list[int]] = [[]]
        self.at: list[str | None] = [None]
        self._built = 0
        self._next: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._first = self._reached({build(self, ACCEPT)}, start=True)

    def add(self, step: tuple[Test, int] | None = None, at: str | None = None, ways: list[int] | None = None) -> int:
        self.steps.append(step)
        self.ways.append(ways or [])
        self.at.append(at)
        return len(self.steps) - 1

    def count(self) -> None:
        """Called for each part that is built: empty ones add no state, and repetitions of repetitions multiply."""
        self._built += 1
        if self._built > MOST_STATES:
            raise re.error(f"its repetitions, written out, have more than {MOST_STATES:,} parts")

    def matches(self, name: str) -> bool:
        states = self._first
        for character in name:
            if ACCEPT in states or not states:
                return bool(states)
            if (states, character) not in self._next:
                steps = [step for state in states if (step := self.steps[state])]
                self._next[states, character] = self._reached({to for test, to in steps if test(character)})
            states = self._next[states, character]
        return ACCEPT in self._reached(states, start=not name, end=True)

    def _reached(self, states: set[int] | frozenset[int], start: bool = False, end: bool = False) -> frozenset[int]:
        passable = {None} | {at for at, here in (("start", start), ("end", end)) if here}
        found, waiting = set(states), list(states)
        while waiting:
            state = waiting.pop()
            if self.at[state] not in passable:
                continue
            new = set(self.ways[state]) - found
            found |= new
            waiting += new
        return frozenset(found)


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
        return parts[0] if len(parts) == 1 else _either(parts)

    def _sequence(self) -> Build:
        parts: list[Build] = []
        while self._ahead() not in ("", "|", ")"):
            parts.append(self._repeated())
        return _one_after_another(parts)

    def _repeated(self) -> Build:
        at = self.place
        part, anchor = self._atom()
        bounds = self._bounds()
        if bounds is None:
            return part
        if anchor:
            raise re.error("nothing to repeat", self.text, at)
        if self._ahead() == "?":  # lazy: whether there is a match is the same
            self.place += 1
        if self._ahead() == "+" or self._bounds() is not None:
            raise re.error("multiple repeat", self.text, self.place)
        return _times(part, *bounds)

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
            return _one(_class(found[0])), False
        if sign in ("*", "+", "?"):
            raise re.error("nothing to repeat", self.text, at)
        self.place += 1
        if sign in ("^", "$"):
            return _anchor("start" if sign == "^" else "end"), True
        if sign == "\\":
            return self._escape()
        return _one((lambda character: character != "\n") if sign == "." else sign.__eq__), False

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
            return _anchor("start" if sign == "A" else "end"), True
        if sign and sign in "dDsSwW":
            return _one(_class("\\" + sign)), False
        if not sign or sign.isalnum():
            raise re.error(f"escape \\{sign} is not read", self.text, self.place - 1)
        return _one(sign.__eq__), False


def _class(text: str) -> Test:
    with warnings.catch_warnings(action="ignore"):  # of what a later Python may read as sets in sets
        return re.compile(text).fullmatch


def _one(test: Test) -> Build:
    def build(graph: _Graph, to: int) -> int:
        graph.count()
        return graph.add((test, to))

    return build


def _anchor(at: str) -> Build:
    def build(graph: _Graph, to: int) -> int:
        graph.count()
        return graph.add(at=at, ways=[to])

    return build


def _one_after_another(parts: list[Build]) -> Build:
    def build(graph: _Graph, to: int) -> int:
        graph.count()
        for part in reversed(parts):
            to = part(graph, to)
        return to

    return build


def _either(parts: list[Build]) -> Build:
    def build(graph: _Graph, to: int) -> int:
        graph.count()
        return graph.add(ways=[part(graph, to) for part in parts])

    return build


def _times(part: Build, least: int, most: int | None) -> Build:
    def build(graph: _Graph, to: int) -> int:
        entry = to
        if most is None:
            graph.count()
            entry = graph.add()
            graph.ways[entry] += [part(graph, entry), to]
        for _ in range((most or least) - least):
            graph.count()
            entry = graph.add(ways=[part(graph, entry), to])
        for _ in range(least):
            graph.count()
            entry = part(graph, entry)
        return entry

    return build
