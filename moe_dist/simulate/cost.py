"""The cost model: a step's time as a sum of work at peak rates times fitted factors, and of bytes over bandwidths."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from moe_dist.bench.peaks import PEAKS, Peaks
from moe_dist.engine.ties import explained_us
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.messages.counts import count_of
from moe_dist.model.spec import MoESpec
from moe_dist.simulate.measured import Measured
from moe_dist.simulate.work import Work

FEWEST_ROWS = 20  # to calibrate on
RANGES = {
    "world": "ranks", "hidden": "hidden", "width": "columns of a slice", "active": "active experts on a rank",
    "pairs": "pairs on a rank", "sent_bytes": "bytes sent by a rank",
}  # fmt: skip


@dataclass(frozen=True)
class Link:
    """An exchange as it was measured on one host: µs of a step without any bytes, and µs for each byte that a rank
    sends."""

    latency_us: float
    byte_us: float

    @property
    def gbps(self) -> float | None:
        """GB/s; None where bytes were found to cost nothing."""
        return 1e-3 / self.byte_us if self.byte_us else None


@dataclass(frozen=True)
class CostModel:
    """`local[backend]`: factors on arithmetic, weights and rows at peak rates. `ranges`: the least and the most of each
    number of `RANGES` that was measured. `scatter`: the difference of two steps, as a part of one, that scatter
    explains (engine.ties, with the median scatter of the rows). `kinds`: format and whether experts are gated."""

    gpu: str
    peaks: Peaks
    local: Mapping[str, tuple[float, float, float]]
    links: Mapping[str, Link]
    ranges: Mapping[str, tuple[float, float]]
    kinds: frozenset[tuple[str, bool]]
    scatter: float

    def local_us(self, backend: str, work: Work) -> float:
        """Of the busiest rank. Raises UnsupportedError for what no measured row says anything of."""
        if backend not in self.local:
            raise UnsupportedError(f"a prediction of backend {backend}", ["no row was measured with it"], [*self.local])
        if (work.quant, work.gated) not in self.kinds:
            known = [f"{quant} {'with' if gated else 'without'} gate" for quant, gated in sorted(self.kinds)]
            kind = f"{work.quant} {'with' if work.gated else 'without'} gate"
            raise UnsupportedError(f"a prediction of {kind}", ["no row was measured with it"], known)
        times = work.at_peak_us(self.peaks)
        return sum(factor * us for factor, us in zip(self.local[backend], times, strict=True))

    def link(self, exchange: str) -> Link:
        """Raises UnsupportedError for an exchange that no measured row has."""
        if exchange not in self.links:
            known = [*self.links]
            raise UnsupportedError(f"a prediction of exchange {exchange}", ["no row was measured with it"], known)
        return self.links[exchange]

    def knows(self, row: Measured) -> bool:
        """Whether it can predict this row's step."""
        kind = row.work.quant, row.work.gated
        return row.backend in self.local and row.exchange in self.links and kind in self.kinds

    def step_us(self, exchange: str, backend: str, work: Work) -> float:
        """On one host."""
        link = self.link(exchange)
        return self.local_us(backend, work) + link.latency_us + link.byte_us * work.sent_bytes

    def beyond(self, work: Work) -> list[str]:
        """Which of the step's numbers lie outside of what was measured, each with that range."""
        found = []
        for name, text in RANGES.items():
            value, (least, most) = getattr(work, name), self.ranges[name]
            if not least <= value <= most:
                found.append(f"{value:,.0f} {text} (measured: {least:,.0f} to {most:,.0f})")
        return found


def left_out(spec: MoESpec) -> list[str]:
    """What a step has that the model knows nothing of, as `CostModel.beyond` says it."""
    if spec.shared_experts == "none":
        return []
    return ["a shared expert, whose time is left out (measured: none)"]


def calibrated(rows: Sequence[Measured]) -> CostModel:
    """Least squares of relative errors. A factor that would be negative is zero, and the others are fitted again.
    Raises ConfigError for rows of several GPUs and for too few of them."""
    gpus = sorted({row.gpu for row in rows})
    if len(gpus) != 1 or len(rows) < FEWEST_ROWS:
        rule = f"a model takes {FEWEST_ROWS} rows of whole layers in a CUDA graph on one kind of GPU with known peaks"
        raise ConfigError(
            "calibrate", f"{count_of(len(rows), 'row')} on {gpus or 'none'}", rule, f"rows on {', '.join(PEAKS)}"
        )
    peaks = PEAKS[gpus[0]]
    backends, exchanges = (sorted({getattr(row, name) for row in rows}) for name in ("backend", "exchange"))
    A = np.array([_columns(row, backends, exchanges, peaks) for row in rows])
    found = _least_squares(A, np.array([row.p50_us for row in rows])).tolist()
    links = found[3 * len(backends) :]
    scatters = [row.scatter_us / row.p50_us for row in rows if row.scatter_us is not None]
    typical = median(scatters) if scatters else 0.0
    return CostModel(
        gpu=gpus[0],
        peaks=peaks,
        local={name: tuple(found[3 * place : 3 * place + 3]) for place, name in enumerate(backends)},
        links={name: Link(*links[2 * place : 2 * place + 2]) for place, name in enumerate(exchanges)},
        ranges={
            name: (min(values), max(values)) for name in RANGES if (values := [getattr(row.work, name) for row in rows])
        },
        kinds=frozenset((row.work.quant, row.work.gated) for row in rows),
        scatter=explained_us((1.0, 1.0), (typical, typical)),
    )


def _columns(row: Measured, backends: Sequence[str], exchanges: Sequence[str], peaks: Peaks) -> list[float]:
    own = row.work.at_peak_us(peaks)
    local = [us if row.backend == backend else 0.0 for backend in backends for us in own]
    sent = (1.0, row.work.sent_bytes)
    return local + [value if row.exchange == exchange else 0.0 for exchange in exchanges for value in sent]


def _least_squares(A: np.ndarray, times: np.ndarray) -> np.ndarray:
    relative = A / times[:, None]
    size = np.maximum(np.abs(relative).max(0), np.finfo(float).tiny)  # bytes and microseconds alike
    kept, found = np.ones(A.shape[1], bool), np.zeros(A.shape[1])
    while True:
        found[:] = 0.0
        found[kept] = np.linalg.lstsq(relative[:, kept] / size[kept], np.ones(len(A)), rcond=None)[0]
        if found.min() >= 0:
            return np.asarray(found / size)
        kept[found.argmin()] = False


@dataclass(frozen=True)
class HeldOut:
    """Relative errors of `rows` rows that the model was not calibrated on; None where there are none. `unknown`: how
    many more there are, whose exchange, backend or format no other fold has."""

    rows: int
    unknown: int
    median: float | None
    worst: float | None


def held_out(rows: Sequence[Measured], fold: Callable[[Measured], Hashable]) -> HeldOut:
    """Each fold is predicted by a model that is calibrated on all others."""
    errors: list[float] = []
    unknown = 0
    for name in dict.fromkeys(map(fold, rows)):
        others = [row for row in rows if fold(row) != name]
        held = [row for row in rows if fold(row) == name]
        model = calibrated(others) if len(others) >= FEWEST_ROWS else None
        for row in held:
            if model is not None and model.knows(row):
                errors.append(abs(model.step_us(row.exchange, row.backend, row.work) / row.p50_us - 1))
            else:
                unknown += 1
    return HeldOut(len(errors), unknown, median(errors) if errors else None, max(errors, default=None))
