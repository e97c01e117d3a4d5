"""One configuration to measure, and the experiment file that spells out many of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from moe_dist.balance.placement_file import KIND, read_placement
from moe_dist.bench.draws import recorded
from moe_dist.bench.names import PLACEMENTS, Backends, CombineDtype, Exchanges, Form, Payload, Peers, Placements, Skews
from moe_dist.bench.peer_plan import PEER, peer_plan
from moe_dist.bench.profile_spec import ProfileSpec
from moe_dist.bench.source_spec import SourceSpec
from moe_dist.engine.plan import Plan
from moe_dist.engine.planning import AUTO, make_plan
from moe_dist.engine.together import pairs_of
from moe_dist.errors import ConfigError
from moe_dist.machine.machine import Machine
from moe_dist.messages.counts import noun
from moe_dist.model.spec import (
    Flag,
    MoESpec,
    Name,
    ParallelSpec,
    Ranks,
    Seconds,
    Section,
    Seed,
    TokenLayout,
    Tokens,
    TokenSplit,
    WorkloadSpec,
)
from moe_dist.runtime.context import RaySpec
from moe_dist.workloads.skew_names import ROUTINGS, canonical_skew, check_skew_fits
from moe_dist.workloads.token_splits import most_tokens
from moe_dist.workloads.traces import check_new, read_trace, trace_of

MOST_CASES = 10_000  # planning as many takes some seconds, measuring them a day
LARGEST_STACK = 128
LARGEST_STEP = 1 << 37  # numbers in the rows and the routing of one step
LISTS = (
    "models", "worlds", "placements", "exchanges", "backends", "tokens", "token_layouts", "token_splits", "skews",
    "modes", "peers",
)  # fmt: skip

MOST_ITERATIONS = 1_000_000
Iterations = Annotated[int, Field(strict=True, ge=0, le=MOST_ITERATIONS)]
Layers = Annotated[int, Field(strict=True, ge=1, le=LARGEST_STACK)]
Mode = Literal["eager", "graph"]
ChosenBy = Literal["name", "default", "auto"]  # who chose the backend, or with auto the exchange


class Case(Section):
    """Everything that decides one row of results. With `layers` the step is a stack of so many, with weights and a
    routing of their own each. `depth`: which layer of a stack this one is; see `at`. `step`: which of the workload's
    routings this is of, where steps take several in turn. `record_routing`: the file that rank 0 saves them in.
    `profile`: what is traced when everything is measured. `peer`: the other package's layer that is measured in place
    of ours; `exchange` and `backend` are then PEER and its name."""

    section = "case"

    model: MoESpec
    source: SourceSpec = SourceSpec()
    parallel: ParallelSpec
    exchange: str
    backend: str
    workload: WorkloadSpec
    layers: Layers = 1
    depth: int = Field(default=0, strict=True, ge=0, lt=LARGEST_STACK)
    step: int = Field(default=0, strict=True, ge=0, lt=ROUTINGS)
    record_routing: str | None = None
    profile: ProfileSpec | None = None
    payload: Payload = "auto"
    form: Form = "auto"
    combine_dtype: CombineDtype | None = None
    graph: Flag = False
    iters: Iterations = 20
    warmup: Iterations = 3
    check: Flag = True
    chosen_by: ChosenBy = "name"
    peer: str | None = None

    @field_validator("workload")
    @classmethod
    def _traced(cls, work: WorkloadSpec) -> WorkloadSpec:
        """Its trace is that of now: what ranks read later must be the same."""
        trace = work.trace or trace_of(work.skew)
        traced: WorkloadSpec = work if trace == work.trace else work.with_changes(trace=trace)
        return traced

    @model_validator(mode="after")
    def _rules(self) -> Case:
        check_step(self.workload.tokens, self.model)
        return self

    def plan(self, machine: Machine) -> Plan:
        """Raises UnsupportedError or ConfigError for what can't run."""
        if self.peer is not None:
            return peer_plan(self, machine)
        return make_plan(
            self.model,
            self.parallel,
            exchange=self.exchange,
            backend=self.backend,
            token_layout=self.workload.token_layout,
            payload=self.payload,
            form=self.form,
            combine_dtype=self.combine_dtype,
            graph=self.graph,
            machine=machine,
            tokens_per_rank=self.tokens_per_rank,
        )

    @property
    def tokens_per_rank(self) -> int:
        """The most that a rank has."""
        work = self.workload
        if work.token_layout == "replicated":
            return work.tokens
        return most_tokens(work.tokens, self.parallel.world, work.token_split, work.seed)

    def at(self, number: int) -> Case:
        """The case of one layer of its stack alone. Of a checkpoint they are neighbours, from source.layer on."""
        source = self.source
        if number and source.layer is not None:
            source = source.with_changes(layer=source.layer + number)
        alone: Case = self.with_changes(source=source, layers=1, depth=number)
        return alone

    @property
    def label(self) -> str:
        work, split = self.workload, "" if self.workload.token_split == "even" else f" {self.workload.token_split}"
        stacked = f" × {self.layers} layers" if self.layers > 1 else ""
        return (
            f"{self.model.name} {self.parallel.label} {self.exchange} {self.backend}"
            f" {work.tokens} {work.token_layout} {noun(work.tokens, 'token')}{split}"
            f" {work.skew} {'graph' if self.graph else 'eager'}{stacked}"
        )


