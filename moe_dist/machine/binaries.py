"""Whether installed binary packages fit the torch that is installed, by reading their files. None of them is loaded:
an import that fails names a mangled symbol and nothing that helps, and some that don't fit end the process."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, BinaryIO

# Distributions with libraries that are linked against torch, as far as they matter beside MoE layers.
PACKAGES = (
    "sgl-deep-gemm", "deep-gemm", "deep-ep", "sgl-kernel", "sglang-kernel", "flashinfer-python", "flashinfer-jit-cache",
    "vllm", "flash-attn", "flash-attn-3", "flash-mla", "torchao", "torchvision", "torchaudio", "xformers",
    "transformer-engine-torch", "nixl",
)  # fmt: skip
TORCHS_LIBRARIES = ("libtorch", "libc10")
# What torch exports and others import: C++ names of its namespaces, and the C names of its stable interface.
TORCHS_NAMES = re.compile(r"^_Z\w*(?:3c10|2at|5torch)|^aoti_torch_|^torch_")
OF_CUDA = re.compile("cuda|cublas|cudnn|nccl", re.IGNORECASE)
CUDA_LIBRARY = re.compile(r"lib(?:cudart|nvrtc|cublas|cublasLt)\.so\.(\d+)")
# Symbols that releases of torch are known by: seen in the files of those releases.
KNOWN = {
    "_ZN3c104impl3cow23materialize_cow_storageERNS_11StorageImplE": "torch 2.11 has it, 2.13 and 2.14 have not",
    "_ZN3c104cuda19CUDAErrorLogCaptureC1Ev": "torch 2.13 has it, 2.11 has not",
}


class NotElfError(Exception):
    """A file that can't be read as a shared library. Its text says why."""


@dataclass(frozen=True)
class Linked:
    """What a shared library says of its links: libraries that it needs, and symbols that others must define."""

    needed: tuple[str, ...]
    undefined: tuple[str, ...]

    @property
    def torchs(self) -> bool:
        return any(name.startswith(TORCHS_LIBRARIES) for name in self.needed)


@dataclass(frozen=True)
class Fit:
    """An installed package beside the installed torch. `files`: its libraries that are linked with torch. `missing`:
    symbols that they want of torch and that it does not define, as they are mangled. `absent`: libraries of torch that
    they need and that are not there. `cuda`: the CUDA release that they were built for, where torch's is another.
    `unreadable`: files of it that can't be read, with the reason. `wants`: the torch that its metadata ask for."""

    package: str
    version: str
    files: int
    missing: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    cuda: int | None = None
    unreadable: tuple[str, ...] = ()
    wants: str | None = None

    @property
    def ok(self) -> bool:
        return not (self.missing or self.absent or self.cuda or self.unreadable)

    def problem(self) -> str:
        """In one line, "" where it fits."""
        found = []
        if self.absent:
            found.append(f"needs {', '.join(self.absent)}, which this torch has not")
        if self.cuda:
            found.append(f"was built for CUDA {self.cuda}")
        if self.missing:
            more = f" and {len(self.missing) - 1} more" if len(self.missing) > 1 else ""
            first = next((name for name in self.missing if name in KNOWN), self.missing[0])
            found.append(f"wants {demangled(first)}{more}, which this torch does not define")
        found += self.unreadable
        return "; ".join(found)

    def remedy(self, torch_version: str, tried: str | None) -> str:
        """`tried`: the releases of the package that this project was tried with, such as ">=0.1.4,<0.2"."""
        if self.ok:
            return ""
        if self.unreadable and not (self.missing or self.absent or self.cuda):
            return f"install it again: pip install --force-reinstall --no-deps {self.package}=={self.version}"
        told = [f"{demangled(name).partition('(')[0]}: {KNOWN[name]}" for name in self.missing if name in KNOWN]
        if self.wants:
            told.append(f"{self.package} {self.version} asks for torch{self.wants}")
        if self.absent and not self.missing:
            return "; ".join(
                [*told, "install torch's build for CUDA, or take the package out on a machine without GPUs"]
            )
        release = ".".join(torch_version.split(".")[:2])
        either = f"install a release of {self.package} that was built for torch {release}"
        if self.cuda:
            either += " and its CUDA"
        if tried:
            either += f" (this project was tried with {self.package}{tried}),"
        return "; ".join([*told, f"{either} or the torch that {self.version} was built for"])


def check_packages(names: Iterable[str] = PACKAGES) -> list[Fit]:
    """Those of these distributions that are installed and hold libraries linked with torch. Reads files only. Raises
    ImportError without pyelftools."""
    import elftools.elf.elffile  # noqa: F401 (a library that can't be read is another thing than no reader)

    found = []
    with ExitStack() as stack:
        torchs = _Exports.of(torch_libraries(), stack)
        for name in names:
            try:
                package = distribution(name)
            except PackageNotFoundError:
                continue
            if (fit := check_package(package, torchs)) is not None:
                found.append(fit)
    return found


