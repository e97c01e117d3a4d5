"""A sweep: cases through groups of ranks, on with the rest when one fails, and how long what is left will take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from statistics import mean

from moe_dist.bench.case import Case
from moe_dist.bench.findings import merge
from moe_dist.bench.identity import case_key
from moe_dist.bench.measure import measure, ready
from moe_dist.bench.results import Outcome, make_row
from moe_dist.bench.rounds import Turn, schedule, turns
from moe_dist.bench.row import Failed, Refused, Row
from moe_dist.engine.on_nodes import check_placed
from moe_dist.engine.plan import Plan
from moe_dist.errors import ClusterLost, MoeDistError, RankFailure, UnsupportedError
from moe_dist.exits.exit_codes import code_of
from moe_dist.messages.counts import count_of
from moe_dist.runtime.context import Group
from moe_dist.runtime.restarts import Restarts

Shown = Callable[[str], None]
MOST_STARTS = 3  # of a group that takes the place of one that was given up


@dataclass(frozen=True)
class Step:
    """What a turn, or the failure of a case, has come to. `ended`: the row that is finished by it, or the failure.
    `turns_left`: of the sweep, and how many seconds they will take about; None while nothing is known of that."""

    ended: Row | Failed | None
    turns_left: int
    seconds_left: float | None


@dataclass(frozen=True)
class Item:
    """A case of the sweep, and the key of its row."""

    case: Case
    plan: Plan
    key: str

    @property
    def world(self) -> int:
        return self.plan.placement.world


@dataclass
class Left:
    """Turns that are left. A case's first turn takes longer than its later ones, with weights, the check and warming
    up; so each kind is estimated by the mean of its own, and by the other kind's until there is one."""

    turns: dict[str, int]  # of each case, by its key
    total: dict[str, int]
    took: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})  # seconds; True: a first turn

    @classmethod
    def of(cls, items: list[Item]) -> Left:
        total = {item.key: turns(item.case) for item in items}
        return cls(dict(total), total)

    def done(self, key: str, turn: Turn, seconds: float) -> None:
        self.turns[key] -= 1
        self.took[turn.number == 0].append(seconds)

    def failed(self, key: str) -> None:
        """No turn of it is to come."""
        self.turns[key] = 0

    def lost(self, keys: list[str]) -> None:
        """All turns are to come of those of `keys` that are not finished: what their ranks knew is gone."""
        self.turns |= {key: self.total[key] for key in keys if self.turns[key]}

    def seconds(self) -> float | None:
        known = {kind: mean(times) for kind, times in self.took.items() if times}
        if not known:
            return None
        firsts = sum(self.turns[key] == total for key, total in self.total.items())
        later = sum(self.turns.values()) - firsts
        return sum(
            count * known.get(kind, known.get(not kind, 0.0)) for kind, count in ((True, firsts), (False, later))
        )


def run_cases(
    planned: list[tuple[Case, Plan]],
    start_group: Callable[[int, Shown], Group],
    timeout_s: float,
    outcome: Outcome,
    shown: Shown,
    said: Shown,
    step_done: Callable[[Step], None],
    runtime: str,
    go_on: bool = False,
    restarts: int = 0,
) -> None:
    """Measure into `outcome`, whose rows hold what is known of each case after each of its turns; consecutive cases of
    one world size share a group. `said` gets what the user must be told.

    `restarts`: so many times in all, a case in which a rank fails is measured again, as all that are not finished are:
    from their start, on a fresh group of ranks. Where none is left it has failed, as it did the first time. A group in
    which a rank fails before any case is started again likewise. `go_on`: the failure of a case is written down, and
    the others are measured on a fresh group. Without, it is raised. Raises ClusterLost, and the error of a group that
    can't be started: of a world size's first one at once, of one after a failure when MOST_STARTS attempts have failed.
    """
    items = [Item(case, plan, case_key(case, plan, runtime)) for case, plan in planned]
    again = Restarts(restarts, said)
    _Sweep(items, start_group, timeout_s, outcome, shown, said, step_done, go_on, again).run()


