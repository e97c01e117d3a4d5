"""What a comparison says: the fastest placement for each step, against the best of every other family."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from moe_dist.bench.row import Row
from moe_dist.bench.table import Column, fitting, groups, number, speed, stack_of, times_floor
from moe_dist.engine.ties import explained_us
from moe_dist.messages.counts import count_of
from moe_dist.messages.printable import printable
from moe_dist.model.spec import MAPPED

UNCLAIMED = "nothing claimed"


@dataclass(frozen=True)
class Answer:
    """Of rows that may be compared. `best`: the fastest of each family, the fastest family first. `tie`: scatter
    explains its lead, or is not known. `peers`: the fastest of each other package, which compete with nobody: an answer
    is about what can be run here."""

    best: list[Row]
    tie: bool
    peers: tuple[Row, ...] = ()

    @property
    def family(self) -> str:
        if self.tie:
            return "a tie" if scatters(*self.best[:2]) else UNCLAIMED
        return family(self.best[0])


def answers(rows: Iterable[Row]) -> list[Answer]:
    """One for each group of rows that may be compared and has several families. Rows that failed their check don't
    compete, nor do those without times."""
    found = []
    for group in groups(rows):
        best: dict[str, Row] = {}
        peers: dict[str, Row] = {}
        for row in group:  # the fastest first
            if row.ok is not False and row.p50_us is not None:
                if row.peer is not None:
                    peers.setdefault(f"{row.placement} {row.backend}", row)
                else:
                    best.setdefault(family(row), row)
        if len(best) > 1:
            first, second, *_ = ranked = list(best.values())
            found.append(Answer(ranked, tied(first, second), tuple(peers.values())))
    return found


def family(row: Row) -> str:
    """The kind of placement; one with a map of experts is a kind of its own, to be compared with the plain one."""
    mapped = " map" if MAPPED in row.placement else ""
    if row.tp > 1 and row.ep > 1:
        return f"TPxEP{mapped}"
    return "TP" if row.tp > 1 else f"EP{mapped}" if row.ep > 1 else "single"


def tied(first: Row, second: Row) -> bool:
    """Whether two medians differ by no more than scatter explains (`engine.ties`). Of a row with too few rounds nothing
    is known, so nothing is claimed."""
    if first.scatter_us is None or second.scatter_us is None:
        return True
    times = speed(first), speed(second)
    together = (first.run, first.start) == (second.run, second.start)
    return abs(times[1] - times[0]) <= explained_us(times, (first.scatter_us, second.scatter_us), together)


def scatters(*rows: Row) -> bool:
    """Whether it is known of all of them, so that a tie can be told."""
    return all(row.scatter_us is not None for row in rows)


def tie_of(first: Row, row: Row) -> str:
    """What is said of a row beside the fastest one; nothing where it is slower by more than scatter explains."""
    return "" if not tied(first, row) else "tie" if scatters(first, row) else "not claimed"


def answer_table(found: list[Answer], width: int | None = None) -> Table | Group:
    """The best row of each placement family, by step; what differs between steps names them."""
    lines = {id(row): answer for answer in found for row in (*answer.best, *answer.peers)}
    rows = [row for answer in found for row in (*answer.best, *answer.peers)]
    firsts = {id(answer.best[0]) for answer in found}

    def of_step(text: str | None, row: Row) -> str:
        return (text or "") if id(row) in firsts else ""

    def several(key: str) -> bool:
        return len({getattr(row, key) for row in rows}) > 1

    def against(row: Row) -> str | Text:
        answer = lines[id(row)]
        if id(row) in firsts:
            said = tie_of(*answer.best[:2]) if answer.tie else ""
            return Text(said or "fastest", "bold")
        times = f"{speed(row) / speed(answer.best[0]):.2f}x"
        return ", ".join(filter(None, [times, tie_of(answer.best[0], row)]))

    wanted: list[Column | None] = [
        Column("model", 0, lambda row: of_step(printable(row.model), row), right=False) if several("model") else None,
        Column("ranks", 0, lambda row: of_step(str(row.world), row)) if several("world") else None,
        Column("layers", 0, lambda row: of_step(row.layer.removeprefix("stack:"), row)) if several("layer") else None,
        Column("tokens", 0, lambda row: of_step(f"{row.global_tokens:,}", row)),
        Column("layout", 0, lambda row: of_step(row.token_layout, row)) if several("token_layout") else None,
        Column("split", 0, lambda row: of_step(row.token_split, row)) if several("token_split") else None,
        Column("routing", 0, lambda row: of_step(printable(row.skew), row), right=False, folds=True),
        Column("best of", 0, lambda row: row.placement, right=False),
        Column("exchange", 0, lambda row: printable(row.exchange), right=False),
        Column("backend", 0, lambda row: printable(row.backend), right=False) if several("backend") else None,
        Column("mode", 0, lambda row: "graph" if row.graph else "eager", right=False) if several("graph") else None,
        Column("µs", 0, lambda row: number(row.p50_us)),
        Column("×floor", 1, times_floor) if any(row.floor_us for row in rows) else None,
        Column("", 0, against, right=False),
    ]
    return fitting(rows, [column for column in wanted if column is not None], width, title_of(rows))


def title_of(rows: list[Row]) -> str:
    """What all of these steps have in common."""
    first = rows[0]
    models = {row.model for row in rows}
    parts = [printable(first.model) + f" {first.quant}"] if len(models) == 1 else []
    if len({row.world for row in rows}) == 1:
        parts.append(count_of(first.world, "rank"))
    for key, text in (("backend", f"backend {printable(first.backend)}"),
                      ("graph", "in a CUDA graph" if first.graph else "eager")):  # fmt: skip
        if len({getattr(row, key) for row in rows}) == 1:
            parts.append(text)
    if first.token_split != "even" and len({row.token_split for row in rows}) == 1:
        parts.append(f"split {first.token_split}")
    if len({row.layer for row in rows}) == 1 and (stacked := stack_of(first)):
        parts.append(stacked.strip())
    return " · ".join(parts)


def last_line(found: list[Answer]) -> str:
    """Which family won how often, in one line."""
    if not found:
        return "Verdict: nothing to compare; it takes timed, right rows of two placements with equal tokens and layout."
    wins: dict[str, int] = {}
    for answer in found:
        wins[answer.family] = wins.get(answer.family, 0) + 1
    parts = [
        f"{name}{' fastest' * (name not in ('a tie', UNCLAIMED))} in {count}" for name, count in sorted(wins.items())
    ]
    return f"Verdict: {count_of(len(found), 'comparison')}: " + ", ".join(parts) + "."
