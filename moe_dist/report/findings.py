"""Which rows of a report stand beside each other. Which placement is fastest and what a tie is, `bench.answer` decides;
here is only which rows it is asked about."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import exp, log
from typing import Any

from moe_dist.bench.answer import Answer, answers, family, tied
from moe_dist.bench.row import Row
from moe_dist.bench.table import comparable, speed, stack_of
from moe_dist.report.recorded import Recorded

FAMILIES = ("TP", "EP", "TPxEP", "single", "EP map", "TPxEP map")


@dataclass(frozen=True)
class Crossing:
    """Where the lines of the best TP and the best EP rows cross, between two measured steps. `tokens`: of the whole
    step, interpolated between logarithms; where both take equally long in steps between the two, in their middle.
    `decided`: no step from the one to the other is a tie."""

    tokens: float
    between: tuple[int, int]
    decided: bool


@dataclass(frozen=True)
class Setup:
    """Rows of one file that are equal in all that `bench.table.comparable` names but the tokens, and in the mode."""

    file: Recorded
    rows: list[Row]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def whole(self) -> bool:
        """Rows of whole steps. Others are shares of a layer, in which the tokens are those that enter one rank: a share
        of TP and one of EP with equal tokens are not the same work."""
        return is_step(self.first)

    @cached_property
    def answers(self) -> list[Answer]:
        """By tokens. Of rows that passed their check: one that was not checked is no winner either."""
        return answers(valid(self.rows)) if self.whole else []

    @cached_property
    def best(self) -> dict[str, list[Row]]:
        """The fastest valid row of each family, by tokens; nothing of shares."""
        found: dict[tuple[int, str], Row] = {}
        for row in sorted(valid(self.rows), key=speed) if self.whole else []:
            found.setdefault((row.global_tokens, family(row)), row)
        return {name: rows for name in FAMILIES
                if (rows := [found[key] for key in sorted(found) if key[1] == name])}  # fmt: skip

    @property
    def ends(self) -> list[Answer]:
        """The answers for the fewest and for the most tokens."""
        return [self.answers[place] for place in sorted({0, len(self.answers) - 1})] if self.answers else []

    @property
    def crossings(self) -> list[Crossing]:
        steps = [{family(row): row for row in answer.best} for answer in self.answers]
        pairs = [(step["TP"], step["EP"]) for step in steps if "TP" in step and "EP" in step]
        gaps = [log(speed(tp) / speed(ep)) for tp, ep in pairs]
        found = []
        for one, other in pairwise(place for place, gap in enumerate(gaps) if gap):  # between them times are equal
            if gaps[one] * gaps[other] < 0:
                steps_of = [tp.global_tokens for tp, _ in pairs[one : other + 1]]
                first, last = (steps_of[0], steps_of[-1]) if other == one + 1 else (steps_of[1], steps_of[-2])
                way = gaps[one] / (gaps[one] - gaps[other]) if other == one + 1 else 0.5
                at = exp(log(first) + way * (log(last) - log(first)))
                decided = not any(tied(tp, ep) for tp, ep in pairs[one : other + 1])
                found.append(Crossing(at, (steps_of[0], steps_of[-1]), decided))
        return found


def is_step(row: Row) -> bool:
    return row.layer == "whole" or bool(stack_of(row))


def valid(rows: Iterable[Row]) -> list[Row]:
    """Those with times whose errors are all within tolerance, and which are moe_dist's own: another package's stand
    among all rows and win nothing."""
    return [row for row in rows if row.ok is True and row.p50_us is not None and row.peer is None]


def setups(file: Recorded) -> list[Setup]:
    """CUDA graphs before eager steps, else in the file's order."""
    found = grouped(file.rows, lambda row: (*_but(row, global_tokens=0), row.graph))
    return sorted((Setup(file, rows) for rows in found), key=lambda setup: not setup.first.graph)


def told(found: Iterable[Setup]) -> list[Setup]:
    """Those whose answers are said in sentences: CUDA graphs, as serving runs them, and eager steps where there is no
    graph of the same."""
    cases = {(setup.first.graph, _but(setup.first, global_tokens=0)): setup for setup in found if setup.answers}
    return [setup for (graph, case), setup in cases.items() if graph or (True, case) not in cases]


def backends_beside_each_other(setup: Setup) -> list[list[Row]]:
    """Timed rows of one placement, exchange and number of tokens, of several backends; the fastest valid one first."""
    return _several(setup.rows, lambda row: row.backend, lambda row: (row.global_tokens, row.placement, row.exchange))


def skews_beside_each_other(file: Recorded) -> list[list[Row]]:
    """Timed rows of whole steps that differ in the routing alone: valid ones in front, of these `uniform`, else the
    first of the file."""
    order = {skew: place for place, skew in enumerate(dict.fromkeys(row.skew for row in file.rows))}

    def case(row: Row) -> tuple[Any, ...]:
        return (*_but(row, skew=""), row.graph, row.placement, row.exchange, row.backend)

    found = _several(filter(is_step, file.rows), lambda row: row.skew, case)
    return [
        sorted(rows, key=lambda row: (row.ok is not True, row.skew != "uniform", order[row.skew])) for rows in found
    ]


def _but(row: Row, **changes: Any) -> tuple[Any, ...]:
    """What rows must be equal in to be compared, with one part of it left out."""
    return comparable(row.model_copy(update=changes))


def _several(rows: Iterable[Row], name: Callable[[Row], str], case: Callable[[Row], Any]) -> list[list[Row]]:
    """Groups of one case with several names, of which one at least has a valid row. The fastest valid row of a name
    stands for it."""
    found = []
    for group in grouped((row for row in rows if row.p50_us is not None), case):
        by_name: dict[str, Row] = {}
        for row in sorted(group, key=lambda row: (row.ok is not True, speed(row))):
            by_name.setdefault(name(row), row)
        if len(by_name) > 1 and valid(by_name.values()):
            found.append(list(by_name.values()))
    return found


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[list[Row]]:
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.values())
