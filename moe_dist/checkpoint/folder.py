"""The files of a checkpoint's folder. Their content is foreign: no name leads out of the folder, only regular files of
a sane size are parsed, and whatever is wrong with them is one line that names the file."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from moe_dist.errors import CheckpointError, ConfigError
from moe_dist.files import read_small_text, require_regular, require_text, unique_keys

CONFIG_LIMIT = 4 << 20  # bytes; real ones have kilobytes, with a long list of modules some 100 of them
INDEX_LIMIT = 32 << 20  # bytes; Kimi-K2's 140,000 tensors take 14 MiB

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxlevel, _short.maxlist, _short.maxdict = 2, 6, 6


def shown(value: object) -> str:
    """A foreign value as a message can bear it: one line, no escape sequences, not too long."""
    return _short.repr(value)


def plain(name: str) -> str:
    """A foreign name as it is if a message can bear it."""
    return name if name.isprintable() and len(name) <= 200 else shown(name)


def folder(directory: Path | str, field: str = "checkpoint") -> Path:
    """`directory` as a path. Raises ConfigError for an empty name, which would mean the working directory, and for one
    that is no UTF-8 text."""
    if not str(directory).strip():
        raise ConfigError(field, str(directory), "is empty", "the folder of a checkpoint")
    require_text(field, str(directory), "folder of a checkpoint")
    return Path(directory)


def model_name(directory: Path) -> str:
    """What the folder is called: `org/name@revision` in the Hugging Face cache, whose folders are named by hashes."""
    home = Path(os.path.realpath(directory))
    repository = home.parent.parent.name
    if home.parent.name == "snapshots" and repository.startswith("models--"):
        return f"{repository.removeprefix('models--').replace('--', '/')}@{home.name[:8]}"
    return home.name


def inside(directory: Path, name: str, named_by: str | None = None) -> Path:
    """The path of the regular file `name` in the folder. A link may lead to where the Hugging Face cache keeps its
    files (snapshots/HASH/file -> blobs/HASH) and nowhere else outside.

    Raises FileNotFoundError where there is none, CheckpointError if it leads elsewhere or is no regular file.
    """
    by = f", which {named_by} names," if named_by else ""
    parts = PurePosixPath(name)
    if not name.isprintable() or not name or parts.is_absolute() or ".." in parts.parts:
        raise CheckpointError(directory, f"file {shown(name)}{by} is no file in the folder")
    try:
        real = Path(os.path.realpath(directory / name, strict=True))
        home = Path(os.path.realpath(directory))
        if not any(real.is_relative_to(root) for root in (home, _blobs(home)) if root):
            raise CheckpointError(directory / name, f"is a link out of the folder, to {shown(str(real))}")
        require_regular(real)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(directory / name, _said(error)) from None
    return real


def _blobs(home: Path) -> Path | None:
    """Where the Hugging Face cache keeps the files of a snapshot."""
    return Path(os.path.realpath(home.parent.parent / "blobs")) if home.parent.name == "snapshots" else None


def exists(directory: Path, name: str) -> bool:
    """Whether something of this name lies in the folder, be it a link to nothing."""
    return os.path.lexists(directory / name)


def read_json(directory: Path, name: str, limit: int) -> Mapping[str, Any]:
    """The JSON object in a file of the folder, or CheckpointError."""
    path = directory / name
    try:
        text = read_small_text(inside(directory, name), limit)
    except FileNotFoundError:
        raise CheckpointError(path, "no such file") from None
    except OSError as error:
        raise CheckpointError(path, _said(error)) from None
    try:
        found = json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise CheckpointError(path, "can't be read as JSON: nested too deeply") from None
    except ValueError as error:  # bad JSON, a key twice, a number of thousands of digits
        raise CheckpointError(path, f"can't be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(path, f"holds a JSON {type(found).__name__} where an object belongs")
    return found


def _said(error: OSError | ValueError) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return text if text.startswith("is ") else f"can't be read: {text}"
