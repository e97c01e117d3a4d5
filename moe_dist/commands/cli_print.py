"""What the commands print for people."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from moe_dist.bench.results import Outcome
from moe_dist.bench.table import last_line, refused_table, size, tables, tuned_table, verdict
from moe_dist.bench.tune import Tuned
from moe_dist.commands.terminal import Terminal
from moe_dist.engine.plan import Plan
from moe_dist.messages.printable import printable
from moe_dist.model.sizes import cdiv


def print_doctor(console: Terminal, found: dict[str, Any]) -> None:
    machine = found["machine"]
    console.print(f"{machine['name']}, {machine['cores']} cores, {machine['devices']} CUDA devices")
    if (driver := found["driver"])["version"]:
        console.print(f"NVIDIA driver {driver['version']} with {_gpus(driver['gpus'])}")
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["packages"].items())
    console.print(f"Python {found['python']}, {versions}, nvcc {'yes' if found['nvcc'] else 'no'}")
    for kind in ("backends", "exchanges"):
        table = Table(kind[:-1], "usable here", "what to know", header_style="bold")
        for name, answer in found[kind].items():
            usable = Text("yes", "green") if answer["ok"] else Text("no", "red")
            table.add_row(printable(name), usable, printable(answer["reason"]))
        console.print(table)


def _gpus(gpus: list[dict[str, Any]]) -> str:
    """Alike ones once. They are the driver's, so that one which torch can't use shows."""
    names = Counter(f"{gpu['name']} of {gpu['memory_gib']} GiB" if gpu["memory_gib"] else gpu["name"] for gpu in gpus)
    return ", ".join(f"{count} × " * (count > 1) + printable(name) for name, count in names.items()) or "no GPU"


def print_plan(console: Terminal, made: Plan, tokens: int, chosen: str, layers: int = 1) -> None:
    """`chosen`: who chose the backend, if nobody named it. `layers`: of the stack."""
    spec, world = made.spec, made.placement.world
    shared = ", no shared expert" if spec.shared_experts == "none" else f", shared expert {spec.shared_experts}"
    console.print(
        f"{printable(spec.name)} {spec.quant_label}{shared}, as {made.parallel.label}, {made.token_layout} tokens:"
        f" exchange {made.exchange}, backend {made.backend}{f' ({chosen})' if chosen else ''}, rows travel as"
        f" {made.payload}, partial sums as {made.combine_dtype}"
        + (", rows are handed over sorted by expert" if made.form == "expert" else "")
        + (", with a change of token layout around it" if made.converts_layout else ""),
    )
    ranks = Table("rank", "experts", "slice of intermediate", "weights", header_style="bold")
    for rank in range(world):
        start, stop = made.placement.slice_of(rank)
        experts = len(made.placement.experts_of(rank))
        ranks.add_row(str(rank), str(experts), f"{start} to {stop}", size(made.weight_bytes(rank)))
    console.print(ranks)
    share = cdiv(tokens, world) if made.token_layout == "sharded" else tokens
    console.print(
        f"{tokens} tokens: at most {made.most_rows(share)} (token, expert) pairs and about"
        f" {size(made.scratch_bytes(share))} of scratch on a rank, at most {size(made.wire_bytes(tokens))} sent by one;"
        " CUDA graph: " + ("yes" if made.capturable.ok else f"no ({made.capturable.reason})"),
    )
    if layers > 1:
        console.print(f"a stack of {layers} layers: {layers} times these weights and bytes, and the same scratch")
    for name, source in made.tables().items():
        console.print(f"tuned: {source} {name}" if source else f"tuned: none, defaults (no {name})", soft_wrap=True)
    options = Table("choice", "name", "possible", "taken", "why not", header_style="bold")
    for option in made.options:
        taken = "yes" if option.chosen else ""
        possible = "yes" if option.possible else "no"
        options.add_row(option.kind, printable(option.name), possible, taken, printable(option.reason))
    console.print(options)


def print_outcome(console: Terminal, outcome: Outcome, out: str | None, sweep: bool) -> None:
    print_rows(console, outcome)
    failed = [row for row in outcome.rows if row.ok is False]
    if failed:
        console.print(f"{len(failed)} of {len(outcome.rows)} rows are out of tolerance.", style="bold red")
    if out:
        console.print(f"results: {printable(out)}", soft_wrap=True)
    timed = [row for row in outcome.rows if row.p50_us is not None]
    if not timed:
        passed = sum(row.ok is True for row in outcome.rows)
        console.print(f"{passed} of {len(outcome.rows)} cases agree with the oracle.")
    elif sweep:
        for sentence in verdict(timed):
            console.print(f"- {printable(sentence)}", soft_wrap=True)
        console.print(printable(last_line(timed)), style="bold", soft_wrap=True)


def print_rows(console: Terminal, outcome: Outcome) -> None:
    for table in tables(outcome.rows):
        console.print(table)
    if outcome.refused:
        console.print(refused_table(outcome.refused))


def print_tuned(console: Terminal, tuned: Tuned, path: Path | None) -> None:
    console.print(tuned_table(tuned))
    passed_over = [f"{found.rows} rows: {found.reason}" for found in tuned.found if found.reason and found.entry]
    for line in [*passed_over, f"table: {path}" if path else "no table: nothing was found"]:
        console.print(printable(line), soft_wrap=True)
