"""Headers of safetensors files that somebody made to do harm: refused at once, in one line, whatever they claim."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from checkpoints import FILE
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from moe_dist.checkpoint import check_layer, layer_spec, load_router, load_shard, make_checkpoint
from moe_dist.checkpoint.header import HEADER_LIMIT
from moe_dist.errors import CheckpointError, MoeDistError
from moe_dist.model.placement import Placement
from moe_dist.model.spec import ParallelSpec

LAYER = 1
NAME, OTHER = (f"model.layers.{LAYER}.mlp.experts.{number}.up_proj.weight" for number in (0, 1))
SOON_S = 10.0  # on a busy machine


@cache
def original() -> tuple[Path, dict[str, Any], bytes]:
    """A checkpoint, the header of its one file, and what lies behind it."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="moe-dist-"))
    made = make_checkpoint(
        Path(_KEPT[0].name) / "model", hidden=128, intermediate=128, num_experts=2, top_k=1, shards=1
    )
    content = (made / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    return made, json.loads(content[8 : 8 + length]), content[8 + length :]


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def write(directory: Path, header: bytes, length: int | None = None) -> Path:
    shutil.copytree(original()[0], directory)
    given = len(header) if length is None else length
    (directory / FILE).write_bytes(given.to_bytes(8, "little") + header + original()[2])
    return directory


def read_all(directory: Path) -> None:
    check_layer(directory, LAYER)
    load_router(directory, LAYER)
    load_shard(directory, LAYER, Placement.build(layer_spec(directory, LAYER), ParallelSpec()), 0)


def changed(**keys: Any) -> bytes:
    header = copy.deepcopy(original()[1])
    header[NAME] |= keys
    return json.dumps(header).encode()


def twice() -> bytes:
    """The same tensor again, as one of another shape."""
    again = json.dumps({NAME: original()[1][NAME] | {"shape": [64, 256]}})
    return json.dumps(original()[1])[:-1].encode() + b"," + again[1:].encode()


ATTACKS: dict[str, Callable[[], tuple[bytes, int | None]]] = {
    "a length of 64 bits": lambda: (changed(), 2**64 - 1),
    "a length beyond the file": lambda: (changed(), HEADER_LIMIT - 1),
    "many tensors": lambda: (
        json.dumps(
            {f"{n:01000}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(17_000)}
        ).encode(),
        None,
    ),
    "blanks": lambda: (changed() + b" " * (HEADER_LIMIT + 1), None),
    "lists in lists": lambda: (b"[" * 100_000, None),
    "a tensor twice": lambda: (twice(), None),
    "offsets of another tensor": lambda: (changed(data_offsets=original()[1][OTHER]["data_offsets"]), None),
    "offsets behind the end": lambda: (changed(data_offsets=[0, 10**18]), None),
    "offsets below 0": lambda: (changed(data_offsets=[-5, 5]), None),
    "offsets beyond 64 bits": lambda: (changed(data_offsets=[2**64, 2**64 + 5]), None),
    "a shape that overflows": lambda: (changed(shape=[2**33, 2**33]), None),
    "a shape of 400 digits": lambda: (changed(shape=[10**400]), None),
    "100,000 dimensions": lambda: (changed(shape=[1] * 100_000), None),
    "a number of 5,000 digits": lambda: (changed().replace(b"[128, 128]", b"[" + b"1" * 5000 + b"]", 1), None),
    "no object": lambda: (b"null", None),
    "a pickle": lambda: (b"\x80\x04\x95" + bytes(100), None),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_refused_at_once(attack: str, tmp_path: Path) -> None:
    directory = write(tmp_path / "model", *ATTACKS[attack]())
    begin = time.monotonic()
    with pytest.raises(CheckpointError) as refusal:
        read_all(directory)
    assert time.monotonic() - begin < SOON_S
    text = str(refusal.value)
    assert FILE in text
    assert len(text.splitlines()) == 1
    assert len(text) < 1000


def test_a_tensor_that_stands_twice_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="stands there twice"):
        read_all(write(tmp_path / "model", twice()))


def test_the_original_is_read(tmp_path: Path) -> None:
    read_all(write(tmp_path / "model", json.dumps(original()[1]).encode()))


NUMBERS = st.one_of(
    st.integers(), st.sampled_from([0, 1, 127, 128, 16384, 2**31, 2**32, 2**63, 2**64 - 1, 2**64, 10**30])
)
VALUES = st.one_of(
    NUMBERS, st.none(), st.floats(), st.text(max_size=5), st.lists(NUMBERS | st.none(), max_size=4),
    st.sampled_from(["F8_E4M3", "BF16", "F32", "U8", "I64", "F4", "BOOL", "C64"]), st.just({}),
)  # fmt: skip
CHANGES = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["dtype", "shape", "data_offsets", "extra", "whole", "swap", "gone"]),
        VALUES,
    ),
    min_size=1,
    max_size=3,
)


@examples(60)
@given(CHANGES, st.none() | NUMBERS.filter(lambda number: 0 <= number < 2**64))
def test_changed_headers_raise_nothing_else(changes: list[tuple[float, str, Any]], length: int | None) -> None:
    header = copy.deepcopy(original()[1])
    for place, what, value in changes:
        names = sorted(header)
        name = names[int(place * len(names))]
        if what == "whole":
            header[name] = copy.deepcopy(value)  # what is drawn is shared
        elif what == "gone":
            del header[name]
        elif what == "swap":
            header[name], header[names[0]] = header[names[0]], header[name]
        elif isinstance(header[name], dict):
            header[name][what] = copy.deepcopy(value)
    with tempfile.TemporaryDirectory(prefix="moe-dist-") as folder:
        directory = write(Path(folder) / "model", json.dumps(header).encode(), length)
        try:
            read_all(directory)
        except MoeDistError as error:
            said = str(error)
        else:
            said = ""
    assert len(said.splitlines()) <= 1
    assert len(said) < 3000
