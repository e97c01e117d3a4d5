"""A plan: what will run, what it weighs, takes and sends; engine/planning.py makes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from moe_dist.backends import BACKENDS, Problem
from moe_dist.exchange import EXCHANGES, Exchange
from moe_dist.exchange.layout import change_of
from moe_dist.machine.machine import Machine
from moe_dist.model.placement import Placement
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import MOST_TOKENS, MoESpec, ParallelSpec, TokenLayout
from moe_dist.model.weights import ExpertWeights
from moe_dist.step import Support, TensorSpec, bytes_of
from moe_dist.tables import Shape, table_source

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Option(NamedTuple):
    """One name of one kind (exchange, backend), whether it could run here, and whether it was taken."""

    kind: str
    name: str
    possible: bool
    chosen: bool
    reason: str


class Part(NamedTuple):
    """One rank's shard of the experts, or of the shared expert, and what its backend computes."""

    placement: Placement
    rank: int
    problem: Problem
    shape: Shape


@dataclass(frozen=True)
class Choice:
    """What runs for steps of up to `up_to` tokens a rank (None: of any size). `form`: of the rows that the exchange
    hands to the backend (step.rows.FORMS). `payload`: what rows really travel as: none, bf16, fp32 or fp8. `why`: of
    what `auto` has chosen; empty where both names were given."""

    exchange: str
    backend: str
    form: str
    payload: str
    up_to: int | None = None
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """A configuration that passed every check, made once by whoever starts the ranks and sent to them. `choices`: by
    size of step, the smallest first; the last one has no end. What is asked of a plan without a size is answered for
    the last. `options`: all names, with what speaks against each."""

    spec: MoESpec
    parallel: ParallelSpec
    placement: Placement
    token_layout: TokenLayout
    choices: tuple[Choice, ...]
    combine_dtype: str
    machine: Machine
    graph: bool
    options: tuple[Option, ...]

    def choice(self, bucket: int | None = None) -> Choice:
        """For steps of so many tokens a rank; None: for the largest."""
        fit = (each for each in self.choices if bucket is not None and (each.up_to is None or bucket <= each.up_to))
        return next(fit, self.choices[-1])

    def parted(self, most: int) -> list[tuple[Plan, int]]:
        """For steps of up to `most` tokens a rank: a plan of each choice that they meet, and its largest such step."""
        if len(self.choices) == 1:
            return [(self, most)]
        found, below = [], -1
        for choice in self.choices:
            size = most if choice.up_to is None else min(most, choice.up_to)
            if size > below:
                found.append((replace(self, choices=(replace(choice, up_to=None),)), size))
            below = size
        return found

    @property
    def exchange(self) -> str:
        return self.choice().exchange

    @property
    def backend(self) -> str:
        return self.choice().backend

    @property
    def form(self) -> str:
        return self.choice().form

    @property
    def payload(self) -> str:
        return self.choice().payload

    @property
    def converts_layout(self) -> bool:
        return change_of(self.token_layout, self.exchange_class, self.placement.world) is not None

    @property
    def exchange_class(self) -> type[Exchange[Any, Any]]:
        """What serves tokens in this layout under the exchange's name."""
        return EXCHANGES.get(self.exchange).for_layout(self.token_layout)

    @property
    def capturable(self) -> Support:
        """Whether the whole step can be captured in a CUDA graph, of any size."""
        if len(self.choices) > 1:
            answers = [plan.capturable for plan, _ in self.parted(MOST_TOKENS)]
            return next((answer for answer in answers if not answer.ok), answers[-1])
        reasons = [
            f"{kind} {name} is not capturable"
            for kind, name, cls in (
                ("exchange", self.exchange, self.exchange_class),
                ("backend", self.backend, BACKENDS.get(self.backend)),
            )
            if not cls.capturable
        ]
        if self.machine.device != "cuda":
            reasons.append("CUDA graphs need CUDA")
        return Support(not reasons, "; ".join(reasons))

    @property
    def out_dtype(self) -> torch.dtype:
        """Dtype of the partial sums that cross in combine."""
        return DTYPES[self.combine_dtype]

    def weight_bytes(self, rank: int) -> int:
        """Bytes of `rank`'s shard and of its part of the shared expert, scales and copies that backends keep
        included."""
        experts = len(self.placement.experts_of(rank))
        routed = ExpertWeights.bytes_of(self.spec, experts, self.placement.width_of(rank))
        problem = self.problem(rank)
        routed += sum(BACKENDS.get(name).copied_bytes(problem) for name in {each.backend for each in self.choices})
        if self.spec.shared_experts == "none":
            return routed
        width = shared_placement(self.spec, self.parallel).width_of(rank)
        return routed + ExpertWeights.bytes_of(self.spec.shared_spec(), 1, width)

    def problem(self, rank: int) -> Problem:
        """What the backend of `rank` computes for the routed experts."""
        return self._problem(self.spec, self.placement.width_of(rank), len(self.placement.experts_of(rank)))

    def shared_problem(self, rank: int) -> Problem:
        """What it computes for the shared expert."""
        return self._problem(self.spec.shared_spec(), shared_placement(self.spec, self.parallel).width_of(rank), 1)

    def _problem(self, spec: MoESpec, width: int, experts: int) -> Problem:
        machine = self.machine
        return Problem(spec, width, experts, machine.device, machine.capability, self.payload, machine.device_name)

    def most_rows(self, max_tokens_per_rank: int) -> int:
        """Worst case of (token, expert) pairs on one rank: world × T × min(K, e), tile padding not counted."""
        tokens = max_tokens_per_rank * (self.placement.world if self.token_layout == "sharded" else 1)
        most_local = max(len(self.placement.experts_of(rank)) for rank in range(self.placement.world))
        return tokens * min(self.spec.top_k, most_local)

    def scratch_bytes(self, max_tokens_per_rank: int) -> int:
        """The most that a rank takes from its workspace in a step of so many tokens or fewer, and for backends that
        allocate by themselves an estimate of that: what crosses, both GEMMs' inputs and outputs, and the partial
        sums."""
        return max(plan._scratch(size) for plan, size in self.parted(max_tokens_per_rank))

    def _scratch(self, max_tokens_per_rank: int) -> int:
        exchange, backend, bucket = self.exchange_class, BACKENDS.get(self.backend), max_tokens_per_rank
        given = self.spec, self.placement, self.payload, self.out_dtype
        forms: list[TensorSpec] = []
        if self.spec.weights_on_input:  # the scaled tokens and weights of 1
            forms += [((bucket, self.spec.hidden), self.spec.torch_dtype), ((bucket, 1), torch.float32)]
        change = change_of(self.token_layout, exchange, self.placement.world)
        if change is not None:
            forms += change.scratch(*given, bucket)
            world = self.placement.world
            bucket = bucket * world if exchange.token_layout == "replicated" else cdiv(bucket, world)
        forms += exchange.scratch(*given, bucket)
        rows = exchange.rows_entering(self.placement, bucket)
        ranks = range(self.placement.world)
        backends = max(backend.scratch_bytes(problem, rows) for problem in {self.problem(rank) for rank in ranks})
        if self.spec.shared_experts != "none":
            forms += [((rows, self.spec.hidden), self.out_dtype), ((rows, 1), torch.float32)]
            backends += max(backend.scratch_bytes(problem, rows) for problem in map(self.shared_problem, ranks))
        return bytes_of(forms) + backends

    def window_bytes(self, max_tokens_per_rank: int) -> int:
        """The most that a rank shares with the others in steps of so many tokens or fewer, beside its scratch; it stays
        as long as the group. Exchanges share one window; what a backend has lies beside it."""
        parts = self.parted(max_tokens_per_rank)
        of_backends: dict[str, int] = {}
        for plan, size in parts:
            bytes_of_it = BACKENDS.get(plan.backend).window_bytes(plan.spec, plan.placement, plan._inner_bucket(size))
            of_backends[plan.backend] = max(of_backends.get(plan.backend, 0), bytes_of_it)
        return max(plan._window(size) for plan, size in parts) + sum(of_backends.values())

    def _window(self, max_tokens_per_rank: int) -> int:
        bucket = self._inner_bucket(max_tokens_per_rank)
        return self.exchange_class.window_bytes(self.spec, self.placement, self.payload, self.out_dtype, bucket)

    def _inner_bucket(self, tokens_per_rank: int) -> int:
        """Of the exchange, inside of a change of layout where there is one."""
        changes = change_of(self.token_layout, self.exchange_class, self.placement.world) is not None
        return cdiv(tokens_per_rank, self.placement.world) if changes else tokens_per_rank

    def wire_bytes(self, tokens: int) -> int:
        """Most bytes that one rank sends in a step of `tokens` global tokens (worst case of `all_to_all`), a change of
        layout around it included."""
        world = self.placement.world
        bucket = cdiv(tokens, world) if self.token_layout == "sharded" else tokens
        return self.parted(bucket)[-1][0]._wire(tokens)

    def _wire(self, tokens: int) -> int:
        exchange, world = self.exchange_class, self.placement.world
        given = self.payload, self.out_dtype.itemsize
        change = change_of(self.token_layout, exchange, world)
        if change is None:
            return exchange.wire_bytes(self.spec, self.placement, tokens, *given)
        padded = cdiv(tokens, world) * world if self.token_layout == "sharded" else tokens
        inner = exchange.wire_bytes(self.spec, self.placement, padded, *given)
        return inner + change.wire_bytes(self.spec, self.placement, tokens, *given)

    def parts(self) -> list[Part]:
        """One for each shape that ranks have; an empty shard is none."""
        layers = [(self.spec, self.placement)]
        if self.spec.shared_experts != "none":
            layers.append((self.spec.shared_spec(), shared_placement(self.spec, self.parallel)))
        found: dict[Shape, Part] = {}
        for spec, placement in layers:
            for rank in range(placement.world):
                problem = self._problem(spec, placement.width_of(rank), len(placement.experts_of(rank)))
                shape = Shape.of(self.backend, self.machine.device_name, spec, problem.width, problem.num_local)
                if problem.width and problem.num_local:
                    found.setdefault(shape, Part(placement, rank, problem, shape))
        return list(found.values())

    def tables(self) -> dict[str, str | None]:
        """The tuning tables that its ranks look for, and whose is found: user, shipped or None. Empty for a backend
        that has nothing to tune."""
        return {part.shape.file_name: table_source(part.shape, revision) for part, revision in self.tuned_parts()}

    def tuned_parts(self) -> list[tuple[Part, int]]:
        """Those that tuning tables are looked up for, each with the revision of its backend's configs."""
        found = []
        for plan, _ in self.parted(MOST_TOKENS):
            backend = BACKENDS.get(plan.backend)
            found += [(part, backend.table_revision) for part in plan.parts() if backend.candidates(part.problem, 1)]
        return found

    def as_dict(self) -> dict[str, Any]:
        world = range(self.placement.world)
        return {
            "model": self.spec.model_dump(),
            "tp": self.parallel.tp,
            "ep": self.parallel.ep,
            "placement": self.parallel.label,
            "slices": [list(self.placement.slice_of(rank)) for rank in world],
            "experts": [len(self.placement.experts_of(rank)) for rank in world],
            "token_layout": self.token_layout,
            "exchange": self.exchange,
            "backend": self.backend,
            "form": self.form,
            "payload_dtype": self.payload,
            "combine_dtype": self.combine_dtype,
            "weight_bytes": [self.weight_bytes(rank) for rank in world],
            "tables": self.tables(),
            "graph": self.graph,
            "capturable": self.capturable._asdict(),
            "machine": asdict(self.machine),
            "choices": [asdict(choice) for choice in self.choices],
            "options": [option._asdict() for option in self.options],
        }


def shared_placement(spec: MoESpec, parallel: ParallelSpec) -> Placement:
    """Sliced over all ranks, or whole on each."""
    tp = parallel.world if spec.shared_experts == "tp" else 1
    return Placement.build(spec.shared_spec(), ParallelSpec(tp=tp, allow_empty_shards=parallel.allow_empty_shards))
