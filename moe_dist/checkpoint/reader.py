"""The files of a checkpoint: which file holds a tensor, what its header says, and reads of parts of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_dist.checkpoint.config import ModelConfig, read_config, read_json
from moe_dist.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorFormat:
    """What a tensor's header must say."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


class Checkpoint:
    """A directory with model.safetensors, or shards and their index. Files are opened when they are first needed;
    `bytes_read` counts the tensor bytes taken out of them. Every error is a CheckpointError."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.bytes_read = 0
        self._opened: dict[str, Any] = {}

    @cached_property
    def config(self) -> ModelConfig:
        return read_config(self.directory)

    @cached_property
    def files(self) -> dict[str, str]:
        """Tensor name to the name of its file. A single file wins over an index, as it does in transformers."""
        if (self.directory / SINGLE_FILE).is_file():
            return dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)
        path = self.directory / INDEX_FILE
        if not path.is_file():
            raise CheckpointError(self.directory, f"holds neither {SINGLE_FILE} nor {INDEX_FILE}")
        files = read_json(path).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise CheckpointError(path, "key weight_map must map tensor names to file names")
        return files

    def require(self, names: Iterable[str]) -> None:
        """Raise unless every tensor is listed; names the first few that are not and says how many."""
        missing = [name for name in names if name not in self.files]
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            plural = "tensor is" if len(missing) == 1 else "tensors are"
            raise CheckpointError(self.directory, f"{len(missing)} {plural} missing: {shown}")

    def expect(self, wanted: TensorFormat) -> None:
        """Raise unless the header has this tensor in this shape and one of these dtypes. Reads no data."""
        header = self._header(wanted.name)
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        if shape != wanted.shape:
            raise CheckpointError(
                self.path_of(wanted.name), f"tensor {wanted.name} has shape {shape}, the config asks for {wanted.shape}"
            )
        if dtype not in wanted.dtypes:
            legal = " or ".join(wanted.dtypes)
            raise CheckpointError(
                self.path_of(wanted.name), f"tensor {wanted.name} has dtype {dtype}, the config asks for {legal}"
            )

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """A tensor's rows and columns (all by default) in its stored dtype, on the CPU."""
        header = self._header(name)
        index = (rows or slice(None),) if columns is None else (rows or slice(None), columns)
        try:
            values: Tensor = header[index]
        except (SafetensorError, OSError, IndexError) as error:
            raise CheckpointError(self.path_of(name), f"tensor {name} can't be read: {error}") from None
        self.bytes_read += values.nbytes
        return values

    def path_of(self, name: str) -> Path:
        self.require([name])
        return self.directory / self.files[name]

    def _header(self, name: str) -> Any:
        path = self.path_of(name)
        handle = self._open(self.files[name])
        try:
            return handle.get_slice(name)
        except SafetensorError:
            raise CheckpointError(path, f"tensor {name} is missing, though {INDEX_FILE} says it is here") from None

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            path = self.directory / file
            try:
                self._opened[file] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(path, f"no such file, though {INDEX_FILE} names it") from None
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(path, f"is truncated or no safetensors file: {error}") from None
        return self._opened[file]