@dataclass
class _Sweep:
    items: list[Item]
    start_group: Callable[[int, Shown], Group]
    timeout_s: float
    outcome: Outcome
    shown: Shown
    said: Shown
    step_done: Callable[[Step], None]
    go_on: bool
    restarts: Restarts
    starts: int = 0

    def __post_init__(self) -> None:
        self.left = Left.of(self.items)
        self.first: dict[str, MoeDistError] = {}  # of each case that has failed

    def run(self) -> None:
        for world, share in groupby(self.items, key=lambda item: item.world):
            items, attempts = list(share), 1
            while items:
                with closing(self._started(world, attempts)) as group:
                    self.outcome.places[world] = list(group.describe())
                    self._measured(group, self._fitting(group, items))
                self.starts += 1
                items = [item for item in items if self.left.turns[item.key]]
                attempts = MOST_STARTS

    def _started(self, world: int, attempts: int) -> Group:
        more = Restarts(attempts - 1, self.said, "further attempt")
        while True:
            self.shown(f"starting {count_of(world, 'rank')}")
            try:
                return self._proven(self.start_group(world, self.shown))
            except MoeDistError as error:
                if isinstance(error, RankFailure) and self.restarts.take(error):
                    continue
                failed = f"{count_of(world, 'rank')} could not be started again: {error}"
                if isinstance(error, ClusterLost) or not more.take(failed):
                    raise

    def _proven(self, group: Group) -> Group:
        """What no case is to blame for is found before the first one."""
        try:
            group.run(ready, self.items[0].plan.machine, timeout_s=self.timeout_s, shown=self.shown)
        except BaseException:
            group.close()
            raise
        return group

    def _fitting(self, group: Group, items: list[Item]) -> list[Item]:
        """Those that can run where the ranks are, before anything of them is made. The others are refused."""
        found, reasons = [], Counter[str]()
        for item in items:
            try:
                check_placed(item.plan, group.nodes)
                found.append(item)
            except UnsupportedError as error:
                if not self.go_on:
                    raise
                self.left.turns[item.key] = 0
                self.outcome.refused.append(Refused(case=item.case.label, reason=str(error)))
                reasons[str(error)] += 1
        for reason, count in reasons.items():
            self.said(f"{count} {'case' if count == 1 else 'cases'} left out: {reason}")
        return found

    def _measured(self, group: Group, items: list[Item]) -> None:
        """Until all is done, or one case has failed."""
        if not items:
            return
        for index, turn in schedule([(item.case, item.plan) for item in items], items[0].plan.machine.room):
            item, begin = items[index], time.monotonic()
            try:
                found = merge(
                    group.run(measure, item.case, item.plan, turn, timeout_s=self.timeout_s, shown=self.shown)
                )
            except MoeDistError as error:
                if isinstance(error, ClusterLost):
                    raise
                self.left.lost([other.key for other in items])
                self._failed(item, error)
                return
            row = make_row(
                item.case, item.plan, found, group.runtime, item.key, run=self.outcome.run, start=self.starts
            )
            self.outcome.put(row)
            for line in self.outcome.add_notices(found.notices):
                self.said(line)
            self.left.done(item.key, turn, time.monotonic() - begin)
            self._tell(row if turn.last else None)

    def _failed(self, item: Item, latest: MoeDistError) -> None:
        """Measured again, or written down, or its first error is raised."""
        error = self.first.setdefault(item.key, latest)
        if isinstance(latest, RankFailure) and self.restarts.take(f"{item.case.label}: {latest}"):
            return
        if not self.go_on and error is latest:
            raise error
        if not self.go_on:
            raise error from latest
        self.left.failed(item.key)
        rank, op = (error.rank, error.op) if isinstance(error, RankFailure) else (None, None)
        failed = Failed(
            key=item.key,
            run=self.outcome.run,
            case=item.case.label,
            error=type(error).__name__,
            rank=rank,
            op=op,
            reason=error.cause if isinstance(error, RankFailure) else str(error),
            exit_code=code_of(error),
        )
        self.outcome.fail(failed)
        self.said(f"{item.case.label}: {error}; going on without it")
        self._tell(failed)

    def _tell(self, ended: Row | Failed | None) -> None:
        self.step_done(Step(ended, sum(self.left.turns.values()), self.left.seconds()))
