"""Results of `bench` for people: a table as wide as the terminal, and the report in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from moe_dist.bench.phases import BenchResult
from moe_dist.bench.table import plain_table
from moe_dist.commands.terminal import Terminal, show
from moe_dist.messages.counts import count_of, noun, part_of, verb
from moe_dist.messages.printable import printable
from moe_dist.report.formats import escaped, markdown_table

HEAD = (
    "batch size", "input len", "output len", "latency (s)", "input throughput (tok/s)", "output throughput (tok/s)",
    "TTFT (ms)", "ITL (ms)", "ok",
)  # fmt: skip
SCOPE = (
    "MoE layers only: attention, dense layers, embeddings, sampling and scheduling are not timed. TTFT and ITL are"
    " those of the MoE part of a model."
)


def print_phases(console: Terminal, results: Sequence[BenchResult]) -> None:
    table = plain_table(title_of(results[0]))
    table.padding = (0, 1, 0, 0)  # nine columns in 80
    for name in HEAD:
        table.add_column(name.replace(" ", "\n"), justify="right", overflow="fold")
    for result in results:
        *cells, ok = _cells(result)
        table.add_row(*cells, Text(ok, "bold red" if ok == "NO" else ""))
    show(console, table)
    for line in notes(results):
        console.print(printable(line))


def report(results: Sequence[BenchResult]) -> str:
    """In Markdown, with the columns of SGLang's report where they mean the same."""
    lines = [f"### {escaped(title_of(results[0]))}", "", *markdown_table(HEAD, map(_cells, results)), ""]
    return "\n".join([*lines, *(f"- {escaped(line)}" for line in notes(results))]) + "\n"


def title_of(first: BenchResult) -> str:
    named = "" if first.run_name == "default" else f" · {first.run_name}"
    layers = count_of(first.layers, "MoE layer")
    return printable(f"{first.model} {first.quant} · {first.placement} · {layers} · {first.device}{named}")


def notes(results: Sequence[BenchResult]) -> list[str]:
    """What the numbers stand for: what was timed, how much of it, and how it was."""
    first = results[0]
    found = [SCOPE]
    if first.measured_layers < first.layers:
        times = f"times are multiplied by {first.layers / first.measured_layers:.4g}"
        some = part_of(first.measured_layers, first.layers, "layer", "were")
        found.append(f"{some} timed, as one stack; {times}.")
    timed = {each.timed for result in results for each in (*result.prefill, result.decode)}
    each = " or ".join(f"{count:,}" for count in sorted(timed))
    steps = f"{each} {noun(max(timed), 'step')} of each size {verb(max(timed), 'were')} timed"
    found.append(f"{steps}; the median counts for every step of that size.")
    for phase, of_phase in (
        ("prefill", {each for result in results for each in result.prefill}),
        ("decode", {result.decode for result in results}),
    ):
        sizes = ", ".join(f"{size:,}" for size in sorted({each.tokens for each in of_phase}))
        tokens = "token" if sizes == "1" else "tokens"
        ways = sorted({f"{each.exchange}, {each.backend}, {'graph' if each.graph else 'eager'}" for each in of_phase})
        found.append(f"{phase}: steps of {sizes} {tokens}; {'; '.join(ways)}.")
    return found


def _cells(result: BenchResult) -> list[str]:
    return [
        f"{result.batch_size:,}",
        f"{result.input_len:,}",
        f"{result.output_len:,}",
        _short(result.latency),
        f"{result.input_throughput:,.0f}",
        f"{result.output_throughput:,.0f}",
        _short(1e3 * result.ttft),
        _short(result.itl_ms),
        {True: "yes", False: "NO", None: "unchecked"}[result.ok],
    ]


def _short(value: float) -> str:
    """In few digits, the whole ones all of them."""
    places = next((places for places, least in enumerate((1000, 100, 1, 0.1)) if value >= least), 4)
    return f"{value:,.{places}f}"
