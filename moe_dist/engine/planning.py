"""Spec and machine to a plan, with the reason against every name that was not taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from moe_dist.backends import BACKENDS, Backend, Problem
from moe_dist.engine.backend_rule import available_on
from moe_dist.engine.choosing import AUTO, choose
from moe_dist.engine.on_nodes import check_nodes
from moe_dist.engine.plan import Choice, Option, Plan, shared_placement
from moe_dist.engine.records import merged
from moe_dist.engine.together import against
from moe_dist.errors import ConfigError, MoeDistError, UnsupportedError
from moe_dist.exchange import EXCHANGES, Exchange
from moe_dist.machine.machine import Machine
from moe_dist.model.placement import Placement
from moe_dist.model.spec import TOKEN_LAYOUTS, MoESpec, ParallelSpec, TokenLayout
from moe_dist.step import Support

__all__ = ["AUTO", "COMBINE_DTYPES", "PAYLOADS", "make_plan"]

PAYLOADS = ("auto", "unquantized", "fp8")
COMBINE_DTYPES = ("bf16", "fp32")


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
    tokens_per_rank: int | None = None,
) -> Plan:
    """Check everything that can be checked before a weight is loaded or a process started.

    A named exchange or backend that can't serve raises UnsupportedError with the reason: it is never replaced. `auto`
    takes what was fastest when it was measured (engine/choosing.py), by size of step, and says why in `choices`. With
    `tokens_per_rank` the plan is for steps of this size, and has one choice.
    `payload` auto sends FP8 where the model is FP8 and the backend takes it. `form` auto is the one that
    the backend likes best of those that the exchange makes. `combine_dtype` defaults to the model's.
    With `graph`, what can't be captured in a CUDA graph is refused here.
    """
    machine = machine or Machine.detect()
    for field, value, kind in (("spec", spec, MoESpec), ("parallel", parallel, ParallelSpec)):
        if not isinstance(value, kind):
            raise ConfigError(field, value, f"is {type(value).__name__}", kind.__name__)
    if token_layout not in TOKEN_LAYOUTS:
        raise ConfigError("token_layout", token_layout, "unknown", TOKEN_LAYOUTS)
    if spec.token_gate:
        raise ConfigError("model.token_gate", True, "is of a shared expert by itself, not of routed ones", (False,))
    if payload not in PAYLOADS:
        raise ConfigError("payload", payload, "unknown", PAYLOADS)
    combine = combine_dtype or spec.dtype
    if combine not in COMBINE_DTYPES:
        raise ConfigError("combine_dtype", combine, "unknown", COMBINE_DTYPES)
    given = _Given(spec, parallel, token_layout, payload, form, combine, graph, machine)
    if AUTO in (exchange, backend):
        return _chosen(given, exchange, backend, tokens_per_rank)
    return _named(given, exchange, backend)


class _Given(NamedTuple):
    """What a plan follows from beside its names."""

    spec: MoESpec
    parallel: ParallelSpec
    token_layout: TokenLayout
    payload: str
    form: str
    combine: str
    graph: bool
    machine: Machine


def _chosen(given: _Given, exchange: str, backend: str, tokens_per_rank: int | None) -> Plan:
    """Where one or both of the names are `auto`. Raises UnsupportedError where nothing can serve."""
    Placement.build(given.spec, given.parallel)  # what is wrong with it is wrong with every pair
    exchanges = [name for name, _ in EXCHANGES.usable()] if exchange == AUTO else [exchange]
    backends = [name for name, _ in BACKENDS.usable()] if backend == AUTO else [backend]
    plans: dict[tuple[str, str], Plan] = {}
    reasons: dict[str, MoeDistError] = {}
    never: dict[str, MoeDistError] = {}  # of names that don't go together, which is news where nothing else is wrong
    layout, graph, machine = given.token_layout, given.graph, given.machine

    def payload_of(exchange: str, backend: str) -> str | None:
        if apart := against(exchange, backend, layout):
            never[apart] = UnsupportedError(f"exchange {exchange} with backend {backend}", [apart])
            return None
        try:
            plan = plans[exchange, backend] = _named(given, exchange, backend)
        except (UnsupportedError, ConfigError) as error:
            reasons.update(dict.fromkeys(_against(error, given), error))
            return None
        return plan.payload

    picks = choose(given.spec, given.parallel, layout, graph, machine, exchanges, backends, payload_of)
    if not picks:
        reasons = reasons or never
        (first, *others) = reasons.items()
        if not others and isinstance(first[1], ConfigError):
            raise first[1]
        raise UnsupportedError(f"exchange {exchange} with backend {backend}", reasons)
    if tokens_per_rank is not None:
        fit = (each for each in picks if each.up_to is None or tokens_per_rank <= each.up_to)
        picks = [next(fit)._replace(up_to=None)]
    picks = merged(picks)
    taken = [plans[each.exchange, each.backend] for each in picks]
    choices = [
        replace(plan.choices[0], up_to=each.up_to, why=each.why) for plan, each in zip(taken, picks, strict=True)
    ]
    chosen = {("exchange", plan.exchange) for plan in taken} | {("backend", plan.backend) for plan in taken}
    options = [option._replace(chosen=(option.kind, option.name) in chosen) for option in taken[-1].options]
    return replace(taken[-1], choices=tuple(choices), options=tuple(options))


def _under(parallel: ParallelSpec) -> str:
    return f" under {parallel.label}"


def _against(error: UnsupportedError | ConfigError, given: _Given) -> list[str]:
    """A pair of names, each reason once whatever the other name is."""
    if isinstance(error, ConfigError):
        return [error.brief]
    if len(error.reasons) > 1:
        return list(error.reasons)
    return [f"{error.what.removesuffix(_under(given.parallel))}: {error.reasons[0]}"]


def _named(given: _Given, exchange: str, backend: str) -> Plan:
    spec, parallel, token_layout, payload, form, combine, graph, machine = given
    exchange_class, backend_class = EXCHANGES.get(exchange).for_layout(token_layout), BACKENDS.get(backend)
    placement = Placement.build(spec, parallel)
    check_nodes(parallel, machine)
    if apart := against(exchange, backend, token_layout):
        raise UnsupportedError(f"exchange {exchange} with backend {backend}{_under(parallel)}", [apart])

    travels = _travelling(spec, placement, token_layout, exchange_class, backend_class, payload)
    options = _options(spec, placement, token_layout, exchange, backend, travels, payload, combine, machine)
    refused = [option for option in options if option.chosen and not option.possible]
    if refused:
        what = " and ".join(f"{option.kind} {option.name}" for option in refused)
        fit = [option.name for option in options if option.possible and option.kind == refused[0].kind]
        reasons = [option.reason for option in refused]
        if len(refused) > 1:
            reasons = [f"{option.kind} {option.name}: {option.reason}" for option in refused]
        raise UnsupportedError(what + _under(parallel), reasons, fit or "none")
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
    token_layout: TokenLayout,
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
        support = _asked(EXCHANGES.is_foreign(name), candidate.supports, spec, placement, machine)
        if support.ok and (apart := against(name, backend, token_layout)):
            support = Support(False, apart)
        reason = support.reason
        if support.ok and name != exchange:
            converted = candidate.for_layout(token_layout).token_layout != token_layout and placement.world > 1
            reason = "not asked for" + (f"; would add a layout change from {token_layout}" if converted else "")
        options.append(Option("exchange", name, support.ok, name == exchange, reason))
    for name, found in BACKENDS.usable():
        given = (spec, placement, found, travels, payload, combine, machine)
        support = _asked(BACKENDS.is_foreign(name), _backend_support, *given)
        if support.ok and (apart := against(exchange, name, token_layout)):
            support = Support(False, apart)
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
    available = available_on(backend, machine)
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
