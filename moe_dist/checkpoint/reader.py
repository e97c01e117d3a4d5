"""The files of a checkpoint: which one holds a tensor, what its header says, and reads of parts of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_dist.checkpoint.config import ModelConfig, read_config
from moe_dist.checkpoint.folder import INDEX_LIMIT, exists, folder, inside, plain, read_json
from moe_dist.checkpoint.header import check_header
from moe_dist.errors import CheckpointError
from moe_dist.messages.counts import count_of, verb

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
NEAREST = 3  # names of tensors or files that a message about missing ones shows
WEIGHT_FILES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf")
# What safetensors raises for a damaged file: its own error, or Python's where a number or a dtype makes no sense.
DAMAGED = (SafetensorError, OSError, ValueError, IndexError, TypeError, RuntimeError, OverflowError, AttributeError)


@dataclass(frozen=True)
class TensorFormat:
    """What a tensor's header must say. `also`: other shapes that hold the same."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    also: tuple[tuple[int, ...], ...] = ()


class Checkpoint:
    """A directory with model.safetensors, or shards and their index. Files are opened when they are first needed;
    `bytes_read` counts the tensor bytes taken out of them. Every error is a CheckpointError, but for a ConfigError for
    an empty name and an UnsupportedError for a model that is not read."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = folder(directory)
        self.bytes_read = 0
        self._opened: dict[str, Any] = {}

    @cached_property
    def config(self) -> ModelConfig:
        return read_config(self.directory)

    @property
    def holds_weights(self) -> bool:
        return exists(self.directory, SINGLE_FILE) or exists(self.directory, INDEX_FILE)

    @cached_property
    def files(self) -> dict[str, str]:
        """Tensor name to the name of its file."""
        single, index = exists(self.directory, SINGLE_FILE), exists(self.directory, INDEX_FILE)
        if not single and not index:
            raise CheckpointError(self.directory, f"holds neither {SINGLE_FILE} nor {INDEX_FILE}{self._instead()}")
        if not index:
            return dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)
        path = self.directory / INDEX_FILE
        files = read_json(self.directory, INDEX_FILE, INDEX_LIMIT).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise CheckpointError(path, "key weight_map must map tensor names to file names")
        if single and set(files.values()) != {SINGLE_FILE}:
            rule = f"names other files than {SINGLE_FILE}, which lies beside it: one of the two is stray"
            raise CheckpointError(path, f"{rule}, and libraries differ in which they read; take it away")
        return files

    def strays(self, concerned: Callable[[str], bool]) -> list[tuple[str, str]]:
        """(tensor, file) of `concerned` tensors in files that `files` doesn't give for them: a second copy, one that
        the index leaves out, a file of weights that it doesn't name. Looks at the headers of all that lies there; files
        that can't be read are left to whoever needs a tensor of theirs."""
        found = []
        for file in sorted(set(self.files.values()) | set(self._beside(".safetensors"))):
            try:
                names = self._open(file).keys()
            except CheckpointError:
                continue
            found += [(name, file) for name in names if self.files.get(name) != file and concerned(name)]
        return found

    def require(self, names: Iterable[str]) -> None:
        """Raise unless every tensor is listed; names the first few that are not, says how many, and what is there."""
        missing = [name for name in names if name not in self.files]
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            there = ", ".join(map(plain, nearest(missing[0], self.files))) or "nothing like it"
            raise CheckpointError(
                self.directory,
                f"{count_of(len(missing), 'tensor')} {verb(len(missing), 'are')} missing: {shown}; there is {there}",
            )

    def expect(self, wanted: TensorFormat) -> None:
        """Raise unless the header has this tensor in this shape and one of these dtypes. Reads no data."""
        dtype, shape = self.header(wanted.name)
        if shape not in (wanted.shape, *wanted.also):
            problem = f"tensor {wanted.name} has shape {shape}, the config asks for {wanted.shape}"
            raise CheckpointError(self.path_of(wanted.name), problem)
        if dtype not in wanted.dtypes:
            problem = (
                f"tensor {wanted.name} has dtype {dtype}, the layer's format asks for {' or '.join(wanted.dtypes)}"
            )
            raise CheckpointError(self.path_of(wanted.name), problem)

    def header(self, name: str) -> tuple[str, tuple[int, ...]]:
        """A tensor's dtype, as safetensors spells it, and shape."""
        entry = self._entry(name)
        return str(entry.get_dtype()), tuple(entry.get_shape())

    def read(self, name: str, *index: slice) -> Tensor:
        """A tensor, or the part of it that the index says, in its stored dtype, on the CPU whatever torch's default
        device is. The header must have been compared with what is expected: slices beyond the end are cut short."""
        entry = self._entry(name)
        try:
            with torch.device("cpu"):
                values: Tensor = entry[index or ...]
        except DAMAGED as error:
            raise CheckpointError(self.path_of(name), f"tensor {name} can't be read: {_line(error)}") from None
        self.bytes_read += values.nbytes
        return values

    def path_of(self, name: str) -> Path:
        self.require([name])
        return self.directory / self.files[name]

    def _entry(self, name: str) -> Any:
        path = self.path_of(name)
        handle = self._open(self.files[name])
        try:
            return handle.get_slice(name)
        except DAMAGED:
            raise CheckpointError(path, f"tensor {name} is missing, though {INDEX_FILE} says it is here") from None

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            path = self.directory / file
            try:
                place = inside(self.directory, file, INDEX_FILE)
                check_header(place)
                self._opened[file] = safe_open(place, framework="pt", device="cpu")
            except FileNotFoundError:
                link = "is a link to a file that isn't there"
                problem = link if path.is_symlink() else f"no such file, though {INDEX_FILE} names it"
                raise CheckpointError(path, problem) from None
            except MemoryError as error:  # the whole file is mapped, however little of it is read
                raise CheckpointError(path, f"can't be mapped into memory: {_line(error)}") from None
            except DAMAGED as error:
                raise CheckpointError(path, f"is truncated or no safetensors file: {_line(error)}") from None
        return self._opened[file]

    def _instead(self) -> str:
        """Other files of weights that lie there."""
        found = [plain(name) for name in self._beside(*WEIGHT_FILES)]
        return "; there is " + ", ".join(found[:NEAREST]) + (", ..." if len(found) > NEAREST else "") if found else ""

    def _beside(self, *endings: str) -> list[str]:
        """Names in the folder that end so, ascending."""
        try:
            return sorted(path.name for path in self.directory.iterdir() if path.name.endswith(endings))
        except OSError:
            return []


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that share most with `name`: the parts of the dotted name before and after what differs, such
    as another prefix or suffix."""
    parts = name.split(".")

    def shared(other: str) -> int:
        others = other.split(".")
        before = _equal(parts, others)
        return before + min(_equal(parts[::-1], others[::-1]), min(len(parts), len(others)) - before)

    scored = sorted((-shared(other), other) for other in names)
    return [other for score, other in scored[:NEAREST] if score < 0 and score == scored[0][0]]


def _equal(left: list[str], right: list[str]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
