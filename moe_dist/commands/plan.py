"""`moe-dist plan`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NoReturn

from cyclopts import Parameter

from moe_dist import checkpoint
from moe_dist.bench.case import LISTS, Experiment, parse_placement
from moe_dist.bench.table import plain_table, size
from moe_dist.commands.asked import machine_for, single
from moe_dist.commands.config import override
from moe_dist.commands.flags import NO_SOURCE, NUMBER, ONE, Grid, Json, Overrides, Runtime, Source
from moe_dist.commands.printing import console, print_json
from moe_dist.commands.terminal import Terminal, say, to_standard_output
from moe_dist.engine.plan import Plan
from moe_dist.errors import ConfigError, ResourceError
from moe_dist.exits.exit_codes import OK
from moe_dist.machine.machine import GPUS, Machine
from moe_dist.messages.counts import count_of
from moe_dist.messages.printable import printable
from moe_dist.model.spec import MOST_RANKS, MoESpec, WorkloadSpec
from moe_dist.workloads.token_splits import most_tokens

MACHINE_HELP = f"A machine that is not this one: {', '.join(f'{name}x4' for name in GPUS)} or other numbers of GPUs."
PLACEMENT_HELP = "auto: which of TP, EP and their grids was fastest when measured, with exchange and backend likewise."
Auto = Annotated[Literal["auto"] | None, Parameter(help=PLACEMENT_HELP)]
HANDED_OVER = {
    "expert": ", rows are handed over sorted by expert",
    "layer": ", one kernel does the whole layer",
}  # by form of rows
WORLD_HELP = "Ranks that --placement auto is for (default: all GPUs of the machine)."
World = Annotated[int | None, NUMBER, Parameter(help=WORLD_HELP)]
Elsewhere = Annotated[str | None, Parameter(help=MACHINE_HELP)]


def plan(
    *overrides: Overrides,
    source: Source = NO_SOURCE,
    runtime: Runtime = None,
    grid: Grid = ONE,
    machine: Elsewhere = None,
    placement: Auto = None,
    world: World = None,
    json: Json = False,
) -> int:
    elsewhere = Machine.named(machine) if machine else None
    if elsewhere and source.device not in (None, "cuda"):
        raise ConfigError("--device", source.device, f"contradicts --machine {machine}", "one of the two")
    there = elsewhere or machine_for(override({}, overrides), source, runtime)
    asked = single(overrides, source, grid, runtime, machine=there, world=_ranks(placement, world, grid, there))
    cases = list(asked.experiment.cases("cpu" if asked.experiment.modes is None else asked.machine.device))
    (case,) = cases if len(cases) == 1 else _none_or_several(asked.experiment)
    made = case.plan(asked.machine)
    if elsewhere and made.placement.world > elsewhere.devices:
        raise ResourceError("GPUs", made.placement.world, elsewhere.devices, "Name a machine with more of them.")
    if case.source.checkpoint is not None and not checkpoint.Checkpoint(case.source.checkpoint).holds_weights:
        say(f"{case.source.checkpoint} holds no weights, so the layer's format is what its config.json says")
    if json:
        sent: dict[str, Any] = {"placement_why": list(asked.placement_why)} if asked.placement_why else {}
        sent |= {"layers": case.layers, "wire_bytes": _wire_bytes(made, case.workload), "chosen_by": asked.chosen_by}
        print_json(made.as_dict() | sent, indent=1)
    else:
        with to_standard_output():
            if asked.model_why:
                console().print(f"model {made.spec.name} ({asked.model_why})")
            for line in asked.placement_why:
                console().print(printable(line))
            print_plan(console(), made, case.workload, asked.why, case.layers)
    return OK


def _none_or_several(experiment: Experiment) -> NoReturn:
    """Raise ConfigError for the key that makes it so."""
    rule = "plan is for one configuration; compare takes lists"
    for key in LISTS:
        if len(values := getattr(experiment, key) or ()) > 1:
            names = [each.name if isinstance(each, MoESpec) else each for each in values]
            raise ConfigError(f"experiment.{key}", names, rule, "one value")
    if not any(parse_placement(each, experiment.worlds[0]) for each in experiment.placements):
        rule = f"has not the {count_of(experiment.worlds[0], 'rank')} of worlds"
        raise ConfigError("experiment.placements", list(experiment.placements), rule, "one world of tp·ep ranks")
    raise ConfigError("experiment", experiment.name, rule, "one value a key")


def _ranks(placement: str | None, world: int | None, grid: Grid, machine: Machine) -> int | None:
    """That `--placement auto` is for; None without it."""
    if placement is None:
        if world is not None:
            raise ConfigError("--world", world, "is of --placement auto; else ranks are tp x ep", "--tp and --ep")
        return None
    if (grid.tp, grid.ep) != (1, 1):
        raise ConfigError("--placement", placement, f"contradicts --tp {grid.tp} --ep {grid.ep}", "one of the two")
    if world is not None and not 1 <= world <= MOST_RANKS:
        raise ConfigError("--world", world, "is a number of ranks", f"1 to {MOST_RANKS:,}")
    return world or machine.devices


def _share(made: Plan, work: WorkloadSpec) -> int:
    """The most tokens of a rank."""
    if made.token_layout == "replicated":
        return work.tokens
    return most_tokens(work.tokens, made.placement.world, work.token_split, work.seed)


def _wire_bytes(made: Plan, work: WorkloadSpec) -> int:
    """That one rank sends at most: where shares differ, as if all were the largest."""
    return made.wire_bytes(work.tokens if work.token_split == "even" else _share(made, work) * made.placement.world)


def print_plan(console: Terminal, made: Plan, work: WorkloadSpec, chosen: str, layers: int = 1) -> None:
    """`chosen`: who chose the backend, if nobody named it. `layers`: of the stack."""
    spec, world = made.spec, made.placement.world
    shared = ", no shared expert" if spec.shared_experts == "none" else f", shared expert {spec.shared_experts}"
    console.print(
        f"{printable(spec.name)} {spec.quant_label}{shared}, as {made.parallel.label}, {made.token_layout} tokens:"
        f" exchange {made.exchange}, backend {made.backend}{f' ({chosen})' if chosen else ''}, rows travel as"
        f" {made.payload}, partial sums as {made.combine_dtype}"
        + HANDED_OVER.get(made.form, "")
        + (", with a change of token layout around it" if made.converts_layout else ""),
    )
    for choice in made.choices:
        if choice.why:
            sizes = "all sizes" if choice.up_to is None else f"up to {count_of(choice.up_to, 'token')} a rank"
            last = "larger steps" if choice.up_to is None and len(made.choices) > 1 else sizes
            console.print(f"auto, {last}: {choice.exchange} with {choice.backend}: {printable(choice.why)}")
    ranks = plain_table(columns=("rank", "experts", "slice of intermediate", "weights"))
    for rank in range(world):
        start, stop = made.placement.slice_of(rank)
        experts = len(made.placement.experts_of(rank))
        ranks.add_row(str(rank), str(experts), f"{start} to {stop}", size(made.weight_bytes(rank)))
    console.print(ranks)
    share = _share(made, work)
    window = made.window_bytes(share)
    shared_memory = f" and {size(window)} that ranks share" if window else ""
    console.print(
        f"{count_of(work.tokens, 'token')}: at most {made.most_rows(share)} (token, expert) pairs and about"
        f" {size(made.scratch_bytes(share))} of scratch{shared_memory} on a rank, at most"
        f" {size(_wire_bytes(made, work))} sent by one;"
        " CUDA graph: " + ("yes" if made.capturable.ok else f"no ({made.capturable.reason})"),
    )
    if layers > 1:
        console.print(f"a stack of {layers} layers: {layers} times these weights and bytes, and the same scratch")
    for name, source in made.tables().items():
        console.print(f"tuned: {source} {name}" if source else f"tuned: none, defaults (no {name})", soft_wrap=True)
    options = plain_table(columns=("choice", "name", "possible", "taken", "why not"))
    for option in made.options:
        taken = "yes" if option.chosen else ""
        possible = "yes" if option.possible else "no"
        options.add_row(option.kind, printable(option.name), possible, taken, printable(option.reason))
    console.print(options)
