"""What runs where nobody named it: the backend and the mode that go with this machine. What is named stays."""

from __future__ import annotations

from moe_dist.backends import BACKENDS
from moe_dist.bench.case import Case, Experiment
from moe_dist.engine.plan import Plan
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.machine.machine import Machine

FASTEST, EVERYWHERE = "triton", "torch"


def default_backend(experiment: Experiment, machine: Machine) -> tuple[str, str]:
    """The name, and why. On a Hopper GPU ours, if it serves every case that could run here at all; else plain torch."""
    if machine.device == "cpu":
        return EVERYWHERE, "default on this machine"
    available = BACKENDS.get(FASTEST).available(machine.device)
    if not available.ok:
        return EVERYWHERE, f"default on this machine; {FASTEST}: {available.reason}"
    for case in experiment.with_changes(modes=("eager",), backends=(EVERYWHERE,)).cases(machine.device):
        reason = _refusal(case.with_changes(backend=FASTEST), machine)
        if reason and not _refusal(case, machine):
            return EVERYWHERE, f"default here, because {reason}"
    return FASTEST, "default on this machine"


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


def _refusal(case: Case, machine: Machine) -> str:
    found = _planned(case, machine)
    return "" if isinstance(found, Plan) else found
