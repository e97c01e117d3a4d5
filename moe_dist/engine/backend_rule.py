"""Which backend serves where neither a name nor a measured row decides. It is settled here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from moe_dist.backends import BACKENDS, Backend
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.machine.machine import Machine
from moe_dist.step import Support

FASTEST, EVERYWHERE = "triton", "torch"  # ours that needs nothing compiled, and the one that runs anywhere
DEFAULT = (FASTEST, EVERYWHERE)  # of who named no backend: nothing is compiled for him that he did not ask for
UNMEASURED = ("cutlass", *DEFAULT)  # of `auto` without rows: ahead at prefill, level at decode, where it is built
Refusal = Callable[[str], str]  # why a case can't run with the backend of this name; empty: it can


class Ruled(NamedTuple):
    """The backend that the rule gives. `reason`: why it is none of those before it; empty where it is the first."""

    backend: str
    reason: str


def first_that_serves(order: Sequence[str], cases: Iterable[Refusal]) -> Ruled:
    """The first of `order` that serves every case that the last one serves; a case that not even the last one serves
    decides nothing."""
    *better, last = order
    given, reason = list(cases), ""
    for name in better:
        against = next((said for refusal in given if (said := refusal(name)) and not refusal(last)), "")
        if not against:
            return Ruled(name, reason)
        reason = reason or against
    return Ruled(last, reason)


def default_backend(machine: Machine, cases: Iterable[Refusal]) -> Ruled:
    """For cases whose backend nobody named: triton on a GPU that it can serve, else torch. On a CPU there is no choice
    and no reason."""
    if machine.device != "cuda":
        return Ruled(EVERYWHERE, "")
    available = available_on(BACKENDS.get(FASTEST), machine)
    if not available.ok:
        return Ruled(EVERYWHERE, f"{FASTEST}: {available.reason}")
    return first_that_serves(DEFAULT, cases)


def refusal_of(plan: Callable[[str], object]) -> Refusal:
    """Of a case that `plan` makes the plan of, given a backend's name."""

    def refusal(name: str) -> str:
        try:
            plan(name)
        except (UnsupportedError, ConfigError) as error:
            return error.brief
        return ""

    return refusal


def available_on(backend: type[Backend], machine: Machine) -> Support:
    """Whether it can run there at all; of a machine that is not here, what is installed is taken for granted."""
    return Support(True) if machine.elsewhere else backend.available(machine.device)
