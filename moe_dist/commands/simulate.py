"""`moe-dist simulate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from moe_dist.backends import BACKENDS
from moe_dist.bench.draws import shortage
from moe_dist.bench.row import Refused
from moe_dist.bench.table import number, plain_table, refused_table
from moe_dist.commands.config import find_model
from moe_dist.commands.flags import BACKEND_NAMES, NAMES, NUMBERS, PREDICTED, SKEWS_HELP, Calibrate, Json, Model
from moe_dist.commands.printing import console, print_json
from moe_dist.commands.terminal import Terminal, show, to_standard_output
from moe_dist.errors import ConfigError
from moe_dist.exchange import EXCHANGES
from moe_dist.exits.exit_codes import BAD_INPUT, OK
from moe_dist.messages.printable import printable
from moe_dist.model.spec import MOST_TOKENS, MoESpec, WorkloadSpec
from moe_dist.simulate.calibration import Calibration, calibration
from moe_dist.simulate.cluster import FORM, Cluster, Network
from moe_dist.simulate.predict import SAMPLE, Prediction, Wanted, predictions
from moe_dist.workloads.skew_names import drawn_skew
from moe_dist.workloads.traces import trace_of

MOST_GBPS, MOST_US = 10_000.0, 1e6

Elsewhere = Annotated[str, Parameter(help=f"What is simulated: {FORM}.")]
Gbps = Annotated[
    float | None,
    Parameter(help="GB/s that each GPU's adapter carries one way between hosts (400 Gbit/s are 50); with several."),
]
Us = Annotated[float | None, Parameter(help="µs that a collective takes longer for crossing the network; likewise.")]
Placements = Annotated[list[str], NAMES, Parameter(help="tp and ep over all GPUs, and grids such as tp8xep4.")]
Exchanges = Annotated[list[str], NAMES, Parameter(help=f"Of {', '.join(EXCHANGES.names())}.")]
Backends = Annotated[list[str], NAMES, Parameter(help=f"Of {BACKEND_NAMES}.")]
PerRank = Annotated[list[int], NUMBERS, Parameter(help="Tokens of each rank; all ranks have equally many.")]
Skew = Annotated[str, Parameter(help=SKEWS_HELP)]
Wide = Annotated[bool, Parameter(show_default=False, help="Show every exchange and backend of a placement.")]

PLACEMENTS, EXCHANGED, COMPUTED = ["tp", "ep"], ["ag_rs", "all_to_all", "nvlink"], ["cutlass", "triton"]
PER_RANK = [8, 128, 2048, 8192]


def simulate(
    *,
    model: Model = PREDICTED,
    machine: Elsewhere = "h200x8",
    network_gbps: Gbps = None,
    network_us: Us = None,
    placements: Placements = PLACEMENTS,
    exchanges: Exchanges = EXCHANGED,
    backends: Backends = COMPUTED,
    tokens_per_rank: PerRank = PER_RANK,
    skew: Skew = "uniform",
    calibrate: Calibrate = None,
    wide: Wide = False,
    json: Json = False,
) -> int:
    cluster = Cluster.named(machine, _network(network_gbps, network_us))
    for registry, names in ((EXCHANGES, exchanges), (BACKENDS, backends)):
        for name in names:
            registry.get(name)
    for tokens in tokens_per_rank:
        if not 1 <= tokens <= MOST_TOKENS:
            raise ConfigError("experiment.tokens", tokens, "is no number of tokens of a rank", f"1 to {MOST_TOKENS:,}")
    skew = drawn_skew(skew)
    wanted = Wanted(find_model(model), placements, exchanges, backends, tokens_per_rank, skew)
    made = calibration(calibrate)
    found, reasons = predictions(made.model, cluster, wanted)
    drawn = min(max(tokens_per_rank) * cluster.world, SAMPLE)
    short = shortage(wanted.spec, WorkloadSpec(tokens=drawn, skew=skew, trace=trace_of(skew)), several=False)
    refused = [Refused(case=case, reason=reason) for case, reason in reasons.items()]
    if json:
        print_json({
            "predicted": True,
            "model": wanted.spec.name,
            "machine": cluster.text,
            "skew": skew,
            "trace_short": short,
            "rows": [asdict(row) for row in found],
            "refused": [each.model_dump() for each in refused],
            "calibration": made.as_dict(),
        })  # fmt: skip
    else:
        with to_standard_output():
            if short:
                console().print(f"The trace is short: {short}.")
            print_predictions(console(), wanted.spec, cluster, found, made, wide)
            if refused:
                console().print(refused_table(refused))
    return OK if found else BAD_INPUT


def _network(gbps: float | None, us: float | None) -> Network | None:
    for field, value, most in (("network_gbps", gbps, MOST_GBPS), ("network_us", us, MOST_US)):
        if value is not None and not 0 < value <= most:
            raise ConfigError(field, value, "is no rate or time of a network", f"above 0 to {most:,.0f}")
    if (gbps is None) != (us is None):
        field, other = ("network_us", "network-gbps") if us is None else ("network_gbps", "network-us")
        raise ConfigError(field, None, f"is missing beside --{other}", "both or none")
    return None if gbps is None or us is None else Network(gbps, us)


def print_predictions(
    console: Terminal, spec: MoESpec, cluster: Cluster, found: Sequence[Prediction], made: Calibration, wide: bool
) -> None:
    title = f"{printable(spec.name)} {spec.quant_label} on {cluster.text}: predicted, not measured"
    console.print(title, style="bold", soft_wrap=True)
    shown = found if wide else _best(found)
    show(console, prediction_table(shown))
    beyond = dict.fromkeys(text for row in shown for text in row.beyond)
    if beyond:
        console.print(f"~ is beyond what was measured: {'; '.join(beyond)}.")
    for line in made.lines():
        console.print(line)
    console.print("Rows that are nearer to each other than these errors are no verdict.")


def _best(found: Sequence[Prediction]) -> list[Prediction]:
    """The fastest of each placement, for each number of tokens."""
    best: dict[tuple[int, str], Prediction] = {}
    for row in found:
        best.setdefault((row.tokens_per_rank, row.placement), row)
    return list(best.values())


def prediction_table(rows: Sequence[Prediction]) -> Table:
    table = plain_table(columns=("placement", "exchange", "backend"))
    for name in ("a rank", "predicted µs", "local", "exchange"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        mark = "~" if row.beyond else ""
        times = [mark + number(row.predicted_us), number(row.predicted_local_us), number(row.predicted_exchange_us)]
        table.add_row(row.placement, row.exchange, row.backend, f"{row.tokens_per_rank:,}", *times)
    return table
