"""A group of Ray actors that is used again and again: a fault in it, what comes of that, and its successor."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from faults.inject import Injector
from faults.kinds import COLLECTIVE_S, KINDS, Fault
from faults.outcome import Outcome, marked, shared_memory, wait_gone
from faults.work import healthy, load, work
from ray.util import placement_group_table

from moe_dist.errors import MoeDistError, RankFailure
from moe_dist.runtime import ray_group
from moe_dist.runtime.actor import RankActor
from moe_dist.runtime.context import RankFunction, RaySpec
from moe_dist.runtime.ray_group import RayGroup

SPEC = RaySpec(collective_timeout_s=COLLECTIVE_S, start_timeout_s=120.0)


def silent(_: str) -> None:
    pass


class Doomed(RankActor):
    """One that may fail before there is a group."""

    fault: Fault

    def join(self, *arguments: Any) -> None:
        Injector(self.fault, self.rank).at("before")
        super().join(*arguments)


def doomed(fault: Fault) -> type[RankActor]:
    return type("Doomed", (Doomed,), {"fault": fault})


class Bench:
    """`load` gets a fault and what is `given` to it, `work` a fault and one of `works`. `left`: what else must not be
    left behind."""

    def __init__(
        self,
        world: int,
        device: str = "cpu",
        spec: RaySpec = SPEC,
        *,
        load: RankFunction = load,
        work: RankFunction = work,
        given: tuple[Any, ...] = (),
        works: Sequence[tuple[Any, ...]] = ((),),
        left: Callable[[], list[str]] = list,
        call_s: float = 60.0,
    ) -> None:
        self._load, self._work, self._given, self._works, self._left = load, work, given, works, left
        self._call_s = call_s
        self.memory = shared_memory()
        self.group = RayGroup(world, device, spec)
        self.group.prepare(load, healthy(world=world), *given, timeout_s=call_s, shown=silent)
        self.references = self._healthy()

    @property
    def reference(self) -> list[str]:
        """Of the first kind of work."""
        return self.references[0]

    def _run(self, function: RankFunction, *arguments: Any) -> list[str]:
        return self.group.run(function, *arguments, timeout_s=self._call_s, shown=silent)

    def _healthy(self) -> list[list[str]]:
        return [self._run(self._work, healthy(world=self.group.world), *each) for each in self._works]

    def tried(self, fault: Fault, *of_work: Any) -> Outcome:
        outcome = Outcome(fault, "ray")
        pids = [place["pid"] for place in self.group.places]
        try:
            outcome.results = self._with(fault, of_work)
        except MoeDistError as error:
            ended = time.monotonic()
            _told(outcome, error)
            if fault.moment == "before":
                pids = [pid for _, pid in [marked(fault) or (0.0, 0)] if pid]
            outcome.gone_s, left = wait_gone(pids)
            outcome.left += left
        else:
            ended = time.monotonic()
        if (struck := marked(fault)) is not None:
            outcome.named_s = ended - struck[0]
        elif fault.kind != "none":
            outcome.left.append("the fault never happened")
        if KINDS[fault.kind].error:
            self._again(outcome)
        return outcome

    def _with(self, fault: Fault, of_work: tuple[Any, ...]) -> list[str]:
        if fault.moment == "before":
            ray_group.RankActor = doomed(fault)  # type: ignore[misc]
            try:
                self.group.recover()
            finally:
                ray_group.RankActor = RankActor  # type: ignore[misc]
        if fault.moment == "loading":
            self._run(self._load, fault, *self._given)
        return self._run(self._work, fault, *of_work)

    def _again(self, outcome: Outcome) -> None:
        """Nothing is left, and the group's successor gives the same bits."""
        live = [entry for entry in placement_group_table().values() if entry["state"] != "REMOVED"]
        outcome.left += [f"{len(live)} placement groups"] if live else []
        outcome.left += [f"/dev/shm/{name}" for name in shared_memory() - self.memory]
        outcome.left += self._left()
        begin = time.monotonic()
        self.group.recover()
        outcome.again_s = time.monotonic() - begin
        if self._healthy() != self.references:
            outcome.left.append("other bits after recovery")


def _told(outcome: Outcome, error: MoeDistError) -> None:
    outcome.error, outcome.cause = type(error).__name__, str(error)
    outcome.rank = error.raised_on
    if isinstance(error, RankFailure):
        outcome.rank, outcome.op, outcome.seq, outcome.cause = error.rank, error.op, error.seq, error.cause
