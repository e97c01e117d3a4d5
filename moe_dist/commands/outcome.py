"""What the commands print for people."""

from __future__ import annotations

from moe_dist.bench.answer import Answer, answer_table, answers, last_line
from moe_dist.bench.results import Outcome
from moe_dist.bench.row import Row
from moe_dist.bench.serving import python, sglang, vllm
from moe_dist.bench.table import ROOMY, failed_table, number, refused_table, tables
from moe_dist.commands.terminal import Terminal, show
from moe_dist.messages.counts import count_of, part_of, verb
from moe_dist.messages.printable import printable
from moe_dist.model.spec import MAPPED

BALANCED = 1.005  # a floor that is so near to what balance would give is balanced


def print_outcome(console: Terminal, outcome: Outcome, out: str | None, sweep: bool, wide: bool) -> None:
    """`sweep`: what it comes to, and every row only with `wide` or where there is nothing to compare."""
    found = answers(outcome.rows) if sweep else []
    if wide or not found:
        print_rows(console, outcome, wide)
    if found:
        show(console, answer_table(found, console.width))
        if not wide:
            print_not_run(console, outcome)
    elif not sweep:
        for line in dict.fromkeys(line for row in outcome.rows if (line := balance_line(row))):
            console.print(line)
    wrong = [row for row in outcome.rows if row.ok is False]
    if wrong:
        console.print(
            f"{len(wrong)} of {count_of(len(outcome.rows), 'row')} {verb(len(wrong), 'are')} out of tolerance.",
            style="bold red",
        )
    if out:
        console.print(f"results: {printable(out)}", soft_wrap=True)
    timed = [row for row in outcome.rows if row.p50_us is not None]
    if not timed:
        passed = sum(row.ok is True for row in outcome.rows)
        console.print(f"{part_of(passed, len(outcome.rows), 'case', 'agree')} with the oracle.")
    elif sweep:
        if found and not wide:
            kept = "" if out else ", --out FILE keeps them"
            console.print(f"{count_of(len(outcome.rows), 'row')} measured and checked; --wide shows all{kept}.")
        console.print(last_line(found), style="bold")
        print_next(console, found)


def balance_line(row: Row) -> str | None:
    """What perfect balance would change of a row's floor; None where no floor is known or it would change nothing."""
    if not row.floor_us or not row.balanced_floor_us or row.floor_us <= BALANCED * row.balanced_floor_us:
        return None
    floors = f"from {number(row.floor_us)} to {number(row.balanced_floor_us)} µs"
    return f"Perfect balance would lower the floor {floors} ({row.floor_us / row.balanced_floor_us:.2f}x)."


def print_next(console: Terminal, found: list[Answer]) -> None:
    """How to use the fastest of the largest step, and of the smallest where that is another placement."""
    if not found:
        return
    if _on_a_cpu(found[0].best[0]):
        console.print("CPU times say nothing about GPUs: run this on your GPUs.")
        return
    winners = {found[number].best[0].placement: found[number].best[0] for number in (0, -1)}
    for row in winners.values():
        mapped = " (without its map of experts, for which there is no flag)" if MAPPED in row.placement else ""
        console.print(f"To use {row.placement}, the fastest at {count_of(row.global_tokens, 'token')}{mapped}:")
        for name, lines in (("SGLang", [sglang(row)]), ("vLLM", [vllm(row)]), ("Python", python(row))):
            for text in filter(None, lines):
                console.print(f"  {name:<7} {printable(text)}", soft_wrap=True)
                name = ""


def _on_a_cpu(row: Row) -> bool:
    """A GPU's rows have no floor where none of its kind was measured, but always memory."""
    return row.max_memory is None and row.floor_us is None


def print_rows(console: Terminal, outcome: Outcome, wide: bool = False) -> None:
    """In tables as wide as the console, or with all columns."""
    for table in tables(outcome.rows, None if wide else console.width):
        if wide:
            console.width = max(console.width, ROOMY.measure(table).maximum)
        show(console, table)
    print_not_run(console, outcome)


def print_not_run(console: Terminal, outcome: Outcome) -> None:
    if outcome.refused:
        console.print(refused_table(outcome.refused))
    if outcome.failed:
        console.print(failed_table(outcome.failed))
