"""Shared libraries that this process has loaded, which may be others than those that torch was compiled against."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

MAPS = Path("/proc/self/maps")


@dataclass(frozen=True)
class Nccl:
    """`loaded`: the version that the library in this process gives, `path` its file; None where none is loaded.
    `compiled`: the version of the headers that torch was compiled against. `also`: further files of NCCL in the
    process, which should not be there."""

    loaded: str | None
    path: str | None
    compiled: str | None
    also: tuple[str, ...] = ()


def loaded_files(stem: str, maps: Path = MAPS) -> list[str]:
    """Files of this process's memory whose name begins with `stem`, in the order in which they lie there."""
    try:
        lines = maps.read_text(errors="replace").splitlines()
    except OSError:
        return []
    paths = dict.fromkeys(fields[5].strip() for line in lines if len(fields := line.split(maxsplit=5)) == 6)
    return [path for path in paths if path.startswith("/") and Path(path).name.startswith(stem)]


def loaded_nccl(maps: Path = MAPS) -> Nccl:
    """Asks the library itself; torch has loaded it when it was imported, or holds it inside of libtorch_cuda.so."""
    files = loaded_files("libnccl.so", maps)
    for path in (*files, *loaded_files("libtorch_cuda.so", maps)):
        if (version := _version(path)) is not None:
            return Nccl(version, path, _compiled(), tuple(file for file in files if file != path))
    return Nccl(None, None, _compiled(), tuple(files))


def _version(path: str) -> str | None:
    number = ctypes.c_int()
    with suppress(OSError, AttributeError):  # AttributeError: no such function in it
        if ctypes.CDLL(path).ncclGetVersion(ctypes.byref(number)) == 0:
            return version_text(number.value)
    return None


def version_text(code: int) -> str:
    """NCCL's number as text: 22809 is 2.28.9; up to 2.8 it was 2804 for 2.8.4."""
    thousand = 1000 if code < 10000 else 10000
    return f"{code // thousand}.{code % thousand // 100}.{code % 100}"


def _compiled() -> str | None:
    if not torch.cuda.is_available():  # a build without CUDA can't tell
        return None
    with suppress(Exception):
        return ".".join(map(str, torch.cuda.nccl.version()))
    return None