def check_package(package: Distribution, torchs: _Exports) -> Fit | None:
    """None where none of its libraries is linked with torch."""
    paths = [Path(str(package.locate_file(file))) for file in package.files or () if ".so" in Path(file.name).suffixes]
    linked: list[Linked] = []
    unreadable: list[str] = []
    for path in paths:
        try:
            linked.append(read_library(path))
        except NotElfError as error:
            unreadable.append(f"{path.name} can't be read as a library: {error}")
    ours = [each for each in linked if each.torchs]
    if not ours and not unreadable:
        return None
    absent = {name for each in ours for name in each.needed if name.startswith(TORCHS_LIBRARIES)} - torchs.names
    wanted = dict.fromkeys(name for each in ours for name in each.undefined if TORCHS_NAMES.match(name))
    missing = [name for name in wanted if name not in torchs]
    if absent:  # they would be in there
        missing = [name for name in missing if not OF_CUDA.search(name)]
    if missing:
        with ExitStack() as stack:
            own = _Exports.of(paths, stack)
            missing = [name for name in missing if name not in own]
    name, version = package.metadata["Name"], package.version
    built_for = _cuda_of(name for each in ours for name in each.needed)
    cuda = built_for if torchs.cuda and built_for and built_for != torchs.cuda else None
    wants = _requirement(package.requires or (), "torch")
    return Fit(name, version, len(ours), tuple(missing), tuple(sorted(absent)), cuda, tuple(unreadable), wants)


def read_library(path: Path) -> Linked:
    """Raises NotElfError."""
    try:
        with open(path, "rb") as file:
            elf = _elf(file)
            needed = _needed(elf)
            if not any(name.startswith(TORCHS_LIBRARIES) for name in needed):
                return Linked(tuple(needed), ())  # of no interest, and there may be many
            symbols = elf.get_section_by_name(".dynsym")
            undefined = [
                symbol.name
                for symbol in (symbols.iter_symbols() if symbols is not None else ())
                if symbol["st_shndx"] == "SHN_UNDEF" and symbol["st_info"]["bind"] == "STB_GLOBAL"
            ]
            return Linked(tuple(needed), tuple(undefined))
    except Exception as error:  # what a damaged file makes of a parser is not only its own errors
        raise NotElfError(" ".join(str(error).split())[:200] or type(error).__name__) from None


def torch_libraries() -> list[Path]:
    """The files that torch's own libraries are in; torch is found and not imported."""
    found = importlib.util.find_spec("torch")
    places = found.submodule_search_locations if found else None
    return sorted(path for place in places or () for path in Path(place, "lib").glob("lib*.so*"))


class _Exports:
    """What a set of libraries defines, looked up in their hash tables: torch's have 200,000 symbols. `cuda`: the major
    release that they were built for."""

    def __init__(self, names: set[str], tables: list[Any], cuda: int | None) -> None:
        self.names, self._tables, self.cuda = names, tables, cuda

    @classmethod
    def of(cls, paths: Iterable[Path], stack: ExitStack) -> _Exports:
        names, tables, cuda = set(), [], None
        for path in paths:
            with suppress(Exception):  # one that can't be read defines nothing
                elf = _elf(stack.enter_context(path.open("rb")))
                table = elf.get_section_by_name(".gnu.hash") or elf.get_section_by_name(".hash")
                if table is not None:
                    tables.append(table)
                    names.add(path.name)
                    cuda = cuda or _cuda_of(_needed(elf))
        return cls(names, tables, cuda)

    def __contains__(self, symbol: str) -> bool:
        for table in self._tables:
            entry = table.get_symbol(symbol)
            if entry is not None and entry["st_shndx"] != "SHN_UNDEF":
                return True
        return False


def _needed(elf: Any) -> list[str]:
    dynamic = elf.get_section_by_name(".dynamic")
    return [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")] if dynamic is not None else []


def _elf(file: BinaryIO) -> Any:
    from elftools.elf.elffile import ELFFile

    return ELFFile(file)


def _cuda_of(needed: Iterable[str]) -> int | None:
    """The major release of CUDA whose libraries are among these."""
    found = [match[1] for name in needed if (match := CUDA_LIBRARY.fullmatch(name))]
    return int(found[0]) if found else None


def _requirement(requirements: Iterable[str], name: str) -> str | None:
    """What is asked for of one distribution, such as "==2.11.0"; None where nothing is."""
    for text in requirements:
        wanted, _, condition = text.partition(";")
        match = re.fullmatch(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*\(?([^)]*)\)?\s*", wanted)
        if match and match[1].lower().replace("_", "-") == name and "extra" not in condition and match[2]:
            return match[2].strip()
    return None


def release_tried_with(package: str, project: str = "moe_dist") -> str | None:
    """The releases of a package that this project's own metadata ask for; None where it is not in them."""
    try:
        requirements = distribution(project).requires or ()
    except PackageNotFoundError:
        return None
    return _requirement((text.partition(";")[0] for text in requirements), package)


@cache
def _demangler() -> Any:
    with suppress(OSError, AttributeError):
        function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
        function.restype = ctypes.c_void_p
        return function
    return None


def demangled(symbol: str) -> str:
    """A C++ name as it was written, by libstdc++, which torch needs anyway; else as it is."""
    function = _demangler()
    if function is None:
        return symbol
    status = ctypes.c_int()
    pointer = function(symbol.encode(), None, None, ctypes.byref(status))
    if not pointer or status.value:
        return symbol
    try:
        return ctypes.string_at(pointer).decode(errors="replace")
    finally:
        _free(pointer)


def _free(pointer: int) -> None:
    libc = ctypes.CDLL(None)
    libc.free.argtypes = [ctypes.c_void_p]
    libc.free(pointer)
