"""A cost model with what it was calibrated on, and its errors on rows that were held out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from moe_dist.errors import ConfigError
from moe_dist.messages.counts import count_of, verb
from moe_dist.simulate.cost import CostModel, HeldOut, calibrated, held_out
from moe_dist.simulate.measured import Measured, read_measured

RECORDED = Path(__file__).parents[2] / "benchmarks"  # of a checkout
ALIKE = 0.5  # of the settings of the smaller of two files: those that both have, from which on they are one sweep


@dataclass(frozen=True)
class Calibration:
    """`rows` of `files` that were taken, and how many others they have. `held_out`: by what is held out, one value of
    it after the other."""

    model: CostModel
    files: list[str]
    rows: int
    others: int
    held_out: dict[str, HeldOut]

    def as_dict(self) -> dict[str, Any]:
        model = self.model
        return {
            "gpu": model.gpu,
            "files": self.files,
            "rows": self.rows,
            "other_rows": self.others,
            "local_factors": {
                backend: dict(zip(("arithmetic", "weights", "rows"), factors, strict=True))
                for backend, factors in model.local.items()
            },
            "exchanges": {
                name: {"latency_us": link.latency_us, "gbps": link.gbps} for name, link in model.links.items()
            },
            "measured_ranges": {name: list(bounds) for name, bounds in model.ranges.items()},
            "held_out": {name: asdict(found) for name, found in self.held_out.items()},
        }

    def lines(self) -> list[str]:
        """For people."""
        errors = [
            f"other {name} {found.median:.0%} and {found.worst:.0%} ({count_of(found.rows, 'row')})"
            for name, found in self.held_out.items()
            if found.median is not None
        ]
        others = f"{count_of(self.others, 'other row')} {verb(self.others, 'are')} left out"
        of = count_of(len(self.files), "file")
        return [
            f"Calibrated on {count_of(self.rows, 'measured row')} of {of}; {others}.",
            f"Error on held-out rows, median and worst: {', '.join(errors) or 'not known, too few rows'}.",
        ]


def calibration(files: Sequence[str] | None) -> Calibration:
    """None: the recorded files of a checkout. Raises ConfigError where there are none, and as `read_measured` and
    `calibrated`."""
    taken = list(files) if files is not None else sorted(map(str, RECORDED.glob("*x[0-9]*.json")))
    if not taken:
        rule = "no results file is named, and an installed package has none"
        raise ConfigError("calibrate", None, rule, "files of run or compare --out, measured on GPUs")
    rows, others = read_measured(taken)
    held = {name: held_out(rows, fold) for name, fold in folds(rows).items()}
    return Calibration(calibrated(rows), [Path(path).name for path in taken], len(rows), others, held)


def folds(rows: Sequence[Measured]) -> dict[str, Callable[[Measured], Hashable]]:
    """By what rows are held out together."""
    sweep_of = _sweeps(rows)
    return {
        "sweeps": lambda row: sweep_of[row.file],
        "numbers of GPUs": lambda row: row.work.world,
        "numbers of tokens": lambda row: row.tokens_per_rank,
    }


def _sweeps(rows: Sequence[Measured]) -> dict[str, str]:
    """Each file's sweep, by the name of its first file: a file whose twin is known is not predicted."""
    settings: dict[str, set[Hashable]] = {}
    for row in rows:
        of, names = row.work, (row.exchange, row.backend, row.tokens_per_rank)
        settings.setdefault(row.file, set()).add((of.quant, of.hidden, of.width, of.world, *names))
    sweep_of = {file: file for file in settings}
    for one, other in combinations(settings, 2):
        both = len(settings[one] & settings[other])
        if both >= ALIKE * min(len(settings[one]), len(settings[other])):
            joined, gone = sweep_of[one], sweep_of[other]
            sweep_of = {file: joined if sweep == gone else sweep for file, sweep in sweep_of.items()}
    return sweep_of
