"""Tuning tables: the fastest configs of a backend for one shape, found once on a GPU and looked up ever since."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from math import log2
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import ConfigDict, Field

from moe_dist.errors import ConfigError
from moe_dist.files import read_small_text, unique_keys
from moe_dist.messages.notices import notice
from moe_dist.model.spec import MOST_TOKENS, MoESpec, Section

LARGEST = 4 << 20  # bytes of a table: some hundred times the shipped ones
MOST_ERROR = 0.05  # of a config that is used: beyond any backend's tolerance
SHIPPED = Path(__file__).parent / "tables_shipped"
Size = Annotated[int, Field(strict=True, ge=0)]
Micros = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Rows = Annotated[int, Field(ge=1, le=MOST_TOKENS)]  # not strict: JSON's keys are text


@dataclass(frozen=True)
class Shape:
    """What a table is for. `device` is the GPU's name as torch gives it, `quant` the spec's quant_label, `width` this
    rank's slice of the intermediate size, `experts` the number of those on this rank, `of_experts` of all."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # for the one in a file

    backend: str
    device: str
    quant: str
    activation: str
    hidden: Size
    width: Size
    experts: Size
    of_experts: Size
    top_k: Size

    @classmethod
    def of(cls, backend: str, device: str, spec: MoESpec, width: int, experts: int) -> Shape:
        sizes = (spec.hidden, width, experts, spec.num_experts, spec.top_k)
        return cls(backend, device, spec.quant_label, spec.activation, *sizes)

    @property
    def file_name(self) -> str:
        sizes = f"H{self.hidden}-I{self.width}-E{self.experts}of{self.of_experts}-K{self.top_k}"
        parts = (self.backend, self.device, self.quant, self.activation, sizes)
        return "--".join(re.sub(r"[^\w.-]+", "_", part) for part in parts) + ".json"


@dataclass(frozen=True)
class Entry:
    """The config found for one number of rows, its time, the least possible one where the device's peaks are known,
    that of the default config, and its relative L2 error against the oracle."""

    __pydantic_config__ = ConfigDict(extra="forbid", revalidate_instances="always")

    config: dict[str, Any]
    us: Micros
    floor_us: Micros | None
    default_us: Micros
    err_oracle: Annotated[float, Field(strict=True, ge=0, le=MOST_ERROR, allow_inf_nan=False)]


class TuningTable(Section):
    """`entries` by the rows entering the rank; `revision` is the backend's; the rest says where the numbers come
    from."""

    section: ClassVar[str] = "table"

    shape: Shape
    revision: Annotated[int, Field(strict=True)]
    date: str
    commit: str
    command: str
    machine: dict[str, Any]
    entries: dict[Rows, Entry] = Field(min_length=1)

    def nearest(self, rows: int) -> int:
        """The entry that serves so many rows: the nearest by ratio, the smaller of two as near."""
        wanted = log2(max(rows, 1))
        return min(self.entries, key=lambda bucket: (abs(log2(bucket) - wanted), bucket))

    def document(self) -> dict[str, Any]:
        """As a file holds it, entries in the order of their rows."""
        return self.model_dump(mode="json") | {
            "entries": {str(bucket): asdict(entry) for bucket, entry in sorted(self.entries.items())}
        }

    def write(self, folder: Path) -> Path:
        """Write the file whole or not at all, one line an entry: a changed number is a changed line."""
        document = self.document()
        entries = document.pop("entries")
        head = [f" {_line(name, value)},\n" for name, value in document.items()]
        lines = ",\n".join(f"  {_line(bucket, entry)}" for bucket, entry in entries.items())
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.shape.file_name
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text("{\n" + "".join(head) + ' "entries": {\n' + lines + "\n }\n}\n")
        partial.replace(path)
        find_table.cache_clear()
        return path


def _line(name: str, value: Any) -> str:
    return f"{json.dumps(name)}: {json.dumps(value, sort_keys=True, allow_nan=False)}"


