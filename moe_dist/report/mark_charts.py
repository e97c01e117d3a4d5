"""Bars of stages, and lines of marks: backends and routings beside each other. A mark of a row that is no winner is
hollow and says why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from moe_dist.bench.answer import Answer, family
from moe_dist.bench.row import Row
from moe_dist.bench.table import number, speed
from moe_dist.report import svg
from moe_dist.report.findings import FAMILIES, Setup, backends_beside_each_other, skews_beside_each_other
from moe_dist.report.recorded import Recorded, known
from moe_dist.report.svg import BOTTOM, RIGHT, WIDTH, Figure, Scale, thinned
from moe_dist.report.words import beside, case_title, name_of, phase, tip, tokens_of

LINES_MOST = 24  # of one chart; the tables have all
Line = tuple[str, list[tuple[str, Row, str]]]  # its label, and for each mark: whose it is, its row, what it says


def stage_bars(answer: Answer) -> Figure | None:
    """A bar for each family's best row, of its stages."""
    bars = [(row, [*row.stages_us.items(), ("unstaged", max(row.unstaged_us or 0.0, 0.0))])
            for row in answer.best if row.stages_us]  # fmt: skip
    if not bars:
        return None
    names = list(dict.fromkeys(name for _, parts in bars for name, us in parts if us > 0))
    scale = (WIDTH - 12) / max(max(sum(us for _, us in parts), speed(row)) for row, parts in bars)
    head, top = svg.legend(list(enumerate(names)), bars=True)
    found = [head]
    for row, parts in bars:
        total = number(sum(us for _, us in parts))
        label = f"{name_of(row)}: stages {total}, p50 {number(row.p50_us)} µs"
        found.append(svg.text(6, top + 16, svg.cut(label, WIDTH - 12)))
        x = 6.0
        for name, us in parts:
            if us > 0:
                said = f"{name} {number(us)} µs, {name_of(row)}"
                found.append(_bar(x, top + 22, us * scale, names.index(name), said, number(us)))
                x += us * scale
        at = 6 + speed(row) * scale
        found.append(svg.line(at, top + 19, at, top + 47, "p50"))
        top += 54
    note = "The upright line is the p50, which is of other steps than the stages."
    if not all(known(row, "unstaged_us") for row, _ in bars):
        note += " Time in no stage was not recorded."
    title = f"Stages: {phase(bars[0][0]).lower()}, {tokens_of(bars[0][0])}"
    return Figure(title, svg.chart(title, top + 4, *found), note)


def _bar(x: float, y: float, width: float, series: int, said: str, shown: str) -> Markup:
    rect = svg.element("rect", x=x, y=y, width=max(width - 1, 0.5), height=22.0)
    parts = [svg.element("title", said), rect]
    if width > len(shown) * svg.LETTER + 4:
        parts.append(svg.text(x + width / 2, y + 15, shown, text_anchor="middle", class_="halo"))
    return svg.element("g", *parts, class_=f"pt s{series % svg.SERIES}")


def backend_marks(setup: Setup) -> Figure | None:
    groups = backends_beside_each_other(setup)
    places = [f"{rows[0].global_tokens:,} · {rows[0].placement} {rows[0].exchange}" for rows in groups]
    lines = [(place, [(row.backend, row, f"{tip(row)}: {said}") for row, said in zip(rows, beside(rows), strict=True)])
             for place, rows in zip(places, groups, strict=True)]  # fmt: skip
    tokens = "tokens of a step" if setup.whole else "tokens that enter the rank"
    note = f"Left: {tokens}, placement and exchange."
    return _marks("Backend against backend", lines, "time / fastest checked backend", note)


def skew_marks(file: Recorded, setups: Iterable[Setup]) -> list[Figure]:
    """For each model, number of ranks and mode, the cases that are a family's best under some routing."""
    best = {id(row) for setup in setups for rows in setup.best.values() for row in rows}
    by_title: dict[str, list[list[Row]]] = {}
    for rows in skews_beside_each_other(file):
        if best & {id(row) for row in rows}:
            by_title.setdefault(case_title(rows[0]), []).append(rows)
    found = []
    for title, groups in by_title.items():
        groups = sorted(groups, key=lambda rows: (rows[0].global_tokens, FAMILIES.index(family(rows[0]))))
        lines = [(f"{rows[0].global_tokens:,} · {name_of(rows[0])}",
                  [(row.skew, row, f"routing {row.skew}: {tip(row)}") for row in rows]) for rows in groups]  # fmt: skip
        note = "Left: tokens of a step, placement, exchange and backend; cases that are the best of their placement."
        firsts = {rows[0].skew for rows in groups}
        unit = f"time / time under {firsts.pop()}" if len(firsts) == 1 else "time / time under the first valid routing"
        found.append(_marks(title, lines, unit, note))
    return [figure for figure in found if figure]


def _marks(title: str, lines: Sequence[Line], unit: str, note: str) -> Figure | None:
    """A line of marks for each case, over the time of its first row. Long labels stand above their lines."""
    if not lines:
        return None
    if len(lines) > LINES_MOST:
        note += f" {LINES_MOST} of {len(lines):,} lines are drawn; the tables have all."
        lines = thinned(lines, LINES_MOST)
    names = sorted({name for _, marks in lines for name, _, _ in marks})  # so that colours do not tell who is fastest
    ratios = [speed(row) / speed(marks[0][1]) for _, marks in lines for _, row, _ in marks]
    head, top = svg.legend(list(enumerate(names)))
    room = max(len(label) for label, _ in lines) * svg.LETTER + 12
    beside_lines = room < WIDTH * 0.5
    left, step = (room, 20.0) if beside_lines else (14.0, 34.0)
    x = Scale(min(ratios) / 1.04, max(max(ratios), 1.5) * 1.06, left, WIDTH - RIGHT)
    bottom = top + 8 + step * len(lines)
    found = [head, _ratio_axis(x, top, bottom, unit)]
    for place, (label, marks) in enumerate(lines):
        y = top + step * (place + 1) - 4
        if beside_lines:
            found.append(svg.text(left - 8, y + 4, label, text_anchor="end"))
        else:
            found.append(svg.text(4, y - 10, svg.cut(label, WIDTH - 8), class_="halo"))
        found.append(svg.line(left, y, WIDTH - RIGHT, y, "grid"))
        for name, row, said in reversed(marks):  # the first on top
            at = x(speed(row) / speed(marks[0][1]))
            found.append(svg.mark(at, y, names.index(name), said, flawed=row.ok is not True))
    if any(row.ok is not True for _, marks in lines for _, row, _ in marks):
        note += " Hollow: not checked, or out of tolerance."
    return Figure(title, svg.chart(title, bottom + BOTTOM, *found), note)


def _ratio_axis(x: Scale, top: float, bottom: float, unit: str) -> Markup:
    found = [svg.text((x.start + x.stop) / 2, bottom + 33, unit, text_anchor="middle", class_="name")]
    for tick in x.ticks():
        found += [svg.line(x(tick), top, x(tick), bottom, "grid"),
                  svg.text(x(tick), bottom + 16, f"{tick:g}", text_anchor="middle")]  # fmt: skip
    return Markup("").join(found)
