"""Which of a backend's configs is fastest on one rank's shard: each tried quickly, the best ones carefully, and none is
taken that does not agree with the oracle. One process, one device, no process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count, islice
from math import inf
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from moe_dist.backends import BACKENDS, Backend, Problem
from moe_dist.bench.case import Case
from moe_dist.bench.clock import time_steps
from moe_dist.bench.peaks import peaks_of
from moe_dist.bench.results import provenance
from moe_dist.bench.roofline import rank_floor_us, rank_work
from moe_dist.bench.tolerance import margin
from moe_dist.comm import Comm
from moe_dist.engine.graph import capture
from moe_dist.engine.plan import Part, Plan
from moe_dist.errors import ResourceError, UnsupportedError
from moe_dist.kernels import quantize_rows
from moe_dist.machine.machine import Machine
from moe_dist.messages.counts import count_of
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.weights import ExpertWeights, shard_from
from moe_dist.oracle.reference import ScaledBy, oracle_partial, relative_error
from moe_dist.step import Step, TokenRows, workspace_of
from moe_dist.tables import Entry, TuningTable
from moe_dist.workloads.random_weights import random_expert
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

Config = dict[str, Any]
Shown = Callable[[str], None]

# A graph of several forwards: one launch for all. Each has a routing of its own, so that few rows don't find the same
# experts' weights in the cache again.
FORWARDS = 4
QUICK, CAREFUL = 5, 30  # timed replays of a candidate, and of a finalist with each seed
FINALISTS = 3


@dataclass(frozen=True)
class Sample:
    """One seed's inputs for every forward of a timed step, and what the first of them must give: the oracle's word for
    the first seed, the default config's, which agreed with it there, for the others. The oracle takes seconds."""

    rows: tuple[TokenRows, ...]
    expected_RH: Tensor
    tolerance: float
    floor_us: float | None
    dtype: torch.dtype  # of the partial sums


@dataclass
class Found:
    """What came of one number of rows. `raised` and `wrong` count configs that could not run and configs that were off
    the oracle, `reason` says it of the first. `entry` None: that was the default, so nothing may be written."""

    rows: int
    entry: Entry | None = None
    reason: str = ""
    tried: int = 0
    raised: int = 0
    wrong: int = 0


@dataclass
class Tuned:
    """`table` None: for no number of rows was anything found."""

    part: Part
    found: list[Found] = field(default_factory=list)
    table: TuningTable | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"shape": asdict(self.part.shape), "found": [asdict(found) for found in self.found]}


def check_tunable(case: Case, machine: Machine, buckets: list[int]) -> None:
    """Before anything is planned: raises UnsupportedError for a backend without any choice, ResourceError where only
    the GPU is missing."""
    backend, placement = BACKENDS.get(case.backend), Placement.build(case.model, case.parallel)
    width, experts = placement.width_of(0), len(placement.experts_of(0))
    problem = Problem(case.model, width, experts, machine.device, machine.capability, "none")
    if not any(backend.candidates(problem, rows) for rows in buckets):
        raise UnsupportedError(f"tuning backend {case.backend}", ["it has nothing to tune"])
    available = backend.available(machine.device)
    if machine.device != "cuda" and not available.ok:
        raise ResourceError("CUDA devices", 1, 0, f"Backend {case.backend}: {available.reason}.")


def count_steps(plan: Plan, buckets: list[int]) -> int:
    """How often `tune_shape` will call `step` for all of the plan's parts."""
    wanted = wanted_configs(BACKENDS.get(plan.backend), plan.parts(), buckets)
    return len(wanted) + len(plan.parts()) * len(buckets)


def compile_ahead(plan: Plan, buckets: list[int], shown: Shown) -> None:
    """All configs of all the plan's parts, before the first is timed."""
    backend = BACKENDS.get(plan.backend)
    wanted = wanted_configs(backend, plan.parts(), buckets)
    for done in backend.compile_ahead(wanted):
        shown(f"{plan.spec.name}: compiled {done} of {len(wanted)}")


def wanted_configs(backend: type[Backend], parts: list[Part], buckets: list[int]) -> list[tuple[Problem, int, Config]]:
    """All that tuning these parts will run."""
    return [
        (part.problem, rows, config)
        for part in parts
        for rows in buckets
        for config in _configs(backend, part.problem, rows)
    ]


