"""Charts over the tokens of a step, and the roofline: of the best valid rows of each placement family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup

from moe_dist.bench.peaks import PEAKS
from moe_dist.bench.row import Row
from moe_dist.report import svg
from moe_dist.report.findings import FAMILIES, Crossing, Setup
from moe_dist.report.svg import BOTTOM, LEFT, PLOT, RIGHT, WIDTH, Figure, Scale, thinned
from moe_dist.report.words import tip

STEPS_MOST = 60  # points of one line
CROSSINGS_MOST = 3  # that are marked


def _lines(setup: Setup, y_of: Callable[[Row], float | None]) -> dict[str, list[tuple[Row, float]]]:
    """By family, its best rows that have this number."""
    found = {name: [(row, y) for row in thinned(rows, STEPS_MOST) if (y := y_of(row))]
             for name, rows in setup.best.items()}  # fmt: skip
    return {name: points for name, points in found.items() if points}


def latency(setup: Setup) -> Figure | None:
    lines, crossings = _lines(setup, lambda row: row.p50_us), setup.crossings
    if not lines:
        return None
    floors: dict[int, float] = {}  # the smaller one, where placements differ in it
    for row, _ in (point for line in lines.values() for point in line):
        if row.floor_us:
            floors[row.global_tokens] = min(row.floor_us, floors.get(row.global_tokens, row.floor_us))
    notes = [_crossing_note(crossing) for crossing in crossings[:CROSSINGS_MOST]]
    if len(crossings) > CROSSINGS_MOST:
        notes.append(f"These are the first {CROSSINGS_MOST} of {len(crossings)} crossings.")
    if not floors:
        notes.append("No floor is known for these rows.")
    title = "Latency of the best rows of each placement"
    return Figure(
        title, _plot(title, lines, "p50 µs", sorted(floors.items()), crossings[:CROSSINGS_MOST]), " ".join(notes)
    )


def _crossing_note(crossing: Crossing) -> str:
    first, second = crossing.between
    said = f"The lines cross at about {crossing.tokens:,.0f} tokens, interpolated between {first:,} and {second:,}."
    return said if crossing.decided else f"{said} This is not claimed: one of these steps is a tie at least."


def over_floor(setup: Setup) -> Figure | None:
    lines = _lines(setup, lambda row: row.p50_us / row.floor_us if row.p50_us and row.floor_us else None)
    title = "Times over the floor, same rows"
    return Figure(title, _plot(title, lines, "p50 / floor", base=(1.0,))) if lines else None


def _plot(
    title: str,
    lines: dict[str, list[tuple[Row, float]]],
    y_name: str,
    floor: Sequence[tuple[int, float]] = (),
    crossings: Sequence[Crossing] = (),
    base: Sequence[float] = (),
) -> Markup:
    """Lines over the tokens of a step. `base`: values that the upright axis has in any case."""
    head, top = svg.legend([(FAMILIES.index(name), f"best {name}") for name in lines], "floor" if floor else "")
    top += 24 + 15 * len(crossings)
    points = [point for line in lines.values() for point in line]
    tokens = sorted({row.global_tokens for row, _ in points})
    x = svg.spanning(tokens, LEFT + 6, WIDTH - RIGHT - 6)
    y = svg.spanning([value for _, value in points] + [us for _, us in floor] + [*base], top + PLOT, top)
    parts = [svg.axes(x, y, tokens, "tokens of a step, all ranks", y_name)]
    parts += [_crossing(x, y, crossing, len(crossings) - place) for place, crossing in enumerate(crossings)]
    if floor:
        parts.append(svg.path([(x(tokens), y(us)) for tokens, us in floor], "floor"))
    for name, line in lines.items():
        series = FAMILIES.index(name)
        parts.append(svg.path([(x(row.global_tokens), y(value)) for row, value in line], f"line s{series}"))
        parts += [svg.mark(x(row.global_tokens), y(value), series, tip(row)) for row, value in line]
    return svg.chart(title, top + PLOT + BOTTOM, head, *parts)


def _crossing(x: Scale, y: Scale, crossing: Crossing, level: int) -> Markup:
    """An upright line with its tokens, `level` lines of text above the name of the axis."""
    at, top = x(crossing.tokens), y.stop - 24 - 15 * level
    right = at > WIDTH / 2
    label = f"≈ {crossing.tokens:,.0f} tokens" + ("" if crossing.decided else ", not claimed")
    words = svg.text(at - 5 if right else at + 5, top + 8, label, text_anchor="end" if right else "start",
                     class_="strong" if crossing.decided else "name")  # fmt: skip
    return svg.line(at, top, at, y.start, "cross") + words


def roofline(setup: Setup) -> Figure | None:
    """TFLOP/s over FLOP for each byte of weights, both of the busiest rank; the roof is bench/roofline.py's."""
    lines = {name: points for name, rows in setup.best.items()
             if (points := [(row, *both) for row in thinned(rows, STEPS_MOST) if (both := _rates(row))])}  # fmt: skip
    points = [point for line in lines.values() for point in line]
    if not points:
        return None
    peaks = PEAKS.get(setup.file.machine.get("gpu", ""))
    flops = (peaks.fp8_flops if setup.first.quant.startswith("fp8") else peaks.bf16_flops) / 1e12 if peaks else 0.0
    knee = [(flops * 1e12 / peaks.bandwidth, flops)] if peaks else []
    head, top = svg.legend([(FAMILIES.index(name), f"best {name}") for name in lines], "peak rates" if peaks else "")
    top += 24
    x = svg.spanning([point[1] for point in points] + [at for at, _ in knee], LEFT + 6, WIDTH - RIGHT - 6, 1.6)
    y = svg.spanning([point[2] for point in points] + [most for _, most in knee], top + PLOT, top, 1.6)
    parts = [svg.axes(x, y, x.ticks(), "FLOP for each byte of weights", "TFLOP/s")]
    if peaks:
        slope = peaks.bandwidth / 1e12
        start = max(x.low, y.low / slope)
        roof = [(start, start * slope), *knee, (x.high, flops)]
        parts.append(svg.path([(x(at), y(rate)) for at, rate in roof], "floor"))
    parts += _labels(points, x, y)
    for name, line in lines.items():
        parts += [svg.mark(x(at), y(rate), FAMILIES.index(name), tip(row)) for row, at, rate in line]
    title = "Roofline of the same rows"
    note = "Numbers are tokens of a step. Rates are those of whole steps, exchange included."
    if not peaks:
        note += " No peak rates were measured on this device."
    return Figure(title, svg.chart(title, top + PLOT + BOTTOM, head, *parts), note)


def _labels(points: Iterable[tuple[Row, float, float]], x: Scale, y: Scale) -> list[Markup]:
    """The tokens of the highest point of each step, above and below in turn, where they have room."""
    highest: dict[int, tuple[float, float]] = {}
    for row, at, rate in sorted(points, key=lambda point: (point[0].global_tokens, -point[2])):
        highest.setdefault(row.global_tokens, (x(at), y(rate)))
    found: list[Markup] = []
    taken: list[tuple[float, float]] = []
    for place, (tokens, (at, height)) in enumerate(highest.items()):
        label, height = f"{tokens:,}", height + (-10 if place % 2 == 0 else 22)
        width = len(label) * svg.LETTER
        at = min(at, WIDTH - width / 2)
        if all(abs(at - other) > width + 4 or abs(height - other_height) > 14 for other, other_height in taken):
            found.append(svg.text(at, height, label, text_anchor="middle", class_="halo"))
            taken.append((at, height))
    return found


def _rates(row: Row) -> tuple[float, float] | None:
    """FLOP for each byte, TFLOP/s."""
    if not row.tflops or not row.hbm_gbps:
        return None
    return row.tflops * 1e3 / row.hbm_gbps, row.tflops
