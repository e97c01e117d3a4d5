"""Results files of any version, as a report reads them. They are input from outside: every value is checked, and text
that a page or a terminal might obey is escaped on the way in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic.fields import FieldInfo

from moe_dist.bench.diff import UNKNOWN, read_results
from moe_dist.bench.row import Hardware, Notice, Refused, Row
from moe_dist.errors import ConfigError, NoRowsError
from moe_dist.messages.printable import one_line
from moe_dist.model.refused import as_config_error

RESULTS = "what --out or --json of moe-dist gave"
# Without these a row can't be named or compared.
NEEDED = (
    "model", "quant", "tp", "ep", "world", "placement", "token_layout", "exchange", "backend", "graph", "layer",
    "global_tokens", "skew", "seed", "p50_us",
)  # fmt: skip
LARGEST, LEAST_US = 1e15, 1e-3  # no count, time or rate is larger; no time is shorter than a nanosecond


class AnyVersion(Row):
    """Base of `RecordedRow`: a key that today's version does not know is left out."""

    model_config = ConfigDict(extra="ignore")


def _optional(field: FieldInfo) -> FieldInfo:
    found = copy.copy(field)
    found.default = None
    return found


# A row of an older file lacks keys. They are None, whatever Row says of them; `known` tells them from a null.
RecordedRow: type[Row] = create_model(
    "RecordedRow",
    __base__=AnyVersion,
    **{name: (field.annotation, _optional(field)) for name, field in Row.model_fields.items() if name not in NEEDED},  # type: ignore[call-overload]
)
NULLABLE = {name for name, field in Row.model_fields.items() if type(None) in get_args(field.annotation)}


@dataclass(frozen=True)
class Recorded:
    """A results file. `lacks`: keys of a row that none of its rows has. `unread`: keys of its rows that today's version
    does not know. Of `machine`, a key that is not there was not recorded."""

    name: str
    date: str
    commit: str
    command: str
    note: str
    machine: dict[str, str]
    ranks: dict[str, list[str]]
    notices: list[Notice]
    refused: list[Refused]
    rows: list[Row]
    lacks: tuple[str, ...]
    unread: tuple[str, ...]

    @property
    def device(self) -> str:
        """Such as `4 × NVIDIA H200`."""
        return f"{self.machine.get('count', '?')} × {self.machine.get('gpu') or self.machine.get('cpu', UNKNOWN)}"


def known(row: Row, key: str) -> bool:
    """Whether the file has this key in this row, null or not."""
    return key in row.model_fields_set


def read_files(paths: Sequence[str], note: Callable[[str], None] | None = None) -> list[Recorded]:
    """The latest first. A file without rows is left out where another one has some, and `note` is told which; without
    `note` it is refused. Raises NoRowsError where none has any, and ConfigError for a file that is none of results, for
    a value that no row may have, and for a file that is named twice."""
    places = [Path(path).resolve() for path in paths]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise ConfigError("file", paths[number], "is named twice", "each file once")
    names = [Path(path).name for path in paths]
    shown = [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]
    found: list[Recorded] = []
    without: list[NoRowsError] = []
    for path, name in zip(paths, shown, strict=True):
        try:
            found.append(read_file(path, one_line(name)))
        except NoRowsError as error:
            if note is None:
                raise
            without.append(error)
    if without and not found:
        several = "file", [str(each.value) for each in without], "hold no rows of results", RESULTS
        raise without[0] if len(without) == 1 else NoRowsError(*several)
    if note is not None:
        for each in without:
            note(f"{one_line(str(each.value))} is left out: it {each.rule}")
    return sorted(found, key=lambda file: file.date, reverse=True)


def read_file(path: str, name: str) -> Recorded:
    try:
        document = _cleaned(read_results(path))
    except RecursionError:
        raise ConfigError("file", path, "is no JSON of results: it is nested too deeply", RESULTS) from None
    given: list[dict[str, Any]] = document["rows"]
    if not given:
        raise NoRowsError("file", path, "has no row: nothing was measured", "a file with one row at least")
    keys = {key for row in given for key in row}
    machine = document.get("machine")
    return Recorded(
        name=name,
        **{key: _text(document.get(key), UNKNOWN) for key in ("date", "commit", "command")},
        note=_text(document.get("note"), ""),
        machine=_machine(machine if isinstance(machine, dict) else {}),
        ranks=_list_of(dict[str, list[str]], path, document, "ranks", {}),
        notices=_list_of(list[Notice], path, document, "notices", []),
        refused=_list_of(list[Refused], path, document, "refused", []),
        rows=[_row(path, number, row) for number, row in enumerate(given)],
        lacks=tuple(key for key in Row.model_fields if key not in keys),
        unread=tuple(sorted(keys - set(Row.model_fields))),
    )


def _cleaned(value: Any) -> Any:
    """All text on one line, with control and format characters and lone surrogates as escapes."""
    if isinstance(value, dict):
        return {one_line(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    return one_line(value) if isinstance(value, str) else value


def _text(value: Any, otherwise: str) -> str:
    return value if isinstance(value, str) and value else otherwise


def _machine(given: dict[str, Any]) -> dict[str, str]:
    """What it says of itself; a null is an empty text."""
    values = {key: given[key] for key in Hardware.model_fields if key in given}
    return {key: "" if value is None else str(value) for key, value in values.items()}


def _list_of(kind: Any, path: str, document: dict[str, Any], key: str, otherwise: Any) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    try:
        return adapter.validate_python(document.get(key, otherwise))
    except ValidationError as error:
        raise as_config_error(error, adapter, f"{path}: {key}") from None


def _row(path: str, number: int, given: dict[str, Any]) -> Row:
    where = f"rows.{number}"
    for key in NEEDED:
        if key not in given:
            raise ConfigError(f"{path}: {where}.{key}", None, "is missing; without it no row is compared", RESULTS)
    # A null where a key can't be null says as much as no key.
    values = {key: value for key, value in given.items() if value is not None or key in NULLABLE or key in NEEDED}
    try:
        row = RecordedRow(**values)
    except ValidationError as error:
        raise as_config_error(error, RecordedRow, f"{path}: {where}") from None
    _check_sizes(path, where, row)
    return row


def _check_sizes(path: str, where: str, row: Row) -> None:
    """What would break an axis: a median of nothing, and numbers of hundreds of digits. A seed is no size."""
    for key in row.model_fields_set - {"seed"}:
        value = getattr(row, key)
        parts = value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else (value,)
        if any(isinstance(part, (int, float)) and abs(part) > LARGEST for part in parts):
            raise ConfigError(f"{path}: {where}.{key}", value, "is no size that was measured", f"up to {LARGEST:.0e}")
    for key in ("p50_us", "floor_us"):
        value = getattr(row, key)
        if value is not None and value < LEAST_US and not (key == "floor_us" and value == 0):
            rule = "is shorter than any step takes"
            raise ConfigError(f"{path}: {where}.{key}", value, rule, f"null, or {LEAST_US} µs and more")
