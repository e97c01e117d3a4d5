"""What `auto` takes as placement: by rows measured on such a machine, else by a rule, and it says which."""

from __future__ import annotations

from collections.abc import Collection
from math import log
from typing import NamedTuple

from moe_dist.engine.planning import make_plan
from moe_dist.engine.records import Record, Setting, Timed, records, tied
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.machine.machine import Machine
from moe_dist.messages.counts import count_of
from moe_dist.model.placement import Placement
from moe_dist.model.spec import MoESpec, ParallelSpec, TokenLayout

RULE = "EP where every rank gets an expert, else TP, else the grid with most groups"


class Placed(NamedTuple):
    """The placement, and why it is this one."""

    parallel: ParallelSpec
    why: str


def grids(world: int) -> list[ParallelSpec]:
    """Every TP x EP of so many ranks, EP first, then TP, then those with most groups of experts."""
    found = [ParallelSpec(tp=world // ep, ep=ep) for ep in range(world, 0, -1) if world % ep == 0]
    return [found[0], *found[-1:], *found[1:-1]] if len(found) > 1 else found


def choose_placement(
    spec: MoESpec,
    world: int,
    token_layout: TokenLayout,
    graph: bool,
    machine: Machine,
    tokens_per_rank: int,
    exchanges: Collection[str] | None = None,
    backends: Collection[str] | None = None,
) -> Placed:
    """Of all grids of `world` ranks, for steps of this size, run by one of these names (None: by any that can serve).

    The first record that has rows of two placements of such a layer at one size decides, the user's own before the
    shipped ones; rows of the other mode, graph or eager, only where it has none of this one. Of its sizes the nearest
    by ratio counts. Without any, a rule does. Raises ConfigError for a broken record, and where no grid of so many
    ranks can hold the layer."""
    possible = [parallel for parallel in grids(world) if _fits(spec, parallel)]
    if not possible:
        Placement.build(spec, grids(world)[0])  # which says why
    if len(possible) == 1:
        return Placed(possible[0], "the only grid of so many ranks that can hold such a layer")
    payloads: dict[tuple[ParallelSpec, str, str], str | None] = {}

    def serves(parallel: ParallelSpec, row: Timed) -> bool:
        if (exchanges is not None and row.exchange not in exchanges) or (
            backends is not None and row.backend not in backends
        ):
            return False
        key = parallel, row.exchange, row.backend
        if key not in payloads:
            payloads[key] = _payload(spec, *key, token_layout, machine)
        return payloads[key] == row.payload

    nearest = [Setting.nearest(machine.device_name, spec, each, token_layout, graph) for each in possible]
    for record in records():
        for settings in zip(*nearest, strict=True):
            found = {}
            for parallel, setting in zip(possible, settings, strict=True):
                found[parallel] = [row for row in record.rows.get(setting, ()) if serves(parallel, row)]
            if (placed := _fastest(record, found, tokens_per_rank)) is not None:
                return placed._replace(why=placed.why + settings[0].unlike(spec, graph))
    why = f"by rule ({RULE}), as no two placements of such a layer were measured on such a machine"
    return Placed(possible[0], f"{why}; moe-dist compare --remember measures some")


def _fits(spec: MoESpec, parallel: ParallelSpec) -> bool:
    try:
        Placement.build(spec, parallel)
    except ConfigError:
        return False
    return True


def _payload(
    spec: MoESpec, parallel: ParallelSpec, exchange: str, backend: str, token_layout: TokenLayout, machine: Machine
) -> str | None:
    """How rows would travel; None where these names can't serve."""
    try:
        plan = make_plan(spec, parallel, exchange=exchange, backend=backend, token_layout=token_layout, machine=machine)
    except (UnsupportedError, ConfigError):
        return None
    return plan.payload


def _fastest(record: Record, found: dict[ParallelSpec, list[Timed]], tokens_per_rank: int) -> Placed | None:
    """None where no size has rows of two placements."""
    sizes = {size for rows in found.values() for size in {row.tokens_per_rank for row in rows}}
    compared = {size: best for size in sizes if len(best := _best(found, size)) > 1}
    if not compared:
        return None
    size = min(compared, key=lambda each: abs(log(max(each, 1) / max(tokens_per_rank, 1))))
    (parallel, first), *others = compared[size]
    parts = [f"{first.p50_us:,.0f} µs with {first.exchange} and {first.backend}"]
    for other, row in others:
        tie = " (a tie)" if tied(first, row) else ""
        more = row.p50_us / first.p50_us - 1
        parts.append(f"{other.label} {more:.0%} more{tie} with {row.exchange} and {row.backend}")
    where = f"at {count_of(size, 'token')} a rank, even routing"
    return Placed(parallel, f"{', '.join(parts)}, {where}; {record.source} record {record.name}")


def _best(found: dict[ParallelSpec, list[Timed]], size: int) -> list[tuple[ParallelSpec, Timed]]:
    """Of each placement its fastest row at this size, the fastest first."""
    rows = {parallel: [row for row in rows if row.tokens_per_rank == size] for parallel, rows in found.items()}
    best = [(parallel, min(of, key=lambda row: row.p50_us)) for parallel, of in rows.items() if of]
    return sorted(best, key=lambda pair: pair[1].p50_us)
