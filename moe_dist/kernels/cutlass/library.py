"""The compiled GEMMs: where compiler and headers are, one build for all processes, and the functions by ctypes.

The library has a C interface and a CUDA runtime of its own, so that it does not depend on the installed torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock, Timeout

from moe_dist.errors import ConfigError, MoeDistError, ResourceError
from moe_dist.machine.machine import cores
from moe_dist.messages.building import SAY_EVERY_S, say
from moe_dist.messages.counts import count_of
from moe_dist.model.sizes import cdiv
from moe_dist.step.rows import Support
from moe_dist.tables import cache_folder

SOURCES = Path(__file__).parent
BUILD_COMMAND = "moe-dist build cutlass"
OLDEST_NVCC = (12, 4)
OLDEST_CUTLASS = (3, 7)
FLAGS = (
    *("-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr"),
    *("-Xcompiler", "-fPIC"),
)
HEADERS = (("flashinfer", "data/cutlass/include"), ("cutlass_library", "source/include"))  # packages, and where in them
UP_GATED, UP, DOWN = 0, 1, 2  # grouped_gemm.cuh's Gemm
GEMMS, KINDS = (UP_GATED, UP, DOWN), (1, 2, 3)
LONGEST_KEPT = 512  # columns of a sum whose weights can stay for a run of tiles: STAGES · BLOCK_K there
# (GEMM, kind, variant): of GEMM1, whether its rows may be on their way; of GEMM2, whether its tiles come in runs.
INSTANCES = tuple((gemm, kind, variant) for kind in KINDS for gemm in GEMMS for variant in (False, True))
COMPILE_TIMEOUT_S = 900.0
LOCK_TIMEOUT_S = 4 * COMPILE_TIMEOUT_S  # a process that compiles and lives is done by then, on few cores too


class BuildError(MoeDistError):
    """nvcc failed. Has its last lines."""


class Args(ctypes.Structure):
    """grouped_gemm.cuh's Args."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "x_scales", "w_scales", "x_static", "h_static")),
        *((name, ctypes.c_void_p) for name in ("starts", "stops", "order", "taken", "out", "out_scales")),
        *((name, ctypes.c_void_p) for name in ("flags", "step", "failed")),
        *((name, ctypes.c_int64) for name in ("limit_ns", "x_scale_row", "x_scale_k")),
        *((name, ctypes.c_int) for name in ("k", "width", "first", "end", "experts", "top_k", "pairs")),
        *((name, ctypes.c_int) for name in ("activation", "gate_first", "per_tensor")),
        *((name, ctypes.c_int) for name in ("each", "rank", "parts", "phase")),
    )


class Library:
    def __init__(self, path: Path) -> None:
        self._loaded = ctypes.CDLL(str(path))
        self._loaded.moe_dist_error.restype = ctypes.c_char_p
        self._loaded.moe_dist_weights_map.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        self._gemms = {
            (gemm, kind, variant): getattr(self._loaded, f"moe_dist_gemm_{gemm}_{kind}_{int(variant)}")
            for gemm, kind, variant in INSTANCES
        }
        for launch in self._gemms.values():
            launch.argtypes = (
                *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
                *(ctypes.c_int, ctypes.c_int, ctypes.c_void_p),
            )

    def weights_map(self, address: int, rows: int, k: int) -> WeightsMap:
        """How the tensor memory accelerator reads `rows` rows of `k` bytes; valid as long as they stay there."""
        made = WeightsMap()
        self._check(self._loaded.moe_dist_weights_map(made.address, address, rows, k))
        return made

    def gemm(
        self,
        gemm: int,
        kind: int,
        args: Args,
        weights: WeightsMap,
        share: int,
        device: int,
        sms: int,
        pdl: bool,
        stream: int,
        runs: bool = False,
    ) -> None:
        """Launch on `sms` multiprocessors of `device`. `share`: how many thread blocks share weights. `runs`: of GEMM2
        with sums up to LONGEST_KEPT, tiles of the same weights come in runs."""
        launch = self._gemms[gemm, kind, runs or bool(args.flags)]
        self._check(launch(ctypes.addressof(args), weights.address, share, device, sms, int(pdl), stream))

    def _check(self, error: int) -> None:
        if error:
            raise RuntimeError(f"backend cutlass: CUDA error {error}: {self._loaded.moe_dist_error(error).decode()}")


