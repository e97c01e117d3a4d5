"""What was measured as rows, and the document that they are written in, with its provenance."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import torch

from moe_dist.backends import BACKENDS
from moe_dist.bench.case import Case
from moe_dist.bench.findings import GroupResult
from moe_dist.bench.identity import case_key, code_digest
from moe_dist.bench.roofline import RankWork, balanced_floor_us, floor_us, group_work, of_shared
from moe_dist.bench.row import Document, Failed, Hardware, Notice, Provenance, Refused, Row
from moe_dist.bench.tolerance import within_tolerance
from moe_dist.engine.plan import Plan
from moe_dist.machine.machine import Machine, cores, nvidia_driver
from moe_dist.messages.notices import with_ranks
from moe_dist.model.placement import imbalance
from moe_dist.peers import PEERS
from moe_dist.workloads.skew_names import skew_label
from moe_dist.workloads.token_splits import most_tokens, token_bounds


@dataclass
class Outcome:
    """`refused`: cases of a sweep that can't run, `failed`: those that failed while they ran, each with its reason;
    they are shown, never dropped in silence. `earlier`: the runs that this one resumes."""

    rows: list[Row] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    places: dict[int, list[str]] = field(default_factory=dict)
    notices: dict[str, list[int]] = field(default_factory=dict)  # what ranks had to say, and which of them
    failed: list[Failed] = field(default_factory=list)
    earlier: list[Provenance] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Something ran, nothing failed, and every row is within tolerance."""
        return bool(self.rows) and not self.failed and all(row.ok is not False for row in self.rows)

    @property
    def run(self) -> int:
        """This one's number."""
        return len(self.earlier)

    def put(self, row: Row) -> None:
        """What is known of a case now, instead of what was known before."""
        self.failed = [failed for failed in self.failed if failed.key != row.key]
        place = next((place for place, known in enumerate(self.rows) if known.key == row.key), len(self.rows))
        self.rows[place : place + 1] = [row]

    def fail(self, failed: Failed) -> None:
        """The case loses its row: rounds before a failure prove nothing of it."""
        self.rows = [row for row in self.rows if row.key != failed.key]
        self.failed = [*(known for known in self.failed if known.key != failed.key), failed]

    def add_notices(self, said: dict[str, list[int]]) -> list[str]:
        """Take in what ranks said; a line for each text that is new."""
        new = with_ranks({text: ranks for text, ranks in said.items() if text not in self.notices})
        for text, ranks in said.items():
            self.notices[text] = sorted({*self.notices.get(text, []), *ranks})
        return new


Layer = tuple[list[int], list[int]]  # rows and active experts by rank

ABSOLUTE = re.compile(r"""(?:^|(?<=[=:,\['" ]))/(?!/)(?:[^/,'"\]]*/)*(?=[^/]+$|[^/]+[,'"\]])""")  # up to a file's name
FEWEST_FOR_P99 = 100
FEWEST_ROUNDS = 3  # whose medians say how far the median over all of them would scatter


def make_row(
    case: Case, plan: Plan, found: GroupResult, runtime: str, key: str | None = None, *, run: int = 0, start: int = 0
) -> Row:
    """One measured case; `runtime` is what started its ranks, the rest as in a row. `key`: None to make it now."""
    spec, placement = plan.spec, plan.placement
    steps = [found.by_layer[first : first + case.layers] for first in range(0, len(found.by_layer), case.layers)]
    times = _times(found, case.layers, len(steps))
    pairs = sum(found.rows_per_rank) // placement.tp // len(found.by_layer)
    beside, device = _beside(case, plan), plan.machine.name
    works = [[group_work(spec, placement, *layer, beside) for layer in layers] for layers in steps]

    def floor(of: Callable[[list[RankWork]], float | None]) -> float | None:
        return _middle([_sum([of(layer) for layer in layers]) for layers in works])

    computes = None if case.peer is None else PEERS.get(case.peer)
    backend = BACKENDS.get(plan.backend)
    return Row(
        **_asked(case, plan),
        **vars(found.ran),
        trace_short=found.trace_short,
        runtime=runtime,
        key=key or case_key(case, plan, runtime),
        run=run,
        start=start,
        config=found.config,
        **times,
        floor_us=floor(lambda layer: floor_us(spec, layer, device)),
        balanced_floor_us=floor(lambda layer: balanced_floor_us(spec, placement, layer, device)),
        **_finite(found.errors),
        active_experts=found.active_experts,
        imbalance=quantile([_imbalance([rows for rows, _ in layers]) for layers in steps], 0.5) or 1.0,
        rows_per_rank=tuple(found.rows_per_rank),
        pairs=pairs,
        bytes_sent=found.bytes_sent,
        max_memory=found.max_memory,
        chosen_by=case.chosen_by,
        why=plan.choice().why or None,
        **_rates(works, None if computes else found.bytes_sent, times["p50_us"]),
        ok=within_tolerance(
            found.errors,
            spec,
            computes.numerics if computes else backend.numerics_of(spec),
            pairs=pairs,
            combine_dtype=found.ran.combine_dtype,
            deterministic=(computes or backend).deterministic,
        ),
    )


def _asked(case: Case, plan: Plan) -> dict[str, Any]:
    """The columns that say what was to be measured."""
    spec, placement, work = plan.spec, plan.placement, case.workload
    sharded = plan.token_layout == "sharded"
    return {
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
        "layer": "whole" if case.layers == 1 else f"stack:{case.layers}",
        "global_tokens": work.tokens,
        "tokens_per_rank": most_tokens(work.tokens, placement.world, work.token_split, work.seed)
        if sharded
        else work.tokens,
        "token_split": work.token_split,
        "skew": skew_label(work.skew, work.trace),
        "seed": work.seed,
    }


