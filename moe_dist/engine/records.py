"""What was measured before: the rows of results files that `auto` chooses by, the user's own and the shipped ones."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_dist.engine.ties import explained_us
from moe_dist.errors import ConfigError
from moe_dist.files import read_small_text
from moe_dist.messages.counts import count_of
from moe_dist.model.refused import as_config_error
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.tables import cache_folder

LARGEST = 64 << 20  # bytes of a results file
SHIPPED = Path(__file__).parent.parent / "records_shipped"
SKEWS = ("uniform", "balanced")  # of rows that say what is fastest where nothing else is known


class Setting(NamedTuple):
    """What rows must have in common to be chosen from. `device`: the GPU's name as torch gives it."""

    device: str
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    activation: str
    quant: str
    tp: int
    ep: int
    token_layout: str
    graph: bool
    shared_experts: str = "none"

    @classmethod
    def nearest(
        cls, device: str, spec: MoESpec, parallel: ParallelSpec, token_layout: str, graph: bool
    ) -> list[Setting]:
        """Those whose rows may answer for such a layer, each where there are none of those before it: its own, without
        shared experts, and both in the other mode."""
        sizes = spec.hidden, spec.intermediate, spec.num_experts, spec.top_k
        of = device, *sizes, spec.activation, spec.quant_label, parallel.tp, parallel.ep, token_layout
        shared = dict.fromkeys((spec.shared_experts, "none"))
        return [cls(*of, captured, experts) for captured in (graph, not graph) for experts in shared]

    def unlike(self, spec: MoESpec, graph: bool) -> str:
        """In what it differs from what was asked for, as the end of a sentence."""
        modes = "" if self.graph == graph else "in a graph" if self.graph else "eager"
        shared = "" if self.shared_experts == spec.shared_experts else "without shared experts"
        found = ", ".join(filter(None, (modes, shared)))
        return f", whose rows are {found}" if found else ""


class Timed(NamedTuple):
    """One row: its exchange, backend and payload, and its median and standard error in microseconds."""

    tokens_per_rank: int
    exchange: str
    backend: str
    payload: str
    p50_us: float
    scatter_us: float


class Record(NamedTuple):
    """The rows of one file. `source`: whose it is, `user` or `shipped`."""

    source: str
    name: str
    date: str
    rows: dict[Setting, tuple[Timed, ...]]


class _Row(BaseModel):
    """The keys of a results file's row that are needed here; it has more."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    activation: str
    quant: str
    tp: int
    ep: int
    placement: str
    token_layout: str
    graph: bool
    shared_experts: str = "none"
    layer: str
    skew: str
    token_split: str = "even"
    tokens_per_rank: int = Field(ge=0)
    exchange: str
    backend: str
    payload_dtype: str
    p50_us: float | None
    scatter_us: float | None = None
    ok: bool | None
    peer: str | None = None

    def usable(self, skews: Sequence[str]) -> bool:
        plain = self.layer == "whole" and self.skew in skews and self.token_split == "even" and self.peer is None
        plain &= not {"+", "@"} & set(self.placement)  # no copies of experts, no map of them
        return plain and bool(self.ok) and bool(self.p50_us)

    def timed(self) -> Timed:
        """Of a usable one."""
        names = self.exchange, self.backend, self.payload_dtype
        return Timed(self.tokens_per_rank, *names, self.p50_us or 0.0, self.scatter_us or 0.0)


KEYS = tuple(_Row.model_fields)


def read_record(path: Path, source: str, skews: Sequence[str] = SKEWS) -> Record:
    """Rows of these `skews`, by their whole names. Raises ConfigError that names the file, and the row, where it is no
    results file of moe_dist."""
    legal = "a results file of moe-dist, as --out writes it"
    try:
        document = json.loads(read_small_text(path, LARGEST))
        rows, device, date = document["rows"], document["machine"]["gpu"], str(document["date"])
    except OSError as error:
        raise ConfigError("record", str(path), f"can't be read: {error.strerror}", legal) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError("record", str(path), f"is no JSON: {error}", legal) from None
    except (TypeError, KeyError):
        raise ConfigError("record", str(path), "holds no date, machine and rows of results", legal) from None
    if not isinstance(rows, list):
        raise ConfigError("record", str(path), f"holds {type(rows).__name__} where rows belong", legal)
    found: dict[Setting, list[Timed]] = {}
    for number, given in enumerate(rows):
        try:
            row = _Row.model_validate(given)
        except ValidationError as error:
            raise as_config_error(error, _Row, f"{path}: rows.{number}") from None
        if row.usable(skews) and device:
            setting = Setting(str(device), *(getattr(row, name) for name in Setting._fields[1:]))
            found.setdefault(setting, []).append(row.timed())
    return Record(source, path.name, date, {setting: tuple(timed) for setting, timed in found.items()})


def user_folder() -> Path:
    """Where this user's own records lie."""
    return cache_folder() / "records"


