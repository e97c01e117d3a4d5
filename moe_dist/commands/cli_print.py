"""What the commands print for people."""

from __future__ import annotations

from moe_dist.bench.results import Outcome
from moe_dist.bench.table import last_line, refused_table, tables, verdict
from moe_dist.commands.terminal import Terminal
from moe_dist.messages.printable import printable


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