def _beside(case: Case, plan: Plan) -> list[RankWork]:
    """The shared expert's work, by rank."""
    world, work = plan.placement.world, case.workload
    own = [work.tokens] * world
    if plan.token_layout == "sharded":
        own = [stop - start for start, stop in token_bounds(work.tokens, world, work.token_split, work.seed)]
    return of_shared(plan.spec, plan.parallel, work.tokens, own)


def _times(found: GroupResult, layers: int, routings: int) -> dict[str, Any]:
    """The columns of times. `layers` of a step; `routings` that steps take in turn."""
    times = [time for round_us in found.rounds_us for time in round_us]
    p50, medians = quantile(times, 0.5), [p for each in found.rounds_us if (p := quantile(each, 0.5)) is not None]
    return {
        "iters": len(times),
        "p50_us": p50,
        "p99_us": quantile(times, 0.99) if len(times) >= FEWEST_FOR_P99 else None,
        "chained_us": found.chained_us,
        "chained_steps": found.chained_steps,
        "clock_us": found.clock_us,
        "per_layer_us": None if p50 is None else p50 / layers,
        "round_p50_us": tuple(medians),
        "scatter_us": stdev(medians) / len(medians) ** 0.5 if len(medians) >= FEWEST_ROUNDS else None,
        "routing_p50_us": _by_routing(times, routings),
        "stages_us": {name: round(value, 1) for name, value in found.stages_us.items()},
        "unstaged_us": None if found.unstaged_us is None else round(found.unstaged_us, 1),
    }


def _finite(errors: dict[str, float | None]) -> dict[str, Any]:
    """JSON has no infinity. An error that is none is null and is named, so that it can't pass for one that was not
    measured."""
    lost = tuple(name for name, error in errors.items() if error is not None and not isfinite(error))
    return errors | dict.fromkeys(lost) | {"not_finite": lost}


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _middle(values: list[float | None]) -> float | None:
    """Of the routings that steps take in turn, as p50_us is of their times; None where one is not known."""
    known = [value for value in values if value is not None]
    return quantile(known, 0.5) if len(known) == len(values) else None


def _by_routing(times: list[float], routings: int) -> tuple[float, ...]:
    """The median of each routing's iterations, which take them in turn."""
    found = [quantile(times[first::routings], 0.5) for first in range(routings)] if routings > 1 else []
    return tuple(median for median in found if median is not None)


def _imbalance(by_layer: list[list[int]]) -> float:
    """The layers' mean, each with the weight of its rows: they wait for one another's busiest rank."""
    total = sum(map(sum, by_layer))
    return sum(imbalance(rows) * sum(rows) for rows in by_layer) / total if total else 1.0


def _rates(works: list[list[list[RankWork]]], bytes_sent: int | None, p50: float | None) -> dict[str, Any]:
    """What the busiest rank achieved over the whole step: arithmetic, weight traffic, bytes sent (None: not counted).
    `works`: of each routing, of its layers, by rank."""
    if not p50:
        return {"tflops": None, "hbm_gbps": None, "link_gbps": None}

    def busiest(of: Callable[[RankWork], float]) -> float:
        return quantile([sum(max(map(of, layer)) for layer in layers) for layers in works], 0.5) or 0.0

    return {
        "tflops": busiest(lambda work: work.flops) / p50 / 1e6,
        "hbm_gbps": busiest(lambda work: work.weight_bytes) / p50 / 1e3,
        "link_gbps": None if bytes_sent is None else bytes_sent / p50 / 1e3,
    }


def quantile(values: list[float], q: float) -> float | None:
    """One of the values: the least that a share of `q` does not exceed."""
    return float(np.quantile(values, q, method="inverted_cdf")) if values else None


def provenance(machine: Machine) -> Provenance:
    """Date, commit, command and machine, of now and here."""
    gpu = machine.device == "cuda"
    driver = nvidia_driver() if gpu else None
    return Provenance(
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=commit(),
        code=code_digest(),
        command=" ".join([_program(), *map(_without_folder, sys.argv[1:])]),
        machine=Hardware(
            gpu=machine.name if gpu else None,
            cpu=None if gpu else machine.name,
            cores=cores(),
            count=machine.devices,
            driver=driver.version if driver else None,
            python=platform.python_version(),
            torch=str(torch.__version__),
            triton=_version("triton"),
            nccl=".".join(map(str, torch.cuda.nccl.version())) if gpu and torch.cuda.is_available() else None,
            flashinfer=_version("flashinfer-python"),
            deep_gemm=_version("sgl-deep-gemm"),
        ),
    )


def _program() -> str:
    """What was started, as one would type it in the repository: the command itself, or a script of ours."""
    path = Path(sys.argv[0])
    return f"{path.parent.name}/{path.name}" if path.parent.name in ("benchmarks", "examples") else "moe-dist"


def _without_folder(argument: str) -> str:
    """An absolute path says more about one machine than about the measurement; it may stand behind a key, behind
    `file:` or `map:`, and in a list."""
    before, equals, value = argument.rpartition("=")
    if Path(value).is_absolute():
        return before + equals + Path(value).name
    return ABSOLUTE.sub("", argument)


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


def results_document(about: Provenance, outcome: Outcome) -> dict[str, Any]:
    """What a results file holds (row.Document), fit for JSON."""
    document = Document(
        **dict(about),
        runs=(*outcome.earlier, about),
        ranks={world: tuple(lines) for world, lines in outcome.places.items()},
        notices=tuple(Notice(text=text, ranks=tuple(ranks)) for text, ranks in outcome.notices.items()),
        rows=tuple(outcome.rows),
        refused=tuple(outcome.refused),
        failed=tuple(outcome.failed),
    )
    return document.model_dump(mode="json")