def tune_shape(
    plan: Plan, part: Part, buckets: list[int], seeds: int, weights_seed: int, shown: Shown, step: Callable[[], None]
) -> Tuned:
    """The best config of `plan.backend` for each of `buckets` rows entering the part's rank, out of random weights and
    uniform routing over all of the layer's experts."""
    shard = _random_shard(part, weights_seed, torch.device(plan.machine.device), shown)
    backend = BACKENDS.get(plan.backend)(part.problem)
    backend.prepare(shard)
    tuned = Tuned(part)
    for rows in buckets:
        search = _Search(backend, part, rows, shown, step)
        shown(f"{search.label}: inputs and the oracle")
        sample = partial(draw_sample, plan, part, shard, backend, rows)
        search.run(sample(0), lambda sample=sample: [sample(seed) for seed in range(1, seeds)])  # type: ignore[misc]
        tuned.found.append(search.found)
    backend.use_config(None)
    entries = {found.rows: found.entry for found in tuned.found if found.entry is not None}
    if entries:
        about = provenance(plan.machine).model_dump(include={"date", "commit", "command", "machine"})
        tuned.table = TuningTable(shape=part.shape, revision=backend.table_revision, entries=entries, **about)
    return tuned


def _configs(backend: type[Backend], problem: Problem, rows: int) -> list[Config]:
    """The default, then every candidate that is another one."""
    default = backend.default_config(problem, rows)
    return [default, *[config for config in backend.candidates(problem, rows) if config != default]]


def _random_shard(part: Part, seed: int, device: torch.device, shown: Shown) -> ExpertWeights:
    total, done = part.shape.experts, 0

    def seen() -> None:
        nonlocal done
        done += 1
        shown(f"{part.problem.spec.name}: expert {done} of {total}")

    return shard_from(
        lambda expert: random_expert(part.problem.spec, expert, seed, device), part.placement, part.rank, seen
    )


def draw_sample(plan: Plan, part: Part, shard: ExpertWeights, backend: Backend, rows: int, seed: int) -> Sample:
    spec, placement, rank, device = part.problem.spec, part.placement, part.rank, shard.device
    x_RH = Stream("tuning rows", rows, seed, device=device).normal(rows, spec.hidden).to(spec.torch_dtype)
    x = quantize_rows(x_RH, spec.quant, shard.a13) if plan.payload == "fp8" else x_RH
    drawn = list(islice(_routings(part, rows, seed, device), FORWARDS))
    first, slots_RK = drawn[0]
    groups_RK = placement.serving_groups(first.ids_TK, torch.arange(rows, device=device), None)
    numerics = backend.numerics
    token_rows = tuple(TokenRows(x, slots, routing.weights_TK) for routing, slots in drawn)
    if seed == 0:
        scaled_by: ScaledBy = "all" if plan.payload == "fp8" else "computed"
        whole, alone = [(0, rows)], spec.with_changes(weights_on_input=False)  # rows as a layer hands them to a backend
        expected_RH = oracle_partial(x_RH, first, shard, alone, placement, rank, whole, groups_RK, numerics, scaled_by)
    else:
        backend.use_config(backend.default_config(part.problem, rows))
        expected_RH = backend.forward_alone(token_rows[0], plan.out_dtype).float()
    return Sample(
        rows=token_rows,
        expected_RH=expected_RH,
        tolerance=numerics.tolerance * margin(spec, int((slots_RK >= 0).sum())),
        floor_us=_floor(part, [slots for _, slots in drawn]),
        dtype=plan.out_dtype,
    )


def _routings(part: Part, rows: int, seed: int, device: torch.device) -> Iterator[tuple[Routing, Tensor]]:
    """Uniform routings and the slots of this rank. One that leaves it without any work says nothing: the next, then."""
    for number in count():
        routing = synthetic_routing(part.problem.spec, rows, "uniform", seed, number).to(device)
        slots_RK = part.placement.slots_on(part.rank, routing.ids_TK)
        if bool((slots_RK >= 0).any()):
            yield routing, slots_RK


def _floor(part: Part, drawn: list[Tensor]) -> float | None:
    """The mean over routings; None for a device without measured peaks."""
    peaks = peaks_of(part.shape.device)
    if peaks is None:
        return None
    floors = []
    for slots_RK in drawn:
        here = slots_RK[slots_RK >= 0]
        active = int(here.unique().numel())
        spec = part.problem.spec
        floors.append(rank_floor_us(spec, rank_work(spec, part.placement, part.rank, len(here), active), peaks))
    return mean(floors)