class WeightsMap:
    """A CUtensorMap: 128 bytes that want to lie at a multiple of 64."""

    def __init__(self) -> None:
        self._room = ctypes.create_string_buffer(128 + 63)
        self.address = cdiv(ctypes.addressof(self._room), 64) * 64


def build_state() -> Support:
    """Whether the library is there or what it takes to build it. Builds nothing."""
    try:
        built = library_path().exists()
    except (ResourceError, ConfigError) as error:  # ConfigError: there is no folder to build it in
        return Support(False, str(error))
    return (
        Support(True, "built") if built else Support(False, f"not built yet; `{BUILD_COMMAND}` does it once (minutes)")
    )


@cache
def load() -> Library:
    """The library, built first where it is not yet."""
    return Library(ensure_built())


def ensure_built() -> Path:
    """One process compiles, with progress on standard error; others say what they wait for."""
    path = library_path()
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("MOE_DIST_CACHE", str(cache_folder()), f"can't be written: {error.strerror}") from None
    with _alone(path.parent / "lock"):
        if not path.exists():
            _build(path)
    return path


def library_path() -> Path:
    """Keyed by all that decides what is in it: sources, flags, the compiler's version and the headers'. Raises
    ResourceError where one of them is missing or too old, and ConfigError where there is no cache folder."""
    nvcc, (_, version) = find_nvcc(), find_headers()
    parts = [*FLAGS, _nvcc_says(nvcc), *map(str, version)]
    parts += [source.read_text(encoding="utf-8") for source in sorted(SOURCES.glob("*.cu*"))]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache_folder() / "cutlass" / key / "moe_dist_gemm.so"


def find_nvcc() -> str:
    """$CUDA_HOME's if that is set, else the one in PATH, else the one of the package nvidia-cuda-nvcc."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    packaged = [str(path) for root in _nvidia_folders() for path in sorted(root.glob("*/bin/nvcc"))]
    found = [shutil.which(f"{home}/bin/nvcc")] if home else [shutil.which("nvcc"), *packaged]
    nvcc = next((path for path in found if path), None)
    if nvcc is None and home:
        raise ResourceError(
            "compiler", f"{home}/bin/nvcc", "none", "CUDA_HOME names a CUDA toolkit; unset it or mend it."
        )
    if nvcc is None:
        raise ResourceError("compiler", "nvcc", "none", "Set CUDA_HOME, or pip install nvidia-cuda-nvcc.")
    version = _version(r"release (\d+)\.(\d+)", _nvcc_says(nvcc))
    if version < OLDEST_NVCC:
        needed = f"nvcc {_dotted(OLDEST_NVCC)} or newer"
        raise ResourceError(
            "compiler", needed, f"{nvcc} of version {_dotted(version)}", "Set CUDA_HOME to a newer one."
        )
    return nvcc


def find_headers() -> tuple[Path, tuple[int, ...]]:
    """CUTLASS's folder `include` and its version: flashinfer-python's, else the package nvidia-cutlass's."""
    old = "none"
    for package, folder in HEADERS:
        spec = find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            headers = Path(root) / folder
            if (headers / "cutlass" / "version.h").exists():
                text = (headers / "cutlass" / "version.h").read_text()
                version = _version(r"CUTLASS_MAJOR (\d+)[\s\S]*?CUTLASS_MINOR (\d+)[\s\S]*?CUTLASS_PATCH (\d+)", text)
                if version >= OLDEST_CUTLASS:
                    return headers, version
                old = f"{_dotted(version)} of {package}"
    needed = f"CUTLASS {_dotted(OLDEST_CUTLASS)} or newer"
    raise ResourceError("headers", needed, old, "pip install flashinfer-python, or nvidia-cutlass.")


