"""The table of all rows, and the same rows as data of the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from moe_dist.bench.diff import UNKNOWN
from moe_dist.bench.row import Row
from moe_dist.bench.table import number, size, times_floor
from moe_dist.report.findings import Setup
from moe_dist.report.recorded import Recorded, known
from moe_dist.report.tables import NOTHING, Table, text_of
from moe_dist.report.words import checked, standing

BEST = "best_of_placement"


@dataclass(frozen=True)
class Column:
    """`key`: of docs/results.md, or of what the report knows beside it."""

    key: str
    label: str
    cell: Callable[[Row], str]
    numeric: bool = False


@dataclass(frozen=True)
class AllRows:
    """`columns`: those whose cells differ between rows; `fixed`: label and cell of the others. `beside`: what is known
    of each row beside its own keys."""

    rows: list[Row]
    columns: list[Column]
    fixed: list[tuple[str, str]]
    beside: dict[str, list[str | None]]


def _plain(key: str, label: str) -> Column:
    return Column(key, label, lambda row: text_of(row, key))


def _number(key: str, label: str, shown: Callable[[Any], str]) -> Column:
    def cell(row: Row) -> str:
        value = getattr(row, key)
        return shown(value) if value is not None else NOTHING if known(row, key) else UNKNOWN

    return Column(key, label, cell, numeric=True)


def _whole(value: int) -> str:
    return f"{value:,}"


def _times_floor(row: Row) -> str:
    return times_floor(row) if known(row, "floor_us") else UNKNOWN


FRONT = (
    _plain("model", "model"),
    _number("world", "ranks", _whole),
    _plain("placement", "placement"),
    _plain("exchange", "exchange"),
    _plain("backend", "backend"),
    Column("graph", "mode", lambda row: "graph" if row.graph else "eager"),
    _plain("skew", "routing"),
    _number("global_tokens", "tokens", _whole),
    _number("p50_us", "p50 µs", number),
    _number("scatter_us", "± µs", number),
    Column("times_floor", "× floor", _times_floor, numeric=True),
    Column("ok", "ok", checked),
)
BACK = (
    _number("tokens_per_rank", "a rank", _whole),
    _number("p99_us", "p99 µs", number),
    _number("floor_us", "floor µs", number),
    _number("tflops", "TFLOP/s", number),
    _number("hbm_gbps", "weights GB/s", number),
    _number("link_gbps", "sent GB/s", number),
    _number("bytes_sent", "sent", size),
    _number("imbalance", "rows max/mean", lambda value: f"{value:.2f}"),
    _number("err_oracle", "err oracle", lambda value: f"{value:.1e}"),
    _plain("quant", "format"),
    _plain("layer", "layer"),
    _plain("token_layout", "layout"),
    _number("seed", "seed", str),
    _plain("payload_dtype", "payload"),
)


def all_rows(files: Iterable[Recorded], found: Iterable[Setup]) -> AllRows:
    """In the order of the files. `found`: their setups."""
    said = standing(found)
    names = {id(row): file.name for file in files for row in file.rows}
    rows = [row for file in files for row in file.rows]
    best = Column(BEST, "best of its placement", lambda row: said.get(id(row), ""))
    file = Column("file", "file", lambda row: names[id(row)])
    columns, fixed = [], []
    for column in (*FRONT, best, *BACK, file):
        cells = {column.cell(row) for row in rows}
        if len(cells) > 1 or len(rows) == 1:
            columns.append(column)
        elif (cell := cells.pop()) != "":
            fixed.append((column.label, cell))
    beside: dict[str, list[str | None]] = {
        "file": [names[id(row)] for row in rows],
        BEST: [said.get(id(row)) for row in rows],
    }
    return AllRows(rows, columns, fixed, beside)


def as_table(found: AllRows) -> Table:
    lines = [[column.cell(row) for column in found.columns] for row in found.rows]
    note = ", ".join(f"{label} {cell}" for label, cell in found.fixed)
    return Table("All rows", [column.label for column in found.columns], lines, f"In all rows: {note}." if note else "")


def embedded(found: AllRows) -> Markup:
    """The rows as JSON, by key of docs/results.md, and what is known beside them. A key with few different values has
    them once (`of`), and each row's place in them (`at`). In a script element only `<` could end it; what is no ASCII
    is escaped, U+2028 too."""
    times = [row.p50_us / row.floor_us if row.p50_us and row.floor_us else None for row in found.rows]
    values: dict[str, Sequence[Any]] = {**found.beside, "times_floor": [_rounded(each) for each in times]}
    for key in Row.model_fields:
        values[key] = [_rounded(getattr(row, key)) if known(row, key) else UNKNOWN for row in found.rows]
    columns = ["number", *(column.key for column in found.columns)]
    document = {"columns": columns, "values": {key: _packed(column) for key, column in values.items()}}
    text = json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _rounded(value: Any) -> Any:
    """Floats to six digits, which is more than a clock has; a whole number that JavaScript has not, as text."""
    if isinstance(value, int) and abs(value) > 1 << 53:
        return str(value)
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return {key: _rounded(item) for key, item in value.items()} if isinstance(value, dict) else value


def _packed(column: Sequence[Any]) -> Any:
    names = [repr(value) for value in column]  # in which true is not 1
    different = dict(zip(names, column, strict=True))
    if 4 * len(different) > len(column):
        return column
    places = {name: place for place, name in enumerate(different)}
    return {"of": list(different.values()), "at": [places[name] for name in names]}
