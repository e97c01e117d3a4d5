"""`moe-dist balance`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from moe_dist.backends import BACKENDS
from moe_dist.balance.balancer import balanced
from moe_dist.balance.loads import RankLoads, expert_loads
from moe_dist.balance.placement_file import KEYS, KIND, placement_text, read_placement
from moe_dist.bench.case import check_step
from moe_dist.bench.draws import shortage
from moe_dist.bench.output import open_output
from moe_dist.bench.roofline import balanced_floor_us, floor_us, group_work, of_shared
from moe_dist.bench.table import number, plain_table, size
from moe_dist.commands.call import ThisCall
from moe_dist.commands.config import find_model
from moe_dist.commands.flags import BACKEND_NAMES, NUMBER, PREDICTED, SKEWS_HELP, Calibrate, Ep, Json, Model, Tp
from moe_dist.commands.printing import console, print_json, write_once
from moe_dist.commands.terminal import Terminal, say, show, to_standard_output
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.exits.exit_codes import OK
from moe_dist.messages.counts import count_of, verb
from moe_dist.messages.printable import printable
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec, WorkloadSpec, split_bounds
from moe_dist.simulate.calibration import Calibration, calibration
from moe_dist.simulate.cost import left_out
from moe_dist.simulate.gain import EXCHANGE, Change, Gain, Sweep, steps_to_pay
from moe_dist.workloads.skew_names import drawn_skew
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.traces import read_trace, trace_of

DEVICE = "NVIDIA H200"  # whose floors are said; the only one with measured peaks
MOST_GBPS = 1e5

Redundant = Annotated[int, NUMBER, Parameter(help="Copies of busy experts, over all groups of ranks together.")]
Tokens = Annotated[int, NUMBER, Parameter(help="Global tokens of a step.")]
Skew = Annotated[str, Parameter(help=SKEWS_HELP)]
Backend = Annotated[str, Parameter(help=f"Whose step the gain is predicted of: {BACKEND_NAMES}.")]
Gbps = Annotated[
    float | None,
    Parameter(help=f"GB/s at which weights move to a rank (default: what {EXCHANGE} was measured to reach)."),
]
Out = Annotated[str | None, Parameter(help="Save the placement in this file, for placements=[map:FILE].")]


@dataclass(frozen=True)
class Predicted:
    """What rows of measured steps say of a change. `from_zipf`: see Sweep.break_even."""

    gpu: str
    backend: str
    gain: Gain
    move_gbps: float
    steps_to_pay: int | None
    from_zipf: float | None
    beyond: list[str]
    made: Calibration


def balance(
    *,
    model: Model = PREDICTED,
    tp: Tp = 1,
    ep: Ep = 4,
    tokens: Tokens = 8192,
    skew: Skew = "zipf:1.2",
    redundant: Redundant = 0,
    backend: Backend = "cutlass",
    move_gbps: Gbps = None,
    calibrate: Calibrate = None,
    out: Out = None,
    json: Json = False,
    call: ThisCall,
) -> int:
    if move_gbps is not None and not 0 < move_gbps <= MOST_GBPS:
        raise ConfigError("move_gbps", move_gbps, "is no rate", f"above 0 to {MOST_GBPS:,.0f}")
    BACKENDS.get(backend)
    spec, before = find_model(model), ParallelSpec(tp=tp, ep=ep)
    if ep == 1:
        rule = "is one group of ranks, which has nothing to even out"
        raise ConfigError("parallel.ep", ep, rule, f"2 to {spec.num_experts}")
    known = drawn_skew(skew)
    work = WorkloadSpec(tokens=tokens, skew=known, trace=trace_of(known))
    check_step(tokens, spec)
    Placement.build(spec, before)
    made_for, judged_on = _routings(spec, work)
    change = Change(spec, before, balanced(expert_loads(made_for, spec.num_experts), before, redundant))
    output = None if out is None else open_output(out, say, call.descriptors, (), older=_older)
    found: Predicted | str
    try:
        found = _predicted(change, calibration(calibrate), backend, judged_on, redundant, move_gbps)
    except (ConfigError, UnsupportedError) as error:
        if calibrate is not None:
            raise
        found = str(error)
    if output is not None:
        write_once(output, placement_text(change.after))
    apart = made_for is not judged_on
    if json:
        print_json(_document(change, work, judged_on, apart, found))
    else:
        with to_standard_output():
            print_balance(console(), change, work, judged_on, apart, found)
            _print_next(console(), model, change, work, out)
    return OK


def _routings(spec: MoESpec, work: WorkloadSpec) -> tuple[Routing, Routing]:
    """What the placement is made for, and the step that it is judged on. Of a trace with twice the step's rows they are
    apart, as in use: the first half, and rows of the second. The first layer of several. Else they are one."""
    if not work.skew.startswith("file:"):
        drawn = synthetic_routing(spec, work.tokens, work.skew, work.seed)
        return drawn, drawn
    trace = read_trace(spec, work.skew)
    half = trace.rows // 2
    if half < work.tokens:
        whole = trace.routing(0, 0, work.tokens)
        return whole, whole
    return trace.routing(0, 0, half), trace.routing(0, half, work.tokens)


def _predicted(
    change: Change, made: Calibration, backend: str, routing: Routing, redundant: int, move_gbps: float | None
) -> Predicted:
    gain = change.gain(made.model, backend, routing, routing.tokens)
    gbps = move_gbps or made.model.link(EXCHANGE).gbps
    if gbps is None:
        rule = f"has no default here: in the measured rows bytes of {EXCHANGE} cost nothing"
        raise ConfigError("move_gbps", None, rule, "a rate in GB/s")
    return Predicted(
        gpu=made.model.gpu,
        backend=backend,
        gain=gain,
        move_gbps=gbps,
        steps_to_pay=steps_to_pay(gain, max(change.moved_bytes()), gbps),
        from_zipf=Sweep(made.model, backend, change.spec, change.before, redundant, routing.tokens).break_even(),
        beyond=made.model.beyond(change.work(routing, routing.tokens)[0]) + left_out(change.spec),
        made=made,
    )


def _older(path: Path) -> str:
    """What is there, for the line that says that it is overwritten. ConfigError for anything but a placement."""
    try:
        read_placement(str(path))
    except ConfigError:
        rule = "is there already and is no placement of moe-dist; it is not overwritten"
        raise ConfigError("out", str(path), rule, "a new name, or an earlier placement") from None
    return "an earlier placement"


def _floors(change: Change, loads: Sequence[RankLoads], tokens: int) -> dict[str, float | None]:
    """µs, on the one device whose peaks are known: before, after, and with the experts of before spread perfectly."""
    spec, first = change.spec, change.placements[0]
    own = [stop - start for start, stop in split_bounds(tokens, first.world)]
    beside = of_shared(spec, change.before, tokens, own)
    before, after = (
        group_work(spec, placement, each.pairs, each.active, beside)
        for placement, each in zip(change.placements, loads, strict=True)
    )
    return {
        "before": floor_us(spec, before, DEVICE),
        "after": floor_us(spec, after, DEVICE),
        "perfect": balanced_floor_us(spec, first, before, DEVICE),
    }


def _document(
    change: Change, work: WorkloadSpec, routing: Routing, apart: bool, found: Predicted | str
) -> dict[str, Any]:
    loads = change.loads(routing)
    document: dict[str, Any] = {
        "model": change.spec.name,
        "grid": change.before.label,
        "placement": change.after.label,
        "parallel": change.after.model_dump(mode="json", include=set(KEYS)),
        "global_tokens": work.tokens,
        "skew": work.skew,
        "trace_short": shortage(change.spec, work, several=False),
        "judged_on_other_rows": apart,
        **{
            name: {"pairs": each.pairs, "active_experts": each.active, "imbalance": each.imbalance}
            for name, each in zip(("before", "after"), loads, strict=True)
        },
        "floor_us": _floors(change, loads, routing.tokens) | {"gpu": DEVICE},
        "moved_bytes": change.moved_bytes(),
        "predicted": None,
    }
    if isinstance(found, str):
        return document | {"not_predicted": found}
    keys = ("gpu", "backend", "move_gbps", "steps_to_pay", "from_zipf", "beyond")
    gain = asdict(found.gain) | {"gain_us": found.gain.gain_us, "seen": found.gain.seen}
    predicted = {key: getattr(found, key) for key in keys} | {"exchange": EXCHANGE}
    return document | {"predicted": predicted | gain | {"calibration": found.made.as_dict()}}


def print_balance(
    console: Terminal, change: Change, work: WorkloadSpec, routing: Routing, apart: bool, found: Predicted | str
) -> None:
    first, second = loads = change.loads(routing)
    title = f"{change.spec.name} {change.spec.quant_label} as {change.before.label}"
    title += f", {count_of(work.tokens, 'token')}, routing {work.skew}"
    console.print(printable(title), style="bold", soft_wrap=True)
    if said := shortage(change.spec, work, several=False):
        console.print(f"The trace is short: {said}.")
    show(console, loads_table(change, first, second))
    console.print(
        f"Imbalance, most pairs of a rank over the mean: {first.imbalance:.2f} before, {second.imbalance:.2f} after."
    )
    floors = {name: number(us) for name, us in _floors(change, loads, routing.tokens).items()}
    console.print(
        f"Floor of the busiest rank on {DEVICE}: {floors['before']} µs before, {floors['after']} after,"
        f" {floors['perfect']} with perfect balance and no copies."
    )
    console.print(
        "The placement is made for the first half of the trace and judged on the second."
        if apart
        else "The placement is judged on the loads that it was made for: loads that change gain less."
    )
    if isinstance(found, str):
        console.print(printable(f"No gain is predicted: {found}"))
        return
    _print_predicted(console, change, found)


def loads_table(change: Change, before: RankLoads, after: RankLoads) -> Table:
    """Of each rank, under both placements."""
    table = plain_table()
    for name in ("rank", "pairs before", "active", "pairs after", "active", "experts after", "weights to it"):
        table.add_column(name, justify="right")
    held = change.placements[1]
    for rank, moved in enumerate(change.moved_bytes()):
        cells = (rank, before.pairs[rank], before.active[rank], after.pairs[rank], after.active[rank])
        experts = len(held.experts_of(rank))
        table.add_row(*(f"{value:,}" for value in (*cells, experts)), size(moved))
    return table


def _print_predicted(console: Terminal, change: Change, found: Predicted) -> None:
    gain, moved = found.gain, max(change.moved_bytes())
    share = gain.gain_us / gain.before_us
    console.print(
        f"Predicted, not measured, on {found.gpu} with {EXCHANGE} and {found.backend}: a step takes"
        f" {number(gain.before_us)} µs before and {number(gain.after_us)} after ({share:+.1%} gained); scatter explains"
        f" {number(gain.scatter_us)} µs."
    )
    if found.steps_to_pay is None:
        console.print("Nothing is gained that could pay for moving weights.")
    else:
        console.print(
            f"Break-even: {size(moved)} of weights come to a rank, at {found.move_gbps:,.0f} GB/s as long as"
            f" {count_of(found.steps_to_pay, 'step')} {verb(found.steps_to_pay, 'gain')} (predicted)."
        )
    known = "up to zipf:2 no skew" if found.from_zipf is None else f"zipf:{found.from_zipf:g} and steeper"
    console.print(f"Break-even skew: {known} would gain more than scatter explains on later tokens (predicted).")
    if found.beyond:
        console.print(f"Beyond what was measured: {'; '.join(found.beyond)}.")
    for line in found.made.lines():
        console.print(line)


def _print_next(console: Terminal, model: str, change: Change, work: WorkloadSpec, out: str | None) -> None:
    if out is None:
        console.print("--out FILE saves the placement, to measure it.")
        return
    grid = f"tp{change.before.tp}xep{change.before.ep}"
    lists = {"worlds": [change.before.world], "placements": [grid, KIND + out], "tokens": [work.tokens],
             "skews": [work.skew]}  # fmt: skip
    keys = [quote(f"{key}={dumps(values)}") for key, values in lists.items()]
    command = f"moe-dist compare --model {quote(model)} {' '.join(keys)} --wide"
    console.print(f"To measure it: {printable(command)}", soft_wrap=True)
