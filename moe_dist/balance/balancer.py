"""Experts to ranks by their loads, with and without copies of the busiest."""

from __future__ import annotations

from collections.abc import Sequence

from moe_dist.errors import ConfigError
from moe_dist.messages.counts import count_of, verb
from moe_dist.model.spec import ParallelSpec, split_bounds

Homes = list[set[int]]


def balanced(loads: Sequence[float], parallel: ParallelSpec, redundant: int = 0) -> ParallelSpec:
    """The grid of `parallel` with a map of experts, and `redundant` copies, under which its groups of experts have
    loads that are about equal. `loads[e]` is expert e's, in any unit. Equal input gives equal output.

    The two greedy steps of DeepSeek's Expert Parallelism Load Balancer (EPLB, github.com/deepseek-ai/EPLB, its global
    policy). A copy more goes to the expert with the largest load per copy, `redundant` times. Then the largest load per
    copy first, each goes to the group with the least load that has room: longest processing time first (Graham, Bounds
    on Multiprocessing Timing Anomalies, 1969). Unlike in EPLB a group holds an expert at most once, and groups may
    differ by one in the number of their experts, as equal runs do.

    Raises ConfigError for loads that are none, for fewer experts than groups, and for more copies than groups have use
    for: each of them can hold each expert once.
    """
    experts, groups = len(loads), parallel.ep
    if any(not 0 <= load < float("inf") for load in loads):
        raise ConfigError("loads", list(loads), "a load is no finite number from 0 on", "0 and more")
    if experts < groups:
        raise ConfigError(
            "parallel.ep",
            groups,
            f"{count_of(experts, 'expert')} {verb(experts, 'leave')} a rank with none",
            f"1 to {experts}",
        )
    if not 0 <= redundant <= experts * (groups - 1):
        rule = f"{groups} groups hold each of {experts} experts once at most"
        raise ConfigError("redundant", redundant, rule, f"0 to {experts * (groups - 1)}")
    homes = _packed(loads, _copies(loads, groups, redundant), groups)
    held = [[group for group, home in enumerate(homes) if expert in home] for expert in range(experts)]
    changed: ParallelSpec = parallel.with_changes(
        expert_map=tuple(each[0] for each in held),
        replicas={expert: tuple(each[1:]) for expert, each in enumerate(held) if len(each) > 1},
    )
    return changed


def _copies(loads: Sequence[float], groups: int, redundant: int) -> list[int]:
    copies = [1] * len(loads)
    for _ in range(redundant):
        free = (expert for expert in range(len(loads)) if copies[expert] < groups)
        copies[max(free, key=lambda expert: loads[expert] / copies[expert])] += 1
    return copies


def _packed(loads: Sequence[float], copies: Sequence[int], groups: int) -> Homes:
    """The experts of each group."""
    share = [load / count for load, count in zip(loads, copies, strict=True)]
    room = [stop - start for start, stop in split_bounds(sum(copies), groups)]
    homes: Homes = [set() for _ in range(groups)]
    sums = [0.0] * groups
    for expert in sorted(range(len(loads)), key=lambda expert: -share[expert]):
        for _ in range(copies[expert]):
            fit = [group for group in range(groups) if len(homes[group]) < room[group]]
            free = [group for group in fit if expert not in homes[group]]
            if not free:
                free = [_make_room(expert, fit[0], homes, share, sums)]
            chosen = min(free, key=lambda group: sums[group])
            homes[chosen].add(expert)
            sums[chosen] += share[expert]
    return homes


def _make_room(expert: int, holder: int, homes: Homes, share: Sequence[float], sums: list[float]) -> int:
    """Where every group with room holds the expert already: another expert of a full group without it moves to
    `holder`, which has room. There is one: a full group has as many experts as `holder` or more, and one of them is in
    the place of `expert`. It is the one after which the busier of the two groups has the least load."""
    moves = [
        (max(sums[holder] + share[moved], sums[group] - share[moved] + share[expert]), group, moved)
        for group, home in enumerate(homes)
        if expert not in home
        for moved in sorted(home - homes[holder])
    ]
    _, group, moved = min(moves)
    homes[group].remove(moved)
    homes[holder].add(moved)
    sums[group] -= share[moved]
    sums[holder] += share[moved]
    return group