def compile_object(source: str, target: Path, defines: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> str:
    """One source of this folder with nvcc; what nvcc said. Raises BuildError with its last lines."""
    nvcc, (headers, _) = find_nvcc(), find_headers()
    includes = ("-I", str(headers), *_packaged_includes(nvcc))
    defined = (f"-D{define}" for define in defines)
    return _run([nvcc, *FLAGS, *flags, *includes, *defined, "-c", str(SOURCES / source), "-o", str(target)])


def gemm_defines(gemm: int, kind: int, variant: bool) -> tuple[str, ...]:
    """What grouped_gemm.cu is compiled with."""
    named = {"GEMM": gemm, "KIND": kind, "VARIANT": int(variant), "ARGS_BYTES": ctypes.sizeof(Args)}
    return tuple(f"MOE_DIST_{name}={value}" for name, value in named.items())


def _build(path: Path) -> None:
    began, nvcc = time.monotonic(), find_nvcc()
    wanted: list[tuple[str, str, tuple[str, ...]]] = [
        ("gemm_{}_{}_{}.o".format(*instance), "grouped_gemm.cu", gemm_defines(*instance)) for instance in INSTANCES
    ]
    wanted.append(("weights_map.o", "weights_map.cu", ()))
    workers = min(len(wanted), cores())
    say(f"compiling {count_of(len(wanted), 'source')} of the cutlass backend, {workers} at a time; this happens once")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(compile_object, source, Path(folder) / name, defines) for name, source, defines in wanted]
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                job.result()
                say(
                    f"compiled {done} of {count_of(len(jobs), 'source')}, {time.monotonic() - began:.0f} s",
                    progress=True,
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        linked = Path(folder) / path.name
        objects = sorted(str(one) for one in Path(folder).glob("*.o"))
        _run([nvcc, "-shared", "-cudart", "static", *_packaged_libraries(nvcc), "-o", str(linked), *objects])
        linked.replace(path)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} took longer than {COMPILE_TIMEOUT_S:.0f} s: {' '.join(command)}") from None
    said = done.stdout + done.stderr
    if done.returncode:
        last = "\n".join(said.strip().splitlines()[-20:])
        raise BuildError(f"nvcc failed with {done.returncode}: {' '.join(command)}\n{last}")
    return said


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Holds a lock between processes, and says so while it waits."""
    held, began = FileLock(lock), time.monotonic()
    while not held.is_locked:
        try:
            held.acquire(timeout=SAY_EVERY_S)
        except Timeout:
            waited = f"{time.monotonic() - began:.0f} s"
            if time.monotonic() - began > LOCK_TIMEOUT_S:
                why = f"another process holds {lock} since {waited}: it compiles, is stopped or hangs"
                raise BuildError(f"{why}. End it, or wait longer") from None
            say(f"waiting for another process that compiles the cutlass backend, {waited}", progress=True)
    try:
        yield
    finally:
        held.release()


@cache
def _nvcc_says(nvcc: str) -> str:
    try:
        return subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ResourceError(
            "compiler", "nvcc", f"{nvcc}, which fails: {error}", "Set CUDA_HOME to another one."
        ) from None


def _nvidia_folders() -> list[Path]:
    spec = find_spec("nvidia")
    return [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []


def _packaged_includes(nvcc: str) -> list[str]:
    """nvcc of a package brings no headers of the runtime's; they come in packages beside it."""
    if not any(Path(nvcc).is_relative_to(root) for root in _nvidia_folders()):
        return []
    return [part for root in _nvidia_folders() for path in sorted(root.glob("*/include")) for part in ("-I", str(path))]


def _packaged_libraries(nvcc: str) -> list[str]:
    if not any(Path(nvcc).is_relative_to(root) for root in _nvidia_folders()):
        return []
    return [part for root in _nvidia_folders() for path in sorted(root.glob("*/lib")) for part in ("-L", str(path))]


def _version(pattern: str, text: str) -> tuple[int, ...]:
    found = re.search(pattern, text)
    return tuple(map(int, found.groups())) if found else (0,)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