def records() -> Iterator[Record]:
    """The user's own, the latest first, then the shipped ones, the latest first. Raises ConfigError for a file that is
    broken: what it would have said is not known."""
    for source, folder in (("user", user_folder()), ("shipped", SHIPPED)):
        paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
        found = [_read(path, source, path.stat().st_mtime_ns) for path in paths]
        yield from sorted(found, key=lambda record: (record.date, record.name), reverse=True)


@lru_cache(maxsize=64)
def _read(path: Path, source: str, _changed_ns: int) -> Record:
    return read_record(path, source)


class Pick(NamedTuple):
    """What is fastest for steps of up to `up_to` tokens a rank (None: of any size) and why."""

    exchange: str
    backend: str
    up_to: int | None
    why: str


def pick(record: Record, timed: Sequence[Timed]) -> list[Pick]:
    """The fastest pair of names by size of step, from one record's rows of one setting. A size is served by the row
    that is nearest by ratio, and has its own entry. The next size keeps a pair that is tied with its own fastest."""
    found: list[Pick] = []
    sizes = [(size, list(rows)) for size, rows in groupby(sorted(timed), key=lambda row: row.tokens_per_rank)]
    for number, (size, rows) in enumerate(sizes):
        ordered = sorted(rows, key=lambda row: row.p50_us)
        best = taken = ordered[0]
        if found:
            before = found[-1].exchange, found[-1].backend
            same = next((row for row in ordered if (row.exchange, row.backend) == before), None)
            if same is not None and tied(same, best):
                taken = same
        up_to = int(sqrt(size * sizes[number + 1][0])) if number + 1 < len(sizes) else None
        found.append(Pick(taken.exchange, taken.backend, up_to, _why(record, size, taken, ordered)))
    return found


def tied(one: Timed, other: Timed) -> bool:
    """Whether scatter explains the difference. A choice has to be made in any case, so of a row without rounds only
    what another start of the ranks explains is a tie."""
    times = one.p50_us, other.p50_us
    return abs(times[1] - times[0]) <= explained_us(times, (one.scatter_us, other.scatter_us))


def _why(record: Record, size: int, taken: Timed, ordered: list[Timed]) -> str:
    """In a sentence's part: the time, over what and by how much, and which file says so."""
    rest = [row for row in ordered if (row.exchange, row.backend) != (taken.exchange, taken.backend)]
    over = ""
    if rest:
        gain = rest[0].p50_us / taken.p50_us - 1
        over = f", {rest[0].exchange} with {rest[0].backend} {abs(gain):.0%} {'more' if gain >= 0 else 'less'}"
        over += " (a tie)" if tied(taken, rest[0]) else ""
    where = f"at {count_of(size, 'token')} a rank, even routing"
    return f"{taken.p50_us:,.0f} µs {where}{over}; {record.source} record {record.name}"


def merged(found: list[Pick]) -> list[Pick]:
    """Neighbours that are the same pair as one, which has the first one's reason."""
    kept: list[Pick] = []
    for each in found:
        if kept and (kept[-1].exchange, kept[-1].backend) == (each.exchange, each.backend):
            kept[-1] = kept[-1]._replace(up_to=each.up_to)
        else:
            kept.append(each)
    return kept


def remember(document: dict[str, Any]) -> Record:
    """Keep a results document under the user's records; what it says. Raises OSError where it can't be written."""
    folder = user_folder()
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]+", "", f"{document['date']}-{document['machine']['gpu']}")
    target, partial = folder / f"{name}.json", folder / f"{name}.{os.getpid()}.partial"
    partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    partial.replace(target)
    return read_record(target, "user")