def read_table(path: Path) -> TuningTable:
    """Raises ConfigError that names file and field for one that is broken."""
    try:
        document = json.loads(read_small_text(path, LARGEST), object_pairs_hook=unique_keys)
    except OSError as error:
        raise ConfigError("table", str(path), f"can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError("table", str(path), f"is no valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError("table", str(path), f"holds {type(document).__name__}", "a mapping of keys to values")
    entries = document.get("entries")
    for key in entries if isinstance(entries, dict) else ():
        if not re.fullmatch("[1-9][0-9]{0,7}", key) or int(key) > MOST_TOKENS:
            legal = f"1 to {MOST_TOKENS} without signs or zeros before"
            raise ConfigError(f"{path}: table.entries", key, "is no number of rows", legal)
    try:
        table = TuningTable(**document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.field}", error.value, error.rule, error.legal) from None
    if table.shape.file_name != path.name:
        raise ConfigError(f"{path}: table.shape", table.shape.file_name, "is another table's", path.name)
    return table


def cache_folder() -> Path:
    """What this user's machine keeps: MOE_DIST_CACHE, else $XDG_CACHE_HOME/moe_dist, else ~/.cache/moe_dist. Raises
    ConfigError where none of them is, and for a relative MOE_DIST_CACHE; a relative XDG_CACHE_HOME is passed over, as
    its specification has it."""
    if given := os.environ.get("MOE_DIST_CACHE"):
        with suppress(RuntimeError):  # ~ of a user that there is not
            if (folder := Path(given).expanduser()).is_absolute():  # only a shell at the right place expands a ~
                return folder
        rule = "would be another folder in each working directory, and ranks may have one of their own"
        raise ConfigError("MOE_DIST_CACHE", given, rule, "an absolute path, or one that begins with ~/")
    if (given := os.environ.get("XDG_CACHE_HOME", "")) and Path(given).is_absolute():
        return Path(given) / "moe_dist"
    try:
        return Path.home() / ".cache" / "moe_dist"
    except RuntimeError:
        rule = "is not set, and this user has no home directory to keep tables and builds in"
        raise ConfigError("MOE_DIST_CACHE", None, rule, "a folder that can be written to") from None


def user_folder() -> Path:
    """Where this user's own tables lie."""
    return cache_folder() / "tables"


def _files(shape: Shape) -> Iterator[tuple[str, Path]]:
    """The user's own table goes before the shipped one. What is no file has its name for some reason, too."""
    for source, folder in (("user", user_folder()), ("shipped", SHIPPED)):
        path = folder / shape.file_name
        if os.path.lexists(path):
            yield source, path


def _fitting(shape: Shape, revision: int) -> Iterator[tuple[str, TuningTable]]:
    for source, path in _files(shape):
        table = read_table(path)
        if table.revision == revision:
            yield source, table


@lru_cache(maxsize=256)
def find_table(shape: Shape, revision: int) -> TuningTable | None:
    """The table for this shape: the user's own, else the shipped one. One of another revision is passed over, the
    user's not in silence."""
    source, table = next(_fitting(shape, revision), (None, None))
    if source == "shipped" and (own := user_folder() / shape.file_name).exists():
        notice(f"the shipped tuning table is used; {own} is passed over: its configs are of another revision")
    return table


def table_source(shape: Shape, revision: int) -> str | None:
    """Whose table `find_table` takes: user or shipped; None if there is none."""
    return next((source for source, _ in _fitting(shape, revision)), None)


@cache
def say_missing_once(shape: Shape) -> None:
    """Tell the user that there is no table of the backend's revision, and how to make one; once a process."""
    old = ", ".join(str(path) for _, path in _files(shape))
    why = f"passed over, its configs are of another revision of {shape.backend}: {old}" if old else "not found"
    command = f"moe-dist tune --backend {shape.backend} --model MODEL --tp TP --ep EP"
    notice(f"tuning table {shape.file_name} {why}; defaults are used. To make it: {command}")


class Choice(NamedTuple):
    """A config and where it comes from: "tuned" for a table's entry of just so many rows, "nearest:M" for its entry of
    M rows, the nearest."""

    config: dict[str, Any]
    source: str


def tuned_config(shape: Shape, revision: int, rows: int) -> Choice | None:
    """The config found for this many rows; None, said once, where there is no table."""
    table = find_table(shape, revision)
    if table is None:
        say_missing_once(shape)
        return None
    bucket = table.nearest(rows)
    return Choice(table.entries[bucket].config, "tuned" if bucket == rows else f"nearest:{bucket}")
