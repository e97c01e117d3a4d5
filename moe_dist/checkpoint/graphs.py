"""Patterns as graphs whose states are walked all at once (Thompson 1968), so that nothing is tried twice. Names that
begin alike take the same steps, and a step is worked out once."""

from __future__ import annotations

import re
from collections.abc import Callable

MOST_PARTS = 2_000  # of a pattern, after repetitions like {3,8} are written out
MOST_WORK = 8_000_000  # states that are looked at for all names together: some seconds
MOST_KEPT = 1_000_000  # states in remembered places: some ten MB

Test = Callable[[str], object]
Build = Callable[["Graph", int], int]  # gives the state where the part begins, whose end leads to the given one
ACCEPT = 0


class TooMuchWork(Exception):
    """The names asked for so far took more than MOST_WORK."""


class Place:
    """The states that a walk is in. `settled`: whether it matches, whatever comes; None where that is open. `ahead`:
    the places that characters lead to, `ends`: whether it matches if nothing comes, as far as they are known."""

    __slots__ = ("ahead", "ends", "settled", "states")

    def __init__(self, states: frozenset[int]) -> None:
        self.states = states
        self.settled = True if ACCEPT in states else None if states else False
        self.ahead: dict[str, Place] = {}
        self.ends: bool | None = None


class Graph:
    """`steps[state]`: the test that a character must pass and the state behind it. `ways[state]`: states that are
    reached for nothing, `at` the start or the end of a name only, or anywhere (None)."""

    def __init__(self, build: Build, most: int) -> None:
        self.steps: list[tuple[Test, int] | None] = [None]
        self.ways: list[list[int]] = [[]]
        self.at: list[str | None] = [None]
        self.parts, self._most = 0, most
        self._places: dict[frozenset[int], Place] = {}
        self._work = self._kept = 0
        self._first = Place(self._reached({build(self, ACCEPT)}, start=True))

    def add(self, step: tuple[Test, int] | None = None, at: str | None = None, ways: list[int] | None = None) -> int:
        self.steps.append(step)
        self.ways.append(ways or [])
        self.at.append(at)
        return len(self.steps) - 1

    def count(self) -> None:
        """Called for each part that is built: empty ones add no state, and repetitions of repetitions multiply."""
        self.parts += 1
        if self.parts > self._most:
            raise re.error(f"its repetitions, written out, have more than {self._most:,} parts")

    def matches(self, name: str) -> bool:
        if not name:
            return ACCEPT in self._reached(self._first.states, start=True, end=True)
        place = self._first
        for character in name:
            if place.settled is not None:
                return place.settled
            place = place.ahead.get(character) or self._after(place, character)
        if place.ends is None:
            place.ends = ACCEPT in self._reached(place.states, end=True)
        return place.ends

    def _after(self, place: Place, character: str) -> Place:
        self._work += len(place.states)
        if self._work > MOST_WORK:
            raise TooMuchWork
        steps = [step for state in place.states if (step := self.steps[state])]
        states = self._reached({to for test, to in steps if test(character)})
        if states not in self._places:
            self._kept += len(states)
            if self._kept > MOST_KEPT:  # names to come may go elsewhere
                self._places, self._first.ahead, self._kept = {}, {}, len(states)
            self._places[states] = Place(states)
        found = place.ahead[character] = self._places[states]
        return found

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


def one(test: Test) -> Build:
    def build(graph: Graph, to: int) -> int:
        graph.count()
        return graph.add((test, to))

    return build


def anchor(at: str) -> Build:
    def build(graph: Graph, to: int) -> int:
        graph.count()
        return graph.add(at=at, ways=[to])

    return build


def one_after_another(parts: list[Build]) -> Build:
    def build(graph: Graph, to: int) -> int:
        graph.count()
        for part in reversed(parts):
            to = part(graph, to)
        return to

    return build


def either(parts: list[Build]) -> Build:
    def build(graph: Graph, to: int) -> int:
        graph.count()
        return graph.add(ways=[part(graph, to) for part in parts])

    return build


def times(part: Build, least: int, most: int | None) -> Build:
    def build(graph: Graph, to: int) -> int:
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
