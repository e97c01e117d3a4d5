"""The one form in which everything measured is written, with its provenance."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import torch

from moe_dist.backends import BACKENDS
from moe_dist.bench.case import Case
from moe_dist.bench.roofline import floor_us, rank_flops, rank_weight_bytes
from moe_dist.engine.plan import Plan
from moe_dist.machine.machine import Machine, cores, nvidia_driver
from moe_dist.model.placement import imbalance
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import MoESpec
from moe_dist.oracle.numerics import Numerics
from moe_dist.workloads.skews import skew_label

Row = dict[str, Any]


@dataclass
class Outcome:
    """`refused`: cases of a sweep that can't run, each with its reason; they are shown, never dropped in silence."""

    rows: list[Row] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    places: dict[int, list[str]] = field(default_factory=dict)
    notices: dict[str, list[int]] = field(default_factory=dict)  # what ranks had to say, and which of them

    @property
    def ok(self) -> bool:
        """Something ran and every row is within tolerance."""
        return bool(self.rows) and all(row["ok"] is not False for row in self.rows)

    def add_notices(self, said: dict[str, list[int]]) -> list[str]:
        """Take in what ranks said; a line for each text that is new."""
        new = [f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in said.items() if text not in self.notices]
        for text, ranks in said.items():
            self.notices[text] = sorted({*self.notices.get(text, []), *ranks})
        return new


# Relative L2 error against the exact float32 layer on dequantized weights: the cost of quantizing. One scale for a
# whole tensor costs more than one per group. Against the oracle, see reference.Numerics.
EXACT_TOLERANCE = {
    "none": 5e-3,
    "fp8_block": 5e-2,
    "fp8_channel": 5e-2,
    "fp8_tensor_static": 6e-2,
    "fp8_tensor_dynamic": 6e-2,
}
FP32_TOLERANCE = 1e-5  # nothing rounds but the order of sums
FP32_TOKEN_TOLERANCE = 1e-3
REPEAT_TOLERANCE = 1e-3  # of a later output against the first, where the backend gives equal bits in every run
WHOLE_TOLERANCE = 1e-4  # both sides are exact, in float32 and float64; one wrong column of one slice costs more
FEWEST_FOR_P99 = 100
FEWEST_ROUNDS = 3  # whose medians say how far the median over all of them would scatter


def make_row(case: Case, plan: Plan, merged: dict[str, Any], runtime: str) -> Row:
    """One measured case. Its labels are what the ranks say that they ran. Times, rows, bytes, rates and the floor are
    those of the whole step, `per_layer_us` and `pairs` those of one layer."""
    spec, placement, work = plan.spec, plan.placement, case.workload
    rounds, rows = merged["rounds_us"], merged["rows_per_rank"]
    times = [time for round_us in rounds for time in round_us]
    p50, medians = quantile(times, 0.5), [middle for each in rounds if (middle := quantile(each, 0.5)) is not None]
    sharded, by_layer = plan.token_layout == "sharded", merged["by_layer"]
    floors = [floor_us(spec, placement, here, active, plan.machine.name) for here, active in by_layer]
    row: Row = {
        "model": spec.name,
        "source": case.source.label,
        "hidden": spec.hidden,
        "intermediate": spec.intermediate,
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "activation": spec.activation,
        "shared_experts": spec.shared_experts,
        "quant": spec.quant_label,
        "tp": placement.tp,
        "ep": placement.ep,
        "world": placement.world,
        **merged["ran"],
        "layer": "whole" if case.layers == 1 else f"stack:{case.layers}",
        "global_tokens": work.tokens,
        "tokens_per_rank": cdiv(work.tokens, placement.world) if sharded else work.tokens,
        "skew": skew_label(work.skew, work.trace),
        "seed": work.seed,
        "iters": len(times),
        "runtime": runtime,
        "config": merged["config"],
        "p50_us": p50,
        "p99_us": quantile(times, 0.99) if len(times) >= FEWEST_FOR_P99 else None,
        "per_layer_us": None if p50 is None else p50 / case.layers,
        "round_p50_us": medians,
        "scatter_us": stdev(medians) / len(medians) ** 0.5 if len(medians) >= FEWEST_ROUNDS else None,
        "floor_us": _sum(floors),
        "err_oracle": merged["err_oracle"],
        "err_exact": merged["err_exact"],
        "err_whole": merged["err_whole"],
        "err_token": merged["err_token"],
        "err_repeat": merged["err_repeat"],
        "err_again": merged["err_again"],
        "active_experts": merged["active_experts"],
        "imbalance": _imbalance([rows for rows, _ in by_layer]),
        "rows_per_rank": rows,
        "pairs": sum(rows) // placement.tp // case.layers,
        "bytes_sent": merged["bytes_sent"],
        "stages_us": {name: round(value, 1) for name, value in merged["stages_us"].items()},
        "max_memory": merged["max_memory"],
        "chosen_by": case.chosen_by,
    }
    numerics = BACKENDS.get(plan.backend).numerics_of(spec)
    deterministic = BACKENDS.get(plan.backend).deterministic
    return row | _rates(plan, merged, p50) | {"ok": within_tolerance(row, spec, numerics, deterministic)}


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _imbalance(by_layer: list[list[int]]) -> float:
    """The layers' mean, each with the weight of its rows: they wait for one another's busiest rank."""
    total = sum(map(sum, by_layer))
    return sum(imbalance(rows) * sum(rows) for rows in by_layer) / total if total else 1.0


