"""A report's tables: text in cells, the same for every format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moe_dist.bench.diff import UNKNOWN
from moe_dist.bench.row import Hardware, Row
from moe_dist.bench.table import number, speed, times_floor
from moe_dist.messages.counts import count_of
from moe_dist.report.findings import Setup, backends_beside_each_other, skews_beside_each_other
from moe_dist.report.recorded import Recorded, known
from moe_dist.report.words import beside, checked

NOTHING = "-"  # a null
MARKED_MOST = 200  # lines of the table of rows that are no winners; all rows are in the table of rows


@dataclass(frozen=True)
class Table:
    """`numeric`: places of columns that stand right."""

    title: str
    head: list[str]
    lines: list[list[str]]
    note: str = ""
    numeric: frozenset[int] = field(default_factory=frozenset)


def text_of(row: Row, key: str) -> str:
    value = getattr(row, key)
    return str(value) if value is not None else NOTHING if known(row, key) else UNKNOWN


def comparisons(found: Iterable[Setup]) -> Table:
    """The fastest of each placement family, for every step that has several."""
    lines = [line for setup in found for answer in setup.answers for line in _beside(setup, answer.best)]
    note = (
        "Rows that failed their check or were not checked don't compete. A tie is a difference that scatter explains."
    )
    note += " Where a row has no scatter, nothing is claimed."
    return _table("All comparisons of placements", lines, ["µs", "× floor", "against the fastest"], note)


CASE = ["file", "model", "ranks", "mode", "layout", "routing", "tokens", "a rank", "placement", "exchange", "backend"]


def _case(file: Recorded, row: Row) -> list[str]:
    """The cells of CASE."""
    per_rank = text_of(row, "tokens_per_rank") if row.tokens_per_rank is None else f"{row.tokens_per_rank:,}"
    common = [file.name, row.model, str(row.world), "graph" if row.graph else "eager", row.token_layout, row.skew]
    return [*common, f"{row.global_tokens:,}", per_rank, row.placement, row.exchange, row.backend]


def _beside(setup: Setup, rows: Sequence[Row]) -> list[list[str]]:
    return [[*_case(setup.file, row), number(row.p50_us), times_floor(row), said]
            for row, said in zip(rows, beside(rows), strict=True)]  # fmt: skip


def _table(title: str, lines: list[list[str]], more: list[str], note: str = "", words: int = 1) -> Table:
    """Columns of CASE and `more`, of which the last `words` are no numbers."""
    head = [*CASE, *more]
    numbers = {CASE.index("tokens"), CASE.index("a rank"), *range(len(CASE), len(head) - words)}
    return Table(title, head, lines, note, frozenset(numbers))


def stages(found: Iterable[Setup]) -> Table:
    """Of the best rows for the fewest and the most tokens."""
    rows = [(setup.file, row) for setup in found for answer in setup.ends for row in answer.best]
    names = list(dict.fromkeys(name for _, row in rows for name in row.stages_us or {}))
    lines = []
    for file, row in rows:
        parts = row.stages_us or {}
        cells = [number(parts.get(name)) if known(row, "stages_us") else UNKNOWN for name in names]
        rest = number(row.unstaged_us) if known(row, "unstaged_us") else UNKNOWN
        lines.append([*_case(file, row), *cells, rest, number(row.p50_us)])
    note = "µs on the rank whose stages take longest. Stages are of other steps than the p50; they don't add up to it."
    return _table("Stages of the best rows", lines, [*names, "unstaged", "p50 µs"], note, words=0)


def backends(found: Iterable[Setup]) -> Table:
    """Same placement and exchange, other backend."""
    lines = [line for setup in found for rows in backends_beside_each_other(setup) for line in _beside(setup, rows)]
    return _table("Backend against backend", lines, ["µs", "× floor", "against the fastest"])


def skews(files: Iterable[Recorded]) -> Table:
    """The same case under several routings."""
    lines = []
    for file in files:
        for rows in skews_beside_each_other(file):
            for row in rows:
                busiest = f"{row.imbalance:.2f}" if row.imbalance is not None else UNKNOWN
                against = f"{speed(row) / speed(rows[0]):.2f}x" + ("" if row.ok is True else f", {checked(row)}")
                lines.append([*_case(file, row), number(row.p50_us), busiest, against])
    return _table("One case under several routings", lines, ["µs", "rows max/mean", "against the first of them"])


def details(found: Sequence[Setup], files: Iterable[Recorded]) -> list[Table]:
    """What the charts show, where there is any of it."""
    return [table for table in (stages(found), backends(found), skews(files)) if table.lines]


def marked(files: Iterable[Recorded]) -> Table:
    """Rows that no comparison counts."""
    rows = [(file, row) for file in files for row in file.rows if row.ok is not True or row.p50_us is None]
    lines = [[*_case(file, row), number(row.p50_us), why(row)] for file, row in rows[:MARKED_MOST]]
    note = f"The first {MARKED_MOST} of {len(rows):,}." if len(rows) > MARKED_MOST else ""
    return _table("Rows that are no winners", lines, ["µs", "why"], note)


def why(row: Row) -> str:
    if row.ok is False:
        lost = f" ({', '.join(row.not_finite)} infinite or NaN)" if row.not_finite else ""
        return f"NO: out of tolerance{lost}"
    unchecked = "not checked against the oracle" if known(row, "ok") else "whether it was checked is not recorded"
    return ", ".join(["not timed"] * (row.p50_us is None) + [unchecked] * (row.ok is None))


def refused(file: Recorded) -> Table:
    by_reason: dict[str, list[str]] = {}
    for item in file.refused:
        by_reason.setdefault(item.reason, []).append(item.case)
    lines = [[str(len(cases)), cases[0], reason] for reason, cases in by_reason.items()]
    return Table(f"Not run, and why: {file.name}", ["cases", "the first of them", "reason"], lines, "", frozenset({0}))


def provenance(file: Recorded) -> list[tuple[str, str]]:
    """What is known of a file's origin."""
    machine = file.machine
    versions = [f"{key} {machine[key] or 'none'}" if key in machine else f"{key} {UNKNOWN}"
                for key in Hardware.model_fields if key not in ("gpu", "cpu", "cores", "count")]  # fmt: skip
    cores = f", {machine['cores']} CPU cores" if machine.get("cores") else ""
    failed, unchecked = (sum(row.ok is ok for row in file.rows) for ok in (False, None))
    counts = f"{count_of(len(file.rows), 'row')}, of them {failed:,} out of tolerance and {unchecked:,} unchecked; "
    counts += f"{count_of(len(file.refused), 'case')} refused"
    found = [("machine", file.device + cores), ("versions", ", ".join(versions)), ("date", file.date),
             ("commit", file.commit), ("command", file.command), ("rows", counts)]  # fmt: skip
    found += [("1 rank" if world == "1" else f"{world} ranks", "; ".join(lines)) for world, lines in file.ranks.items()]
    found += [("notice", f"rank {', '.join(map(str, said.ranks))}: {said.text}") for said in file.notices]
    if file.lacks:
        found.append((UNKNOWN, f"{', '.join(file.lacks)}: no row has these keys"))
    if file.unread:
        found.append(("not read", f"{', '.join(file.unread)}: keys that this version does not know"))
    return found + [("note", file.note)] * bool(file.note)
