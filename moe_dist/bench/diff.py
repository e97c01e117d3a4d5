"""Two results files, row by row: what became slower or faster by more than scatter explains."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from moe_dist.bench.lines import read_document
from moe_dist.bench.table import number, plain_table
from moe_dist.engine.ties import explained_us
from moe_dist.errors import ConfigError, NoRowsError
from moe_dist.files import read_small_text
from moe_dist.messages.counts import count_of
from moe_dist.messages.printable import printable

LARGEST_FILE = 256 << 20  # bytes
LEAST_US, MOST_US = 1e-6, 10**15  # of a time: beyond, it was not measured
# What names a row. A key that an older file does not have is left out of the comparison, for all rows.
KEYS = (
    "model", "quant", "hidden", "intermediate", "num_experts", "top_k", "activation", "shared_experts", "source",
    "layer", "world", "placement", "exchange", "backend", "graph", "token_layout", "token_split", "global_tokens",
    "skew", "seed", "payload_dtype", "combine_dtype",
)  # fmt: skip
UNKNOWN = "not recorded"
OLDER = {"token_split": "even"}  # what rows are that were written before there was a choice


@dataclass(frozen=True)
class Change:
    """One row of both files. `explained_us`: what scatter explains of the difference; None where a row has none, as
    with fewer than three rounds. `alike`: the ranks computed the same numbers of pairs, as far as the files say.
    `wrong`: of old and new those whose row is out of tolerance: its time is that of something else."""

    label: str
    old_us: float
    new_us: float
    explained_us: float | None
    alike: bool
    wrong: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """`slower`, `faster`, `same` where scatter explains the difference, `unknown` without scatter, `other routing`
        where one name stands for another draw of the routing, and `wrong numbers` where a row failed its check."""
        if self.wrong:
            return "wrong numbers"
        if not self.alike:
            return "other routing"
        if self.explained_us is None:
            return "unknown"
        if abs(self.new_us - self.old_us) <= self.explained_us:
            return "same"
        return "slower" if self.new_us > self.old_us else "faster"


@dataclass(frozen=True)
class Missing:
    """A row with a time of the old file that the new one has no time of. `listed`: what the new file says of it: it
    failed, it was refused, its numbers were checked without a time; None where it is not mentioned at all."""

    label: str
    listed: Literal["failed", "refused", "not timed"] | None
    reason: str | None = None


@dataclass(frozen=True)
class Side:
    """Where one of the two files comes from, as it says itself; `machine` such as `2 x NVIDIA H200`."""

    file: str
    date: str
    commit: str
    machine: str

    @classmethod
    def of(cls, path: str, document: dict[str, Any]) -> Side:
        date, commit = (printable(str(document.get(key) or UNKNOWN)) for key in ("date", "commit"))
        return cls(path, date, commit, _machine(document))

    def line(self) -> str:
        return f"{printable(self.file)}, {self.date}, commit {self.commit}, {self.machine}"


@dataclass(frozen=True)
class Diff:
    """`missing`: rows with a time that only the old file has, `added`: how many only the new one has. `machines`: what
    they were measured on, where it is not one machine's kind: then a difference says little about moe_dist."""

    changes: list[Change]
    missing: list[Missing]
    added: int
    machines: tuple[str, ...]

    @property
    def slower(self) -> int:
        return sum(change.verdict == "slower" for change in self.changes)

    @property
    def wrong(self) -> int:
        """Rows of the new file that are out of tolerance."""
        return sum("new" in change.wrong for change in self.changes)


def read_results(path: str) -> dict[str, Any]:
    """The document of a results file of any version, or of `--lines`. Raises NoRowsError for a file without
    rows, ConfigError for any other."""
    try:
        document: Any = read_document(read_small_text(Path(path), LARGEST_FILE))
    except OSError as error:
        raise ConfigError("file", path, f"can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError("file", path, f"is no JSON: {error}", "what --out or --json gave") from None
    found: dict[str, Any] = document if isinstance(document, dict) else {}
    rows = found.get("rows")
    if rows is None:
        raise NoRowsError("file", path, "holds no rows of results", "what --out or --json gave")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path}: rows", rows, "is no list of rows", "what --out or --json gave")
    for place, row in enumerate(rows):
        _check_times(f"{path}: rows.{place}", row)
    if not isinstance(found.get("machine", {}), dict):
        raise ConfigError(f"{path}: machine", found["machine"], "is no section", "what --out or --json gave")
    return found


def _check_times(place: str, row: dict[str, Any]) -> None:
    """Of files that somebody has edited. Other keys may hold anything: they are shown and compared as they are."""
    for key, least in (("p50_us", LEAST_US), ("scatter_us", 0)):
        value = row.get(key)
        counts = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (counts and least <= value <= MOST_US):
            raise ConfigError(f"{place}.{key}", value, "is no time in microseconds", f"{least} to {MOST_US:,}")