class _Search:
    """For one number of rows. Configs go by their index; the default is number 0."""

    def __init__(self, backend: Backend, part: Part, rows: int, shown: Shown, step: Callable[[], None]) -> None:
        self._backend, self._shown, self._step = backend, shown, step
        self._configs = _configs(type(backend), part.problem, rows)
        self.label = f"{part.problem.spec.name} I{part.shape.width} E{part.shape.experts}, {count_of(rows, 'row')}"
        self.found = Found(rows, tried=len(self._configs))

    def run(self, first: Sample, others: Callable[[], list[Sample]]) -> None:
        """A default that is wrong ends it: what runs without a table must be right first."""
        error = self._error(0, [first])
        if error is None:
            return
        samples = [first, *others()]
        finalists = {0: error}
        for index in self._quickly(first):
            if len(finalists) > FINALISTS:
                break
            error = None if index in finalists else self._error(index, samples)
            if error is not None:
                finalists[index] = error
        self._carefully(samples, finalists)

    def _quickly(self, sample: Sample) -> list[int]:
        """Those that run, the fastest first."""
        times: dict[int, float] = {}
        for index in range(len(self._configs)):
            best = f", best so far {min(times.values()):,.1f} µs" if times else ""
            self._shown(f"{self.label}: candidate {index + 1} of {len(self._configs)}{best}")
            us = self._attempt(index, sample, partial(forward_us, iters=QUICK))
            if us is not None:
                times[index] = us
            self._step()
        return sorted(times, key=times.__getitem__)

    def _carefully(self, samples: list[Sample], finalists: dict[int, float]) -> None:
        """Seed by seed, so that a drift of the clocks meets all finalists alike."""
        self._shown(f"{self.label}: the {len(finalists)} best, carefully")
        times: dict[int, list[float]] = {index: [] for index in finalists}
        for sample in samples:
            for index in finalists:
                us = self._attempt(index, sample, partial(forward_us, iters=CAREFUL))
                times[index].append(inf if us is None else us)
        us_of = {index: median(found) for index, found in times.items()}
        winner = min(us_of, key=us_of.__getitem__)
        floors = [sample.floor_us for sample in samples if sample.floor_us is not None]
        self.found.entry = Entry(
            config=self._configs[winner],
            us=round(us_of[winner], 2),
            floor_us=round(median(floors), 2) if floors else None,
            default_us=round(us_of[0], 2),
            err_oracle=float(f"{finalists[winner]:.2e}"),
        )
        self._step()

    def _error(self, index: int, samples: list[Sample]) -> float | None:
        """The largest relative L2 error over the seeds; None if one is out of tolerance, or not finite."""
        worst = 0.0
        for sample in samples:
            error = self._attempt(index, sample, _distance)
            if error is None:
                return None
            if error > sample.tolerance:
                self.found.wrong += 1
                self._passed_over(index, f"is off the oracle by {error:.1e}, {sample.tolerance:.1e} is allowed")
                return None
            worst = max(worst, error)
        return worst

    def _attempt(self, index: int, sample: Sample, measured: Callable[[Backend, Sample], float]) -> float | None:
        """None for a config that can't run: it may need more registers or shared memory than there is."""
        try:
            self._backend.use_config(self._configs[index])
            return measured(self._backend, sample)
        except Exception as error:
            self.found.raised += 1
            self._passed_over(index, f"raises {type(error).__name__}: {error}".splitlines()[0])
            return None

    def _passed_over(self, index: int, why: str) -> None:
        name = config_text(self._configs[index]) if index else "the default config"
        self.found.reason = self.found.reason or f"{name} {why}"


def config_text(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


def _distance(backend: Backend, sample: Sample) -> float:
    return relative_error(backend.forward_alone(sample.rows[0], sample.dtype), sample.expected_RH)


def forward_us(backend: Backend, sample: Sample, iters: int) -> float:
    """Microseconds of one forward with the config in use: the median over `iters` steps of all the sample's forwards,
    as one CUDA graph where that can be captured."""

    def forwards() -> None:
        for rows in sample.rows:
            backend.forward_alone(rows, sample.dtype)

    def warm_up() -> None:
        backend.tune(Step(workspace_of(sample.expected_RH.device)), sample.rows[0])
        forwards()

    return calls_us(forwards, warm_up, len(sample.rows), sample.expected_RH.device, iters, backend.capturable)


def calls_us(
    calls: Callable[[], None],
    warm_up: Callable[[], None],
    count: int,
    device: torch.device,
    iters: int,
    capturable: bool = True,
) -> float:
    """Microseconds of one of the `count` calls that `calls` makes: the median over `iters` steps of all of them, as one
    CUDA graph where that can be captured. The one clock for whole forwards and for parts of them."""
    step: Callable[[], object] = calls
    captured = device.type == "cuda" and capturable
    if captured:
        graph, _ = capture(calls, warm_up)
        step = graph.replay
    else:
        warm_up()
    step()
    return median(time_steps(Comm.single(device), step, iters, queued=captured)) / count
