"""One configuration to measure, and the experiment file that spells out many of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from moe_dist.checkpoint.folder import folder, model_name
from moe_dist.errors import ConfigError
from moe_dist.plan import Machine, Plan, make_plan
from moe_dist.routing import check_skew, check_skew_fits
from moe_dist.runtime.context import RaySpec
from moe_dist.spec import MoESpec, ParallelSpec, Section, TokenLayout, WorkloadSpec


class SourceSpec(Section):
    """Where weights come from: seeded random ones, or one layer of a checkpoint on disk with its own router."""

    section = "source"

    seed: int = 0
    checkpoint: str | None = None
    layer: int | None = None

    @model_validator(mode="after")
    def _rules(self) -> SourceSpec:
        """Half of a source would be random weights in silence."""
        if self.checkpoint is None:
            if self.layer is not None:
                rule = "is a layer of a checkpoint, and none is given"
                raise ConfigError("source.layer", self.layer, rule, "source.checkpoint beside it")
            return self
        folder(self.checkpoint)
        if self.layer is None:
            raise ConfigError("source.layer", None, "is needed beside source.checkpoint", "the number of an MoE layer")
        if self.seed:
            raise ConfigError("source.seed", self.seed, "a checkpoint's weights are not drawn", "no source.seed")
        return self

    @property
    def label(self) -> str:
        """In rows and tables, without a machine's paths."""
        if self.checkpoint is None:
            return f"random:{self.seed}"
        return f"checkpoint:{model_name(Path(self.checkpoint))} layer {self.layer}"


class Case(Section):
    """Everything that decides one row of results."""

    section = "case"

    model: MoESpec
    source: SourceSpec = SourceSpec()
    parallel: ParallelSpec
    exchange: str
    backend: str
    workload: WorkloadSpec
    payload: str = "auto"
    combine_dtype: str | None = None
    graph: bool = False
    iters: int = Field(default=20, ge=0)
    warmup: int = Field(default=3, ge=0)
    check: bool = True

    def plan(self, machine: Machine) -> Plan:
        return make_plan(
            self.model,
            self.parallel,
            exchange=self.exchange,
            backend=self.backend,
            token_layout=self.workload.token_layout,
            payload=self.payload,
            combine_dtype=self.combine_dtype,
            graph=self.graph,
            machine=machine,
        )

    @property
    def label(self) -> str:
        work = self.workload
        return (
            f"{self.model.name} {self.parallel.label} {self.exchange} {self.backend}"
            f" {work.tokens} {work.token_layout} tokens {work.skew} {'graph' if self.graph else 'eager'}"
        )