def compare_results(old: dict[str, Any], new: dict[str, Any]) -> Diff:
    """Rows of the same configuration. Raises ConfigError where a file has two rows of one, or both share none and the
    new one does not say why."""
    both = [_timed(document) for document in (old, new)]
    keys = [key for key in KEYS if all(key in row for rows in both for row in rows)]
    before, after = ({_key(row, keys): row for row in rows} for rows in both)
    for rows, found in zip(both, (before, after), strict=True):
        if len(found) < len(rows):
            raise ConfigError("rows", len(rows), "a file has several rows of one configuration", len(found))
    shared = [key for key in before if key in after]
    gone = [key for key in before if key not in after]
    said = {key: _listed(before[key], key, keys, new) for key in gone}
    if not shared and not any(listed in ("failed", "refused") for listed, _ in said.values()):
        raise ConfigError("rows", 0, "no configuration has times in both files", "one at least")
    names, all_names = _names(shared, keys), _names(before, keys)
    changes = [_change(before[key], after[key], names) for key in shared]
    missing = [Missing(_label(before[key], all_names), *said[key]) for key in gone]
    machines = dict.fromkeys(map(_machine, (old, new)))
    return Diff(changes, missing, len(after) - len(shared), tuple(machines) if len(machines) > 1 else ())


def _names(shown: Iterable[tuple[str, ...]], keys: list[str]) -> list[str]:
    """Which of the keys name these rows: those in which they differ."""
    columns = zip(*shown, strict=True)
    varying = [name for name, values in zip(keys, columns, strict=False) if len(set(values)) > 1]
    return varying or [name for name in ("placement", "exchange", "backend") if name in keys]


def _listed(
    row: dict[str, Any], key: tuple[str, ...], keys: list[str], document: dict[str, Any]
) -> tuple[Literal["failed", "refused", "not timed"] | None, str | None]:
    """What a document without a time of this row says of it."""
    case = _case(row)
    lists: tuple[Literal["failed", "refused"], ...] = ("failed", "refused")
    for kind in lists:
        entries = document.get(kind)
        for entry in entries if isinstance(entries, list) else ():
            if not isinstance(entry, dict):
                continue
            same = entry.get("key") is not None and entry["key"] == row.get("key")
            if same or case.fullmatch(str(entry.get("case"))):
                return kind, printable(str(entry.get("reason") or "for no reason that it names"))
    for other in document["rows"]:
        known = OLDER | other
        if all(name in known for name in keys) and _key(known, keys) == key:
            return "not timed", None
    return None, None


def _case(row: dict[str, Any]) -> re.Pattern[str]:
    """The texts of `Case.label` that a case of this row may have: it may have left exchange and backend to `auto`, and
    names a recorded routing by its file."""

    def text(name: str, *others: str) -> str:
        return "|".join(map(re.escape, (str(row.get(name)), *others)))

    split = "" if row.get("token_split") == "even" else f" {text('token_split')}"
    layers = str(row.get("layer")).removeprefix("stack:")
    skew = "file:.*" if str(row.get("skew")).startswith("file:") else text("skew")
    parts = (
        f"{text('model')} {text('placement')} ({text('exchange', 'auto')}) ({text('backend', 'auto')})",
        f"{text('global_tokens')} {text('token_layout')} tokens?{split}",
        f"{skew} {'graph' if row.get('graph') else 'eager'}",
    )
    return re.compile(" ".join(parts) + (f" × {layers} layers" if layers.isdecimal() else ""))


def _timed(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [OLDER | row for row in document["rows"] if isinstance(row.get("p50_us"), (int, float))]


def _key(row: dict[str, Any], keys: list[str]) -> tuple[str, ...]:
    return tuple(json.dumps(row[key]) for key in keys)


def _change(old: dict[str, Any], new: dict[str, Any], names: list[str]) -> Change:
    times = float(old["p50_us"]), float(new["p50_us"])
    scatters = [float(us) for row in (old, new) if (us := row.get("scatter_us")) is not None]
    explained = explained_us(times, (scatters[0], scatters[1])) if len(scatters) == 2 else None
    pairs = [row.get("rows_per_rank") for row in (old, new)]
    alike = None in pairs or pairs[0] == pairs[1]
    wrong = tuple(name for name, row in (("old", old), ("new", new)) if row.get("ok") is False)
    return Change(_label(old, names), *times, explained, alike, wrong)


def _label(row: dict[str, Any], names: list[str]) -> str:
    return " ".join(_shown(name, row[name]) for name in names)


def _shown(name: str, value: Any) -> str:
    if name == "graph":
        return "graph" if value else "eager"
    return count_of(value, "token") if name == "global_tokens" and isinstance(value, int) else printable(str(value))


def _machine(document: dict[str, Any]) -> str:
    machine = document.get("machine") or {}
    return printable(f"{machine.get('count', '?')} x {machine.get('gpu') or machine.get('cpu') or UNKNOWN}")


def diff_table(diff: Diff, everything: bool = False) -> Table:
    """The largest changes first; without `everything` those that scatter does not explain."""
    shown = [change for change in diff.changes if everything or change.verdict != "same"]
    table = plain_table()
    table.add_column("row")
    for name in ("old µs", "new µs", "new/old"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for change in sorted(shown, key=lambda each: each.old_us / each.new_us):
        style = {"slower": "bold red", "wrong numbers": "bold red", "faster": "green"}.get(change.verdict, "")
        ratio = f"{change.new_us / change.old_us:.3f}"
        table.add_row(change.label, number(change.old_us), number(change.new_us), ratio, Text(change.verdict, style))
    return table


def missing_table(diff: Diff) -> Table:
    """The rows that the new file has no time of, and what it says of them."""
    table = plain_table()
    table.add_column("only in old")
    table.add_column("in new", no_wrap=True)
    table.add_column("reason")
    for row in sorted(diff.missing, key=lambda each: each.listed or "~"):
        table.add_row(row.label, Text(row.listed or "not there", "bold red"), row.reason or "")
    return table
