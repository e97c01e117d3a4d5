"""Small files from elsewhere (tuning tables, records, results, placements, peak rates, traces) with anything in them
are refused by an error of moe_dist's own, or read."""

from __future__ import annotations

import copy
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

import moe_dist
from moe_dist.balance.placement_file import placement_text, read_placement
from moe_dist.bench import peaks
from moe_dist.engine.records import read_record
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.report.recorded import read_file
from moe_dist.tables import read_table
from moe_dist.workloads.traces import read_trace

PACKAGE = Path(moe_dist.__file__).parent
SPEC = MoESpec(hidden=128, intermediate=128, num_experts=8, top_k=2)


def shipped(folder: str) -> Path:
    return min((PACKAGE / folder).glob("*.json"), key=lambda path: path.stat().st_size)


def first_rows(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text())
    return document | {"rows": document["rows"][:2]}


def read_peaks(path: Path) -> object:
    return peaks._read(path, path.stat().st_mtime_ns)


READERS: dict[str, Callable[[Path], object]] = {
    "table": read_table,
    "record": lambda path: read_record(path, "user"),
    "results": lambda path: read_file(str(path), "x"),
    "placement": lambda path: read_placement(str(path)),
    "peaks": read_peaks,
}


@cache
def good(kind: str) -> tuple[str, Any]:
    """A file's name and its document."""
    if kind == "table":
        path = shipped("tables_shipped")
        return path.name, json.loads(path.read_text())
    if kind == "record":
        return "record.json", first_rows(shipped("records_shipped"))
    if kind == "results":
        return "results.json", first_rows(PACKAGE.parent / "benchmarks" / "2026-11-22-h200x4.json")
    if kind == "placement":
        return "map.json", json.loads(placement_text(ParallelSpec(ep=2, expert_map=(0, 1, 1, 0))))
    return "peaks.json", {"NVIDIA H200": {"fp8_flops": 1e15, "bf16_flops": 5e14, "bandwidth": 4e12}}


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from([0, -1, 10**30, 10**400, 1e308, "", "\x1b[31m", "\ud800", [], {}, [[]], {"": None}]),
)  # fmt: skip
JUNK = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(st.text(max_size=4), LEAVES, max_size=3)


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """Up to three values replaced, keys taken out or put in, anywhere in it."""
    document = {"": copy.deepcopy(document)}
    for _ in range(draw(st.integers(1, 3))):
        place: Any = document
        key: Any = ""
        while isinstance(place[key], (dict, list)) and place[key] and draw(st.integers(0, 3)):
            place = place[key]
            key = draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
        how = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if how == "add" and isinstance(place[key], dict):
            place[key][draw(st.text(max_size=6))] = copy.deepcopy(draw(JUNK))  # what is drawn is shared
        elif how == "remove" and place is not document:
            del place[key]
        else:
            place[key] = copy.deepcopy(draw(JUNK))  # what is drawn is shared
    return document[""]


def refused_or_read(read: Callable[[Path], object], path: Path) -> None:
    try:
        read(path)
    except MoeDistError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 (both ends are fine)


@pytest.mark.parametrize("kind", READERS)
@examples(60)
@given(data=st.data())
def test_changed_documents(kind: str, data: st.DataObject) -> None:
    name, document = good(kind)
    text = json.dumps(data.draw(changed(document)))
    with tempfile.TemporaryDirectory(prefix="moe-dist-") as folder:
        path = Path(folder) / name
        path.write_text(text, errors="surrogatepass")
        refused_or_read(READERS[kind], path)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"5", b"[]", b"{}", b'"x"', b"[" * 100_000, b'{"rows": 5, "machine": {"gpu": 1}, "date": 2}',
     b'{"rows": [5], "machine": {"gpu": 1}, "date": 2}', b'{"rows": {"a": 1}, "machine": [], "date": []}',
     b"\xff\xfe", b"\x80\x04\x95", b"1" * 5000, b"NaN", b'{"a": 1, "a": 2}'],
)  # fmt: skip
def test_what_is_no_such_document(kind: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / good(kind)[0]
    path.write_bytes(content)
    if kind == "peaks" and content == b"{}":
        assert READERS[kind](path) == {}
        return
    with pytest.raises(MoeDistError):
        READERS[kind](path)


@pytest.mark.parametrize("kind", READERS)
def test_the_originals_are_read(kind: str, tmp_path: Path) -> None:
    name, document = good(kind)
    (tmp_path / name).write_text(json.dumps(document))
    assert READERS[kind](tmp_path / name)


@cache
def trace() -> bytes:
    content = io.BytesIO()
    torch.save({"ids": torch.tensor([[0, 1], [2, -1]]), "weights": torch.ones(2, 2)}, content)
    return content.getvalue()


@examples(100)
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=5),
    st.floats(0, 2),
)
def test_damaged_traces(changes: list[tuple[float, int]], length: float) -> None:
    content = bytearray(trace())
    for place, value in changes:
        content[int(place * len(content))] = value
    with tempfile.TemporaryDirectory(prefix="moe-dist-") as folder:
        path = Path(folder) / "trace.pt"
        path.write_bytes(content[: int(length * len(content)) + 1])
        refused_or_read(lambda path: read_trace(SPEC, f"file:{path}"), path)


def test_a_trace_that_unfolds_is_refused_before_it_does(tmp_path: Path) -> None:
    plain, path = io.BytesIO(), tmp_path / "trace.pt"
    torch.save({"ids": torch.zeros(1 << 20, 2, dtype=torch.int8), "weights": torch.ones(1, 2)}, plain)
    with zipfile.ZipFile(plain) as given, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in given.infolist():
            packed.writestr(entry.filename, given.read(entry.filename))
    assert path.stat().st_size < 1 << 16
    with pytest.raises(ConfigError, match=r"unfolds from [\d,]+ to 2,09\d,\d+ bytes"):
        read_trace(SPEC, f"file:{path}")
    path.write_bytes(trace())
    assert read_trace(SPEC, f"file:{path}").rows == 2