class Experiment(Section):
    """The product of its lists. `placements` may name `tp`, `ep` (over all of `worlds`) and `tpXepY`."""

    section = "experiment"

    name: str = "compare"
    models: tuple[MoESpec, ...] = Field(min_length=1)
    source: SourceSpec = SourceSpec()
    worlds: tuple[int, ...] = Field(default=(2, 4), min_length=1)
    placements: tuple[str, ...] = Field(default=("tp", "ep"), min_length=1)
    exchanges: tuple[str, ...] = Field(default=("all_reduce", "ag_rs", "all_to_all"), min_length=1)
    backends: tuple[str, ...] = Field(default=("torch",), min_length=1)
    tokens: tuple[int, ...] = Field(default=(8, 256), min_length=1)
    token_layouts: tuple[TokenLayout, ...] = Field(default=("sharded",), min_length=1)
    skews: tuple[str, ...] = Field(default=("uniform",), min_length=1)
    payload: str = "auto"
    combine_dtype: str | None = None
    modes: tuple[Literal["eager", "graph"], ...] | None = None  # None: both on CUDA, eager on a CPU
    seed: int = 0
    iters: int = Field(default=20, ge=0)
    warmup: int = Field(default=3, ge=0)
    check: bool = True
    allow_empty_shards: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    runtime: Literal["ray", "torchrun"] = "ray"
    case_timeout_s: float = Field(default=600.0, gt=0)
    ray: RaySpec = RaySpec()

    @field_validator("skews")
    @classmethod
    def _skews(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            check_skew(value)
        return values

    @model_validator(mode="after")
    def _rules(self) -> Experiment:
        for world in self.worlds:
            if world < 1:
                raise ConfigError("experiment.worlds", world, "a group has at least one rank", "1 and more")
        for tokens in self.tokens:
            if tokens < 1:
                raise ConfigError("experiment.tokens", tokens, "global tokens of a step", "1 and more")
        if "router" in self.skews and self.source.checkpoint is None:
            raise ConfigError("experiment.skews", "router", "only a checkpoint has a router: give source.checkpoint")
        for placement in self.placements:
            parse_placement(placement, self.worlds[0])
        for skew, model in product(self.skews, self.models):
            check_skew_fits(skew, model)
        return self

    def cases(self, device: str) -> Iterator[Case]:
        """For ranks on `device`; a group of ranks, and then its weights, serve as many cases in a row as possible."""
        modes = self.modes or (("eager", "graph") if device == "cuda" else ("eager",))
        for world, model in product(self.worlds, self.models):
            yield from self._cases_of(world, model, modes)

    def _cases_of(self, world: int, model: MoESpec, modes: tuple[str, ...]) -> Iterator[Case]:
        found = [parse_placement(placement, world) for placement in self.placements]  # None: of another world's size
        for parallel in dict.fromkeys(found):  # on one rank, tp and ep are the same
            if parallel is None:
                continue
            parallel = parallel.with_changes(allow_empty_shards=self.allow_empty_shards)
            inner = product(self.token_layouts, self.tokens, self.skews, self.exchanges, self.backends, modes)
            for layout, tokens, skew, exchange, backend, mode in inner:
                yield Case(
                    model=model,
                    source=self.source,
                    parallel=parallel,
                    exchange=exchange,
                    backend=backend,
                    workload=WorkloadSpec(tokens=tokens, token_layout=layout, skew=skew, seed=self.seed),
                    payload=self.payload,
                    combine_dtype=self.combine_dtype,
                    graph=mode == "graph",
                    iters=self.iters,
                    warmup=self.warmup,
                    check=self.check,
                )


def default_experiment(machine: Machine, backends: tuple[str, ...], router: bool) -> dict[str, Any]:
    """What `compare` does without a file. On a CPU it is small enough for two minutes on two cores; on GPUs it takes
    every backend (one that is not built is listed with its reason). `router`: the weights come with one."""
    skews = ["router"] * router + ["uniform", "zipf:1.2"]
    if machine.device == "cpu":
        return {"models": ["tiny"], "worlds": [2, 4], "tokens": [16], "skews": skews, "iters": 100}
    return {
        "models": ["Qwen3-30B-A3B"],
        "worlds": [world for world in (2, 4, 8) if world <= machine.devices] or [1],
        "exchanges": ["all_reduce", "ag_rs", "all_to_all"] if machine.devices > 1 else ["local"],
        "backends": list(backends),
        "tokens": [32, 1024],
        "skews": skews,
        "iters": 100,
    }


def parse_placement(text: str, world: int) -> ParallelSpec | None:
    """`tp`, `ep`: all of the world one way. `tp2xep2`: that grid, None where its size is not the world's."""
    if text in ("tp", "ep"):
        return ParallelSpec(**{text: world})
    sizes: dict[str, int] = {}
    for part in text.lower().split("x"):
        kind, size = part[:2], part[2:]
        if kind not in ("tp", "ep") or kind in sizes or not size.isdigit() or int(size) < 1:
            raise ConfigError("experiment.placements", text, "not a placement", ("tp", "ep", "tp2xep2 and the like"))
        sizes[kind] = int(size)
    parallel = ParallelSpec(**sizes)
    return parallel if parallel.world == world else None