class Experiment(Section):
    """The product of its lists, in which a value that stands twice counts once. `placements` may name `tp`, `ep` (over
    all of `worlds`), `tpXepY`, `map:FILE` and, until `defaults.settle_placements`, `auto`."""

    section = "experiment"

    name: Name = "compare"
    models: tuple[MoESpec, ...] = Field(min_length=1)
    source: SourceSpec = SourceSpec()
    worlds: tuple[Ranks, ...] = Field(default=(2, 4), min_length=1)
    placements: Placements = ("tp", "ep")
    exchanges: Exchanges = ("all_reduce", "ag_rs", "all_to_all")
    backends: Backends = ("torch",)
    tokens: tuple[Tokens, ...] = Field(default=(8, 256), min_length=1)
    token_layouts: tuple[TokenLayout, ...] = Field(default=("sharded",), min_length=1)
    token_splits: tuple[TokenSplit, ...] = Field(default=("even",), min_length=1)
    skews: Skews = ("uniform",)
    peers: Peers = ()
    layers: Layers = 1
    payload: Payload = "auto"
    form: Form = "auto"
    combine_dtype: CombineDtype | None = None
    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] | None = None  # None: both on CUDA, eager on a CPU
    seed: Seed = 0
    iters: Iterations = 20
    warmup: Iterations = 3
    check: Flag = True
    record_routing: Name | None = None
    allow_empty_shards: Flag = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    runtime: Literal["ray", "torchrun"] = "ray"
    case_timeout_s: Seconds = 600.0
    ray: RaySpec = RaySpec()

    @field_validator(*LISTS)
    @classmethod
    def _once(cls, values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        return values and tuple(dict.fromkeys(values))

    @field_validator("skews")
    @classmethod
    def _skews(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        """Each routing once, whatever it is called. A trace by its absolute path: ranks have a working directory of
        their own."""
        found: dict[str, str] = {}
        for value in values:
            own = f"file:{Path(value[5:]).absolute()}" if value[:5] == "file:" and value[5:] else value
            with _as_skews():
                skew = canonical_skew(own)
                found.setdefault(trace_of(skew) or skew, skew)
        return tuple(found.values())

    @field_validator("record_routing")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return value and str(Path(value).absolute())

    @model_validator(mode="after")
    def _rules(self) -> Experiment:
        lists = (getattr(self, key) for key in LISTS)
        count = prod(len(values) for values in lists if values)  # peers take the places of exchanges and backends
        if count > MOST_CASES:
            raise ConfigError(
                "experiment", f"{count:,} cases", "is too much for one experiment", f"up to {MOST_CASES:,}"
            )
        for tokens, model in product(self.tokens, self.models):
            check_step(tokens, model)
        if "replicated" in self.token_layouts and set(self.token_splits) != {"even"}:
            split = next(split for split in self.token_splits if split != "even")
            rule = "divides sharded tokens, and replicated ones are whole on every rank"
            raise ConfigError("experiment.token_splits", split, rule, "even, or token_layouts [sharded]")
        self._check_recording()
        if "router" in self.skews and self.source.checkpoint is None:
            raise ConfigError("experiment.skews", "router", "only a checkpoint has a router: give source.checkpoint")
        for placement in self.placements:
            if placement != AUTO:
                parse_placement(placement, self.worlds[0])
        for skew, model in product(self.skews, self.models):
            with _as_skews():
                check_skew_fits(skew, model)
                if skew.startswith("file:"):  # read now: a wrong trace is refused before ranks start
                    self._read(skew, model)
        return self

    def _check_recording(self) -> None:
        if self.record_routing is None:
            return
        check_new("experiment.record_routing", self.record_routing)
        for key in ("models", "tokens", "skews"):
            if len(getattr(self, key)) > 1:
                rule = f"holds one routing, and there are {len(getattr(self, key))} {key}"
                raise ConfigError("experiment.record_routing", self.record_routing, rule, f"one of {key}")

    def _read(self, skew: str, model: MoESpec) -> None:
        """Raises ConfigError where a layer would get nothing of this trace in a step."""
        trace = read_trace(model, skew)
        for tokens in self.tokens:
            recorded(trace, WorkloadSpec(tokens=tokens, skew=skew), self.layers)

    def cases(self, device: str, chosen_by: ChosenBy = "name") -> Iterator[Case]:
        """For ranks on `device`, backends named or chosen by default. A group of ranks, and then its weights, serve as
        many cases in a row as possible."""
        modes = self.modes or (("eager", "graph") if device == "cuda" else ("eager",))
        traces = {skew: trace_of(skew) for skew in self.skews}
        for world, model in product(self.worlds, self.models):
            yield from self._cases_of(world, model, modes, chosen_by, traces)

    def _cases_of(
        self, world: int, model: MoESpec, modes: tuple[str, ...], chosen_by: ChosenBy, traces: dict[str, str | None]
    ) -> Iterator[Case]:
        found = [parse_placement(placement, world) for placement in self.placements]  # None: of another world's size
        for parallel in dict.fromkeys(found):  # on one rank, tp and ep are the same
            if parallel is None:
                continue
            parallel = parallel.with_changes(allow_empty_shards=self.allow_empty_shards)
            entering = product(self.token_layouts, self.token_splits, self.tokens, self.skews)
            peers = [(PEER, peer, peer) for peer in self.peers]
            ours = {
                layout: [(*pair, None) for pair in pairs_of(self.exchanges, self.backends, layout)]
                for layout in self.token_layouts
            }
            inner = ((*each, *names, mode) for each in entering for names in (*ours[each[0]], *peers) for mode in modes)
            for layout, split, tokens, skew, exchange, backend, peer, mode in inner:
                yield Case(
                    model=model,
                    source=self.source,
                    parallel=parallel,
                    exchange=exchange,
                    backend=backend,
                    workload=WorkloadSpec(
                        tokens=tokens,
                        token_layout=layout,
                        token_split=split,
                        skew=skew,
                        seed=self.seed,
                        trace=traces[skew],
                    ),
                    layers=self.layers,
                    payload=self.payload,
                    form=self.form,
                    combine_dtype=self.combine_dtype,
                    graph=mode == "graph",
                    iters=self.iters,
                    warmup=self.warmup,
                    check=self.check,
                    record_routing=self.record_routing,
                    chosen_by="auto" if AUTO in (exchange, backend) else chosen_by if peer is None else "name",
                    peer=peer,
                )


@contextmanager
def _as_skews() -> Iterator[None]:
    """Names the field as an experiment has it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError("experiment.skews", error.value, error.rule, error.legal) from None


def check_step(tokens: int, model: MoESpec) -> None:
    """Raises ConfigError where the rows of one step alone would be absurd: more memory than any machine has."""
    rows = tokens * (model.hidden + model.top_k)
    if rows > LARGEST_STEP:
        rule = f"tokens of width {model.hidden} for {model.top_k} experts each are {rows:,} numbers in a step"
        raise ConfigError("experiment.tokens", tokens, rule, f"at most {LARGEST_STEP:,}")


def parse_placement(text: str, world: int) -> ParallelSpec | None:
    """`tp`, `ep`: all of the world one way. `tp2xep2`, `map:FILE`: that grid; None if its size is not the world's."""
    if text.startswith(KIND):
        parallel = read_placement(text.removeprefix(KIND))
        return parallel if parallel.world == world else None
    if text == AUTO:
        rule = "is settled by the commands plan and compare, before there are cases"
        raise ConfigError("experiment.placements", text, rule, "moe_dist.bench.defaults.settle_placements before it")
    if text in ("tp", "ep"):
        return ParallelSpec(**{text: world})
    grid = parse_grid(text)
    if grid is None:
        raise ConfigError("experiment.placements", text, "not a placement", PLACEMENTS)
    return grid if grid.world == world else None


def parse_grid(text: str) -> ParallelSpec | None:
    """`tp2`, `ep4`, `tp2xep2`; None for what names no sizes."""
    sizes: dict[str, int] = {}
    for part in text.lower().split("x"):
        kind, size = part[:2], part[2:]
        if kind not in ("tp", "ep") or kind in sizes or not re.fullmatch("[1-9][0-9]{0,3}", size):
            return None
        sizes[kind] = int(size)
    return ParallelSpec(**sizes)
