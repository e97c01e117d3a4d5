"""What runs where nobody named it: the backend and the mode that go with this machine. What is named stays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import product
from typing import Any

from moe_dist.backends import BACKENDS
from moe_dist.bench.case import Case, Experiment
from moe_dist.bench.rounds import ROOM
from moe_dist.engine import backend_rule
from moe_dist.engine.backend_rule import EVERYWHERE, Refusal, refusal_of
from moe_dist.engine.placing import choose_placement
from moe_dist.engine.plan import Plan
from moe_dist.engine.planning import AUTO
from moe_dist.errors import ConfigError, MoeDistError, UnsupportedError
from moe_dist.machine.machine import HOPPER, Machine
from moe_dist.messages.counts import count_of
from moe_dist.model.spec import MoESpec
from moe_dist.model.weights import ExpertWeights
from moe_dist.workloads.token_splits import most_tokens

OURS = ("triton", "cutlass")  # what `compare` without a file takes on a Hopper GPU
WHOLE = ("fused", "deep_gemm_mega")  # beside them, on several: another package's kernel of the whole layer
# Models of who names none. On GPUs the first that fits; both have recorded rows and tuning tables, and a larger one
# would say less, as others can't compare with it. On a CPU a layer of seconds.
MODELS, SMALL = ("DeepSeek-V3", "Qwen3-30B-A3B"), "tiny"
DECODE, PREFILL = 16, 2048  # its tokens a rank


def default_model(machine: Machine, find: Callable[[str], MoESpec], world: int, layers: int = 1) -> str:
    """The name of what every command that measures, plans or tunes takes where no model is named, for so many ranks and
    layers: on GPUs the largest of MODELS that fits, and the smallest of them where none does. `find`: a known model by
    its name."""
    if machine.device == "cpu":
        return SMALL
    return next((name for name in MODELS if _fits(find(name), world, layers, machine)), MODELS[-1])


def default_experiment(machine: Machine, router: bool) -> dict[str, Any]:
    """What `compare` does without a file, beside its model. On a CPU it is small enough for two minutes on two cores;
    on GPUs it is over all of them, decode and prefill. `router`: the weights come with one."""
    skews = ["router"] * router + ["uniform", "zipf:1.2"]
    if machine.device == "cpu":
        return {"worlds": [2, 4], "tokens": [16], "skews": skews, "iters": 100}
    world = machine.devices
    hopper, several = machine.capability == HOPPER, world > 1
    exchanges, backends = ["ag_rs", "all_to_all", "nvlink"] if several else ["local"], list(OURS)
    if hopper and several:
        exchanges, backends = [*exchanges, WHOLE[0]], [*backends, WHOLE[1]]
    return {
        "worlds": [world],
        "exchanges": exchanges,
        "tokens": [DECODE * world, PREFILL * world],
        "skews": skews,
        "iters": 50,
        **({"backends": backends, "modes": ["graph"]} if hopper else {"backends": [EVERYWHERE]}),
    }


def build_quickly(names: Iterable[str], machine: Machine, say: Callable[[str], None]) -> None:
    """Those backends that are built within a minute, so that an answer has the fastest ones in it. `say` is told which
    could not be built and why; they are left out with that reason."""
    for name in names:
        backend = BACKENDS.get(name)
        if backend.quick_build and not backend.available(machine.device).ok:
            try:
                backend.build()
            except MoeDistError as error:
                say(f"goes on without backend {name}: {error}")


def _fits(spec: MoESpec, world: int, layers: int, machine: Machine) -> bool:
    """Whether a rank's share under TP and under EP have room beside each other, as they take turns in `compare`; the
    rule is the same for all commands, so that one name means one layer."""
    whole = layers * ExpertWeights.bytes_of(spec, spec.num_experts, spec.intermediate)
    return 2 * whole <= ROOM * world * (machine.memory or 0)


def default_backend(experiment: Experiment, machine: Machine) -> tuple[str, str]:
    """For all of its cases, by the rule of `engine.backend_rule`: the name, and why."""
    cases = experiment.with_changes(modes=("eager",), backends=(EVERYWHERE,)).cases(machine.device)
    name, reason = backend_rule.default_backend(machine, (_refusal(case, machine) for case in cases))
    where = "default on such a machine" if machine.elsewhere else "default on this machine"
    return name, f"{where}; {reason}" if reason else where


def settle_placements(
    experiment: Experiment, machine: Machine, backends: Collection[str] | None
) -> tuple[Experiment, list[str]]:
    """In place of `auto`, the placements that were fastest at any of its sizes, by `engine.placing`, and a line for
    each of why. `backends`: None where nobody has named any. Raises ConfigError as `choose_placement`."""
    exchanges = None if AUTO in experiment.exchanges else experiment.exchanges
    graph = machine.device == "cuda" if experiment.modes is None else "graph" in experiment.modes
    taken: dict[str, None] = {}
    lines: dict[str, None] = {}
    steps = product(
        experiment.models, experiment.worlds, experiment.token_layouts, experiment.token_splits, experiment.tokens
    )
    for model, world, layout, split, tokens in steps:
        share = most_tokens(tokens, world, split, experiment.seed) if layout == "sharded" else tokens
        named = None if backends is None or AUTO in backends else backends
        placed = choose_placement(model, world, layout, graph, machine, share, exchanges, named)
        taken[f"tp{placed.parallel.tp}xep{placed.parallel.ep}"] = None
        where = f"{count_of(world, 'rank')}, {count_of(share, 'token')} a rank"
        lines[f"placement {placed.parallel.label} of {where}: {placed.why}"] = None
    names = [name for each in experiment.placements for name in (taken if each == AUTO else (each,))]
    return experiment.with_changes(placements=tuple(names)), list(lines)


def default_modes(experiment: Experiment, machine: Machine) -> tuple[tuple[str, ...], str]:
    """Eager alone where no case can be captured in a CUDA graph, and why; else both."""
    reasons = []
    for case in experiment.with_changes(modes=("eager",)).cases(machine.device):
        plan = _planned(case, machine)
        if not isinstance(plan, Plan) or plan.capturable.ok:  # what can't run at all is said elsewhere
            return ("eager", "graph"), ""
        reasons.append(plan.capturable.reason)
    return ("eager",), f"default here, because {reasons[0]}" if reasons else ""


def _planned(case: Case, machine: Machine) -> Plan | str:
    try:
        return case.plan(machine)
    except (UnsupportedError, ConfigError) as error:
        return str(error)


def _refusal(case: Case, machine: Machine) -> Refusal:
    return refusal_of(lambda name: case.with_changes(backend=name).plan(machine))
