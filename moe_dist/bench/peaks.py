"""What one device can do at most, measured on it: what floors are computed with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median

import torch

from moe_dist.bench.clock import time_steps
from moe_dist.comm import Comm
from moe_dist.errors import ConfigError
from moe_dist.files import read_small_text
from moe_dist.messages.printable import one_line
from moe_dist.model.quantization import FP8
from moe_dist.tables import cache_folder
from moe_dist.workloads.streams import Stream

SIZE = 8192  # of the square matrices
COPIED = 2 << 30  # bytes
ITERS, WARM = 20, 5
LARGEST_FILE = 1 << 20


MOST_RATE = 1e36  # of a peak in FLOP/s or bytes/s: beyond it, the file holds something else


@dataclass(frozen=True)
class Peaks:
    """Measured ceilings of one device: dense FP8 and bf16 matmul in FLOP/s, device copy in bytes/s."""

    fp8_flops: float
    bf16_flops: float
    bandwidth: float

    def __str__(self) -> str:
        flops = f"FP8 {self.fp8_flops / 1e12:,.0f} TFLOP/s, bf16 {self.bf16_flops / 1e12:,.0f} TFLOP/s"
        return f"{flops}, copy {self.bandwidth / 1e12:.2f} TB/s"


# Only what was measured on the device itself; a device that is neither here nor measured by its user gets no floor
# rather than a datasheet's. torch._scaled_mm and bf16 matmul of 8192³ and a device-to-device copy, November 2026.
PEAKS = {
    "NVIDIA H200": Peaks(1422e12, 788e12, 4.29e12),
    "NVIDIA H100 80GB HBM3": Peaks(1311e12, 693e12, 3.02e12),
}


def peaks_of(device: str) -> Peaks | None:
    """The recorded ones of such a card, so that floors of one card are the same everywhere; else this user's own."""
    return PEAKS.get(device) or measured().get(device)


def measured() -> dict[str, Peaks]:
    """This user's own, by the device's name. Raises ConfigError for a file that is broken."""
    path = _path()
    return _read(path, path.stat().st_mtime_ns) if path.exists() else {}


def _path() -> Path:
    return cache_folder() / "peaks.json"


@lru_cache(maxsize=4)
def _read(path: Path, _changed_ns: int) -> dict[str, Peaks]:
    legal = "what moe-dist doctor --measure writes; remove the file to measure again"
    try:
        found = {name: Peaks(**given) for name, given in json.loads(read_small_text(path, LARGEST_FILE)).items()}
        wrong = [name for name, peaks in found.items() if not all(map(_positive, vars(peaks).values()))]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        said = one_line(f"can't be read: {type(error).__name__}: {error}")
        raise ConfigError("peaks", str(path), said, legal) from None
    if wrong:
        said = one_line(f"has rates of {wrong[0]} that are no positive numbers")
        raise ConfigError("peaks", str(path), said, legal)
    return found


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < MOST_RATE


def keep(device: str, peaks: Peaks) -> Path:
    """Raises OSError."""
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    found = {name: asdict(each) for name, each in (measured() | {device: peaks}).items()}
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(path)
    return path


def measure_peaks(comm: Comm, size: int = SIZE, copied: int = COPIED) -> Peaks:
    """On the device of `comm`, which is one rank alone: dense random matrices, since zeros cost less power."""
    device = comm.device
    a = Stream("peaks", 0, device=device).normal(size, size)
    b = Stream("peaks", 1, device=device).normal(size, size)
    one = torch.ones((), dtype=torch.float32, device=device)
    a8, b8, a16, b16 = a.to(FP8), b.to(FP8).t(), a.bfloat16(), b.bfloat16()
    source = torch.empty(copied, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    flops = 2.0 * size**3
    return Peaks(
        flops / _seconds(comm, lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)),
        flops / _seconds(comm, lambda: a16 @ b16),
        2.0 * copied / _seconds(comm, lambda: target.copy_(source)),
    )


def _seconds(comm: Comm, step: Callable[[], object]) -> float:
    """The median of single launches."""
    for _ in range(WARM):
        step()
    return median(time_steps(comm, step, ITERS, queued=False)) / 1e6
