"""What is settled before ranks start: what can't run, whether there is room, and how ranks are started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from moe_dist.bench.case import Case, Experiment
from moe_dist.bench.row import Refused
from moe_dist.bench.source import check_stored
from moe_dist.engine.plan import Plan
from moe_dist.errors import ConfigError, ResourceError, UnsupportedError
from moe_dist.machine.machine import Machine
from moe_dist.runtime.context import Group, RaySpec
from moe_dist.workloads.skew_names import ROUTINGS, several_routings
from moe_dist.workloads.token_splits import most_tokens

Shown = Callable[[str], None]


def plan_cases(cases: Iterable[Case], machine: Machine) -> tuple[list[tuple[Case, Plan]], list[Refused]]:
    """Everything that can be checked before a process starts. What can't run comes back with its reason."""
    planned: list[tuple[Case, Plan]] = []
    refused: list[Refused] = []
    for case in cases:
        try:
            planned.append((case, case.plan(machine)))
        except (UnsupportedError, ConfigError) as error:
            refused.append(Refused(case=case.label, reason=str(error)))
    for case in {(case.source, case.model, case.layers): case for case, _ in planned}.values():
        if case.source.checkpoint is not None and case.source.layer is not None:
            check_stored(case)
    if planned:
        _check_memory(planned, machine)
    return planned, refused


def _check_memory(planned: list[tuple[Case, Plan]], machine: Machine) -> None:
    """What will be there must fit before any of it is made: every layer's weights, a step's scratch, which they share,
    and tokens and routings, which every rank draws whole; on a CPU the whole group's in one memory. What ranks share
    stays when the next case begins."""
    held = []
    shared: dict[int, dict[str, int]] = {}  # by ranks of the group and exchange
    for case, plan in planned:
        work, world = case.workload, plan.placement.world
        routings = case.layers * (ROUTINGS if several_routings(work.skew) else 1)
        tokens = work.tokens * (4 * plan.spec.hidden + 8 * plan.spec.top_k * routings)
        sharded = work.token_layout == "sharded"
        share = most_tokens(work.tokens, world, work.token_split, work.seed) if sharded else work.tokens
        windows = shared.setdefault(world, {})
        windows[plan.exchange] = max(windows.get(plan.exchange, 0), plan.window_bytes(share))
        beside = tokens + plan.scratch_bytes(share) + sum(windows.values())
        ranks = [case.layers * plan.weight_bytes(rank) + beside for rank in range(world)]
        held.append((max(ranks) if machine.device == "cuda" else sum(ranks), beside))
    largest, beside = max(held)
    check_fits(largest, machine, "weights, tokens and scratch" if beside > largest // 10 else "weights")


def check_fits(size: int, machine: Machine, of: str = "weights") -> None:
    """Raise ResourceError if a GPU, or a CPU's memory, can't hold so many bytes."""
    available = machine.room
    if size > 0.9 * available:
        what = "GPU memory" if machine.device == "cuda" else "memory"
        gib = f"{size / 2**30:.1f} GiB of {of}", f"{available / 2**30:.1f} GiB"
        raise ResourceError(what, *gib, "Choose a smaller model, fewer layers or tokens, or more ranks.")


def machine_of_ranks(runtime: str, ray: RaySpec, device: str) -> Machine:
    """That ranks will be on: of the Ray cluster that is named, by `ray` or by RAY_ADDRESS, else this one."""
    if runtime == "ray" and (ray.address or os.environ.get("RAY_ADDRESS")):
        from moe_dist.runtime.cluster_machine import cluster_machine

        if (found := cluster_machine(ray, device)) is not None:
            return found
    return Machine.detect(device)


def group_starter(
    experiment: Experiment, machine: Machine, planned: list[tuple[Case, Plan]]
) -> Callable[[int, Shown], Group]:
    """How this experiment's ranks are started."""
    return starter(
        experiment.runtime, experiment.ray, machine, max((plan.placement.world for _, plan in planned), default=0)
    )


def starter(runtime: str, ray: RaySpec, machine: Machine, largest: int) -> Callable[[int, Shown], Group]:
    """How ranks are started. `largest`: of the groups that will be; none is started where it has no room. The
    runtime's library is imported only when it is chosen."""

    def start(world: int, shown: Shown) -> Group:
        if runtime == "torchrun":
            from moe_dist.runtime.torchrun_group import TorchrunGroup

            limits = ray.collective_timeout_s, ray.silence_timeout_s
            return TorchrunGroup(world, machine.device, *limits)
        from moe_dist.runtime.ray_group import RayGroup

        return RayGroup(world, machine.device, ray, shown, largest)

    return start
