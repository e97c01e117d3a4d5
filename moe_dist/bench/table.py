"""Rows as people read them: one table for what may be compared, and a verdict in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Column as Header
from rich.table import Table
from rich.text import Text

from moe_dist.bench.row import Failed, Refused, Row
from moe_dist.bench.tolerance import WHOLE_TOLERANCE
from moe_dist.bench.tune import Found, Tuned, config_text
from moe_dist.messages.counts import count_of, noun
from moe_dist.messages.printable import printable

ROOMY = Console(width=1000)  # in which tables are as wide as they want
COMPUTE = ("quantize", "gemm1", "activation", "gemm2", "layer")  # the last of a kernel that does all of it


def comparable(row: Row) -> tuple[Any, ...]:
    """Only rows equal in all of this stand side by side: same model, ranks, tokens, layout on both ends, skew."""
    shape = ("model", "quant", "hidden", "intermediate", "num_experts", "top_k", "activation", "shared_experts")
    keys = (*shape, "source", "layer", "world", "token_layout", "token_split", "global_tokens", "skew", "seed")
    return tuple(getattr(row, key) for key in keys)


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    ordered = sorted(rows, key=lambda row: [str(part).zfill(12) for part in comparable(row)])
    return [sorted(group, key=speed) for _, group in groupby(ordered, key=comparable)]


def speed(row: Row) -> float:
    """Microseconds; a row without times comes last."""
    return row.p50_us if row.p50_us is not None else float("inf")


def tables(rows: Iterable[Row], width: int | None = None) -> list[Table | Group]:
    """One for each group that may be compared, with the columns that fit into `width` characters, the most important
    first (None: all). No cell is ever cut."""
    return [_table(group, width) for group in groups(rows)]


@dataclass(frozen=True)
class Column:
    """`rank`: the lower, the longer it stays where there is little room; 0 stays always. `folds`: its cells may take
    several lines where there is no room even so."""

    name: str
    rank: int
    cell: Callable[[Row], str | Text]
    right: bool = True
    folds: bool = False


def _table(rows: list[Row], width: int | None) -> Table | Group:
    return fitting(rows, _columns(rows), width, title_of(rows[0]))


def fitting(rows: list[Row], columns: list[Column], width: int | None, title: str = "") -> Table | Group:
    """A line for each row, with as many of the columns as have room, under a title that is as wide as the page."""
    for most in sorted({column.rank for column in columns}, reverse=True):
        table = _laid_out(rows, [column for column in columns if column.rank <= most])
        if width is None or ROOMY.measure(table).maximum <= width:
            break
    return Group(Text(title, "bold"), table) if title else table


def _laid_out(rows: list[Row], columns: list[Column]) -> Table:
    table = plain_table()
    for column in columns:
        justify: Literal["right", "left"] = "right" if column.right else "left"
        table.add_column(column.name, justify=justify, no_wrap=not column.folds, overflow="fold")
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    return table


def plain_table(title: str | None = None, columns: Iterable[str] = ()) -> Table:
    """Without frames: as readable in a file, and narrow. Words that are too long are folded, not cut."""
    headers = (Header(column, overflow="fold") for column in columns)
    return Table(
        *headers, title=title, title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD,
        show_edge=False, pad_edge=False,
    )  # fmt: skip


def title_of(first: Row) -> str:
    title = (
        f"{first.model} {first.quant} (hidden {first.hidden}, intermediate {first.intermediate}, "
        f"{count_of(first.num_experts, 'expert')}, top-{first.top_k}) · {count_of(first.world, 'rank')} · "
        f"{first.global_tokens} {first.token_layout} {noun(first.global_tokens, 'token')} · routing {first.skew}"
    )
    if first.token_split != "even":
        title += f" · split {first.token_split}"
    if first.shared_experts != "none":
        title += f" · shared expert {first.shared_experts}"
    if first.source.startswith("checkpoint:"):
        title += f" · {first.source}"
    if stacked := stack_of(first):
        title += f" ·{stacked}"
    return printable(title)


def _columns(rows: list[Row]) -> list[Column]:
    """All that there are for these rows."""
    converts = any(row.stages_us.get("convert") for row in rows)
    floors = any(row.floor_us is not None for row in rows)
    stacked = bool(stack_of(rows[0]))

    def stage(*names: str) -> Callable[[Row], str]:
        return lambda row: number(sum(row.stages_us.get(name, 0.0) for name in names) if row.stages_us else None)

    wanted: list[Column | None] = [
        Column("placement", 0, lambda row: row.placement, right=False),
        Column("exchange", 0, lambda row: printable(row.exchange), right=False),
        Column("backend", 0, lambda row: printable(row.backend), right=False),
        Column("mode", 0, lambda row: "graph" if row.graph else "eager", right=False),
        Column("payload", 6, lambda row: row.payload_dtype, right=False),
        Column("p50 µs", 0, lambda row: number(row.p50_us)),
        Column("µs/layer", 1, lambda row: number(row.per_layer_us)) if stacked else None,
        Column("±", 2, _scatter),
        Column("chained", 3, lambda row: number(row.chained_us)),
        Column("p99 µs", 9, lambda row: number(row.p99_us)),
        Column("dispatch", 5, stage("dispatch")),
        Column("convert", 5, lambda row: number(row.stages_us.get("convert") or None)) if converts else None,
        Column("compute", 5, stage(*COMPUTE)),
        Column("combine", 5, stage("combine")),
        Column("unstaged", 9, lambda row: number(row.unstaged_us)),
        Column("floor", 8, lambda row: number(row.floor_us)) if floors else None,
        Column("balanced", 9, lambda row: number(row.balanced_floor_us)) if floors else None,
        Column("×floor", 1, times_floor) if floors else None,
        Column("rows max/mean", 7, lambda row: f"{row.imbalance:.2f}"),
        Column("sent/rank", 7, lambda row: size(row.bytes_sent)),
        Column("err oracle", 4, lambda row: _error(row, "err_oracle")),
        Column("err exact", 9, lambda row: _error(row, "err_exact")),
        Column("ok", 0, _verdict, right=False),
    ]
    return [column for column in wanted if column is not None]


def times_floor(row: Row) -> str:
    return f"{row.p50_us / row.floor_us:.2f}" if row.floor_us and row.p50_us else "-"


def stack_of(row: Row) -> str:
    """What rows of stacks are said to be; nothing of a single layer."""
    layers = row.layer.removeprefix("stack:")
    return "" if layers == row.layer else f" stack of {layers} layers"


def _verdict(row: Row) -> Text:
    if "err_whole" in row.not_finite:  # on either side or on both, which says nothing of the weights
        return Text("NO, infinite or NaN", "bold red")
    if row.ok is False and row.err_whole is not None and row.err_whole > WHOLE_TOLERANCE:
        return Text("NO, other weights than its source's", "bold red")
    return {True: Text("yes", "green"), False: Text("NO", "bold red"), None: Text("unchecked")}[row.ok]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _scatter(row: Row) -> str:
    return "-" if row.scatter_us is None or not row.p50_us else f"{row.scatter_us / row.p50_us:.1%}"


def _error(row: Row, name: str) -> str:
    error: float | None = getattr(row, name)
    return f"{error:.1e}" if error is not None else "inf or NaN" if name in row.not_finite else "-"


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def refused_table(refused: list[Refused]) -> Table:
    return _reasons("Not run, and why", [(item.reason, item.case) for item in refused])


def failed_table(failed: list[Failed]) -> Table:
    ranks = ("" if item.rank is None else f"rank {item.rank}: " for item in failed)
    return _reasons(
        "Failed, and why", [(rank + item.reason, item.case) for rank, item in zip(ranks, failed, strict=True)]
    )


def _reasons(title: str, found: list[tuple[str, str]]) -> Table:
    table = plain_table(title)
    table.add_column("cases", justify="right")
    table.add_column("the first of them")
    table.add_column("reason")
    by_reason: dict[str, list[str]] = {}
    for reason, case in found:
        by_reason.setdefault(reason, []).append(case)
    for reason, cases in by_reason.items():
        table.add_row(str(len(cases)), printable(cases[0]), printable(reason))
    return table


def tuned_table(tuned: Tuned) -> Table:
    shape = tuned.part.shape
    title = (
        f"{tuned.part.problem.spec.name} {shape.quant} {shape.activation} (hidden {shape.hidden}, slice {shape.width}, "
        f"{count_of(shape.experts, 'expert')}, top-{shape.top_k}) · {shape.backend} on {shape.device}"
    )
    table = plain_table(printable(title))
    table.add_column("rows", justify="right")
    table.add_column("config")
    for name in ("µs", "default µs", "×floor", "err oracle", "tried", "raised", "wrong"):
        table.add_column(name, justify="right")
    for found in tuned.found:
        table.add_row(*_tuned_cells(found))
    return table


def _tuned_cells(found: Found) -> list[str]:
    counts = [str(number) for number in (found.tried, found.raised, found.wrong)]
    entry = found.entry
    if entry is None:
        return [str(found.rows), f"none: {printable(found.reason)}", "-", "-", "-", "-", *counts]
    floor = f"{entry.us / entry.floor_us:.2f}" if entry.floor_us else "-"
    times = [f"{entry.us:,.1f}", f"{entry.default_us:,.1f}", floor]
    return [str(found.rows), config_text(entry.config), *times, f"{entry.err_oracle:.1e}", *counts]
