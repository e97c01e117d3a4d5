"""Spec and machine to a plan: what will run, what it weighs, and why each other choice was not taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from moe_dist.backends import BACKENDS, Backend, Problem
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.exchange import EXCHANGES, Exchange
from moe_dist.exchange.layout import change_of
from moe_dist.machine.machine import Machine
from moe_dist.model.placement import Placement
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import MoESpec, ParallelSpec, TokenLayout
from moe_dist.model.weights import ExpertWeights
from moe_dist.step import Support, TensorSpec, bytes_of
from moe_dist.tables import Shape, table_source

PAYLOADS = ("auto", "unquantized", "fp8")
COMBINE_DTYPES = ("bf16", "fp32")
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
    hands to the backend (step.rows.FORMS). `payload`: what rows really travel as: none, bf16, fp32 or fp8.
    `chosen_by`: who named it."""

    exchange: str
    backend: str
    form: str
    payload: str
    chosen_by: str = "name"
    up_to: int | None = None


@dataclass(frozen=True)
class Plan:
    """A configuration that passed every check, made once by whoever starts the ranks and sent to them. `choices`: by
    size of step, the smallest first; today there is one. `options`: all names, with what speaks against each."""

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
        return change_of(self.token_layout, EXCHANGES.get(self.exchange), self.placement.world) is not None

    @property
    def capturable(self) -> Support:
        """Whether the whole step can be captured in a CUDA graph."""
        reasons = [
            f"{kind} {name} is not capturable"
            for kind, name, cls in (
                ("exchange", self.exchange, EXCHANGES.get(self.exchange)),
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
        """Bytes of `rank`'s shard and of its part of the shared expert, scales included."""
        experts = len(self.placement.experts_of(rank))
        routed = ExpertWeights.bytes_of(self.spec, experts, self.placement.width_of(rank))
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
        """The most that a rank takes from its workspace in a step, and for backends that allocate by themselves an
        estimate of that: what crosses, both GEMMs' inputs and outputs, and the partial sums."""
        exchange, backend, bucket = EXCHANGES.get(self.exchange), BACKENDS.get(self.backend), max_tokens_per_rank
        given = self.spec, self.placement, self.payload, self.out_dtype
        forms: list[TensorSpec] = []
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
            forms.append(((rows, self.spec.hidden), self.out_dtype))
            backends += max(backend.scratch_bytes(problem, rows) for problem in map(self.shared_problem, ranks))
        return bytes_of(forms) + backends

    def wire_bytes(self, tokens: int) -> int:
        """Most bytes that one rank sends in a step of `tokens` global tokens (worst case of `all_to_all`), a change of
        layout around it included."""
        exchange, world = EXCHANGES.get(self.exchange), self.placement.world
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
        backend = BACKENDS.get(self.backend)
        return {
            part.shape.file_name: table_source(part.shape, backend.table_revision)
            for part in self.parts()
            if backend.candidates(part.problem, 1)
        }

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


def make_plan(
    spec: MoESpec,
    parallel: ParallelSpec,
    *,
    exchange: str,
    backend: str,
    token_layout: TokenLayout = "sharded",
    payload: str = "auto",
    form: str = "auto",
    combine_dtype: str | None = None,
    graph: bool = False,
    machine: Machine | None = None,
) -> Plan:
    """Check everything that can be checked before a weight is loaded or a process started.

    A named exchange or backend that can't serve raises UnsupportedError with the reason: it is never replaced.
    `payload` auto sends FP8 where the model is FP8 and the backend takes it. `form` auto is the one that
    the backend likes best of those that the exchange makes. `combine_dtype` defaults to the model's.
    With `graph`, what can't be captured in a CUDA graph is refused here.
    """
    machine = machine or Machine.detect()
    if payload not in PAYLOADS:
        raise ConfigError("payload", payload, "unknown", PAYLOADS)
    combine = combine_dtype or spec.dtype
    if combine not in COMBINE_DTYPES:
        raise ConfigError("combine_dtype", combine, "unknown", COMBINE_DTYPES)
    exchange_class, backend_class = EXCHANGES.get(exchange), BACKENDS.get(backend)
    placement = Placement.build(spec, parallel)

    travels = _travelling(spec, placement, token_layout, exchange_class, backend_class, payload)
    options = _options(spec, placement, token_layout, exchange, backend, travels, payload, combine, machine)
    refused = [option for option in options if option.chosen and not option.possible]
    if refused:
        what = " and ".join(f"{option.kind} {option.name}" for option in refused)
        fit = [option.name for option in options if option.possible and option.kind == refused[0].kind]
        raise UnsupportedError(f"{what} under {parallel.label}", [option.reason for option in refused], fit or "none")
    _check_shared(spec, exchange_class, parallel)
    choice = Choice(exchange, backend, _form(exchange_class, backend_class, form), travels)
    plan = Plan(
        spec,
        parallel,
        placement,
        token_layout,
        (choice,),
        combine,
        machine,
        graph,
        tuple(options),
    )
    if graph and not plan.capturable.ok:
        raise UnsupportedError(f"a CUDA graph of {exchange} with {backend}", [plan.capturable.reason])
    return plan


def _form(exchange: type[Exchange[Any, Any]], backend: type[Backend], form: str) -> str:
    """Of the rows that pass from one to the other. Raises ConfigError for one that can't."""
    common = tuple(each for each in backend.takes if each in exchange.makes)
    if form == "auto" and common:
        return common[0]
    if form not in common:
        makes, takes = ", ".join(exchange.makes), ", ".join(backend.takes)
        rule = f"{exchange.__name__} makes {makes}, {backend.__name__} takes {takes}"
        raise ConfigError("form", form, rule, ("auto", *common) if common else ())
    return form


def _travelling(
    spec: MoESpec,
    placement: Placement,
    token_layout: str,
    exchange: type[Exchange[Any, Any]],
    backend: type[Backend],
    payload: str,
) -> str:
    """The dtype that rows travel in. Raises ConfigError if the one asked for can't be."""
    if placement.world == 1 or token_layout == exchange.token_layout == "replicated":
        if payload == "fp8":
            raise ConfigError("payload", payload, "no token row travels here", ("auto", "unquantized"))
        return "none"
    if payload == "fp8" and not spec.quantized:
        raise ConfigError("payload", payload, "the model is not quantized", ("auto", "unquantized"))
    takes_fp8 = spec.quantized and "fp8" in backend.payloads(spec)
    if payload == "fp8" and not takes_fp8:
        raise ConfigError("payload", payload, "the backend does not take rows already quantized here", ("auto",))
    if payload != "unquantized" and takes_fp8:
        return "fp8"
    if spec.quant == "fp8_tensor_dynamic":
        rule = "a dynamic per-tensor scale belongs to the source rank and travels only with FP8 rows"
        raise ConfigError("payload", payload, rule, ("fp8",))
    return spec.dtype


def _options(
    spec: MoESpec,
    placement: Placement,
    token_layout: str,
    exchange: str,
    backend: str,
    travels: str,
    payload: str,
    combine: str,
    machine: Machine,
) -> list[Option]:
    """Every registered exchange and backend, with what speaks against it."""
    options = []
    for name, candidate in EXCHANGES.usable():
        support = _asked(EXCHANGES.is_foreign(name), candidate.supports, spec, placement)
        reason = support.reason
        if support.ok and name != exchange:
            converted = candidate.token_layout != token_layout and placement.world > 1
            reason = "not asked for" + (f"; would add a layout change from {token_layout}" if converted else "")
        options.append(Option("exchange", name, support.ok, name == exchange, reason))
    for name, found in BACKENDS.usable():
        given = (spec, placement, found, travels, payload, combine, machine)
        support = _asked(BACKENDS.is_foreign(name), _backend_support, *given)
        reason = "not asked for" if support.ok and name != backend else support.reason
        options.append(Option("backend", name, support.ok, name == backend, reason))
    return options


def _asked(foreign: bool, question: Callable[..., Support], *given: Any) -> Support:
    """A third party's that fails at the question can't serve; ours is a fault to be seen."""
    try:
        return question(*given)
    except Exception as error:
        if not foreign:
            raise
        return Support(False, f"its own code failed when asked: {type(error).__name__}: {error}")


def _backend_support(
    spec: MoESpec,
    placement: Placement,
    backend: type[Backend],
    travels: str,
    payload: str,
    combine: str,
    machine: Machine,
) -> Support:
    """It must run here and serve every rank's own slice."""
    available = backend.available(machine.device)
    if not available.ok:
        return available
    takes = backend.payloads(spec)
    if travels not in takes and not (payload == "auto" and spec.dtype in takes):
        return Support(False, f"takes rows as {', '.join(sorted(takes))}, not {travels}")
    if combine not in backend.sums:
        return Support(False, f"gives partial sums in {', '.join(sorted(backend.sums))}, not {combine}")
    shapes = {(placement.width_of(rank), len(placement.experts_of(rank))) for rank in range(placement.world)}
    for width, num_local in sorted(shapes):
        problem = Problem(spec, width, num_local, machine.device, machine.capability, travels)
        support = backend.supports(problem)
        if not support.ok:
            return support
    return Support(True)


def _check_shared(spec: MoESpec, exchange: type[Exchange[Any, Any]], parallel: ParallelSpec) -> None:
    """A shared expert sliced over all ranks needs every token on every rank."""
    if spec.shared_experts == "tp" and not exchange.every_token:
        rule = f"its slices need every token on every rank, which {exchange.__name__} does not bring"
        raise ConfigError("model.shared_experts", "tp", rule, ("none", "replicated"))
    if spec.shared_experts != "none":
        shared_placement(spec, parallel)


def shared_placement(spec: MoESpec, parallel: ParallelSpec) -> Placement:
    """Sliced over all ranks, or whole on each."""
    tp = parallel.world if spec.shared_experts == "tp" else 1
    return Placement.build(spec.shared_spec(), ParallelSpec(tp=tp, allow_empty_shards=parallel.allow_empty_shards))