def _rates(plan: Plan, merged: dict[str, Any], p50: float | None) -> Row:
    """What the busiest rank achieved over the whole step: arithmetic, weight traffic, bytes sent."""
    if not p50:
        return {"tflops": None, "hbm_gbps": None, "link_gbps": None}
    placement, spec = plan.placement, plan.spec
    ranks = range(placement.world)
    flops = weights = 0.0
    for rows, active in merged["by_layer"]:
        flops += max(rank_flops(spec, placement, rank, rows[rank]) for rank in ranks)
        weights += max(rank_weight_bytes(spec, placement, rank, active[rank]) for rank in ranks)
    return {
        "tflops": flops / p50 / 1e6,
        "hbm_gbps": weights / p50 / 1e3,
        "link_gbps": merged["bytes_sent"] / p50 / 1e3,
    }


def within_tolerance(row: Row, spec: MoESpec, numerics: Numerics, deterministic: bool) -> bool | None:
    """Whether the row's errors are allowed; None if it was not checked. `deterministic`: the backend gives equal bits
    for equal inputs."""
    if row["quant"] == row["combine_dtype"] == "fp32":
        oracle, exact, token = FP32_TOLERANCE, FP32_TOLERANCE, FP32_TOKEN_TOLERANCE
    else:
        most = numerics.tolerance, EXACT_TOLERANCE[spec.quant], numerics.token_tolerance
        oracle, exact, token = (margin(spec, row["pairs"]) * each for each in most)
    # Two outputs of other bits may both be off by what one may be.
    later = {"err_repeat": REPEAT_TOLERANCE if deterministic else 2 * token, "err_again": 2 * token}
    if any(row[name] is not None and not row[name] <= most for name, most in later.items()):
        return False
    if row["err_oracle"] is None:
        return None
    allowed = {"err_oracle": oracle, "err_exact": exact, "err_whole": WHOLE_TOLERANCE, "err_token": token}
    return all(row[name] <= most for name, most in allowed.items())


def margin(spec: MoESpec, pairs: int) -> float:
    """By how much the tolerances are wider for so many (token, expert) pairs.

    An error is a mean over the numbers that were rounded. The mean is at some 0.8 of the tolerance and scatters as
    1/sqrt(N), with a longer tail where N is small. A token's pairs share its row, so N counts tokens times the narrower
    of the two GEMMs' inputs. No right layer of 77,000 random ones came nearer than 5 %, with sizes from 16 to 256 and 1
    to 16 tokens. From N = 6,900 on there is no margin.
    """
    numbers = max(1, cdiv(pairs, spec.top_k)) * min(spec.hidden, spec.intermediate)
    return max(1.0, 0.9 + 8 / math.sqrt(numbers) + 64 / numbers)


def quantile(values: list[float], q: float) -> float | None:
    """One of the values: the least that a share of `q` does not exceed."""
    return float(np.quantile(values, q, method="inverted_cdf")) if values else None


def provenance(machine: Machine) -> dict[str, Any]:
    """Date, commit, command and machine, as every results file carries them."""
    gpu = machine.device == "cuda"
    driver = nvidia_driver() if gpu else None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "command": " ".join([_program(), *map(_without_folder, sys.argv[1:])]),
        "machine": {
            "gpu": machine.name if gpu else None,
            "cpu": None if gpu else machine.name,
            "cores": cores(),
            "count": machine.devices,
            "driver": driver.version if driver else None,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "triton": _version("triton"),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else None,
            "flashinfer": _version("flashinfer-python"),
            "deep_gemm": _version("sgl-deep-gemm"),
        },
    }


def _program() -> str:
    """What was started, as one would type it in the repository: the command itself, or a script of benchmarks/."""
    path = Path(sys.argv[0])
    return f"{path.parent.name}/{path.name}" if path.parent.name == "benchmarks" else "moe-dist"


def _without_folder(argument: str) -> str:
    """An absolute path says more about one machine than about the measurement; it may stand behind a key."""
    before, equals, value = argument.rpartition("=")
    return before + equals + (Path(value).name if Path(value).is_absolute() else value)


def commit() -> str:
    """The commit of the code that runs, with +changes if files differ from it; from MOE_DIST_COMMIT where a Ray job
    runs in a copy without its history."""
    if given := os.environ.get("MOE_DIST_COMMIT"):
        return given
    here = Path(__file__).parent
    head = _git(here, "rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _finite(value: Any) -> Any:
    """JSON has no infinity: an error that is none becomes null, and the row's `ok` says that it failed."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def results_document(about: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
    """What a results file holds, fit for JSON. `about`: see `provenance`. `ranks`: by world size, each rank's device,
    GPU UUID and process."""
    ranks = {str(world): lines for world, lines in outcome.places.items()}
    notices = [{"text": text, "ranks": ranks} for text, ranks in outcome.notices.items()]
    document: dict[str, Any] = _finite(
        {**about, "ranks": ranks, "notices": notices, "rows": outcome.rows, "refused": outcome.refused}
    )
    return document
