"""What `eval` prints: a line for the baseline and one for each variant, in 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from moe_dist.bench.table import plain_table
from moe_dist.commands.terminal import Terminal, show
from moe_dist.integrations.evaluation.running import Row, Work
from moe_dist.integrations.evaluation.scores import LOST, Logits, Score
from moe_dist.integrations.evaluation.setup import BASELINE, Setup
from moe_dist.messages.counts import count_of, verb
from moe_dist.messages.printable import printable

WHO = ("experts", "ranks", "format")


def print_rows(console: Terminal, rows: Sequence[Row], work: Work) -> None:
    setup = work.setup
    if work.task is not None:
        asked = count_of(len(work.task.questions), "question")
        title = f"{work.task.name}: {asked}, batches of {setup.batch_size}, greedy"
        console.print(printable(title), style="bold", soft_wrap=True)
        show(console, answers_table(rows))
    if work.tokens:
        found = next(row.logits for row in rows if row.logits)
        title = f"logits on {count_of(found.tokens, 'token')} of the baseline's own text"
        console.print(title, style="bold", soft_wrap=True)
        show(console, logits_table(rows))
    if work.harness:
        console.print(printable(f"lm-evaluation-harness: {work.harness.task}"), style="bold", soft_wrap=True)
        show(console, metrics_table(rows))
    for line in _about(setup):
        console.print(printable(line), soft_wrap=True)
    if lost := [row for row in rows if row.lost]:
        rule = f"more than {LOST:g} standard errors below the baseline"
        console.print(
            f"{len(lost)} of {len(rows) - 1} {verb(len(lost), 'answer')} worse than chance explains: {rule}.",
            style="bold red",
        )


def answers_table(rows: Sequence[Row]) -> Table:
    table = _table("right %", "invalid", "s each", "tok/s", "vs eager")
    for row in rows:
        if row.score is not None:
            table.add_row(*_who(row), *_score(row.score))
    return table


def logits_table(rows: Sequence[Row]) -> Table:
    table = _table("KL, nats", "perplexity", "of eager", "same top")
    for row in rows:
        if row.logits is not None:
            table.add_row(*_who(row), *_logits(row.logits))
    return table


def metrics_table(rows: Sequence[Row]) -> Table:
    """A line for each metric of each row, in the metric's own unit."""
    table = _table("metric", "value", "vs eager")
    for row in rows:
        for each in row.metrics:
            value, error = f"{each.value:.4g}", "" if each.error is None else f" ± {each.error:.2g}"
            difference = "-" if each.difference is None else f"{each.difference:+.3g}"
            if each.difference_error is not None:
                difference += f" ± {each.difference_error:.2g}"
            shown = Text(difference, "bold red") if each.lost else difference
            table.add_row(*_who(row), printable(each.name), value + error, shown)
    return table


def _table(*numbers: str) -> Table:
    """Narrower than other tables, for 80 columns; only the names of long backends take several lines."""
    table = plain_table(columns=WHO[:1])
    table.padding = (0, 1, 0, 0)
    for name in WHO[1:]:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _score(score: Score) -> list[str | Text]:
    difference = _with_error(score.difference, score.difference_error, sign=True)
    speed = f"{score.latency_s:.2f}", f"{score.tokens_per_s:,.0f}"
    accuracy = _with_error(score.accuracy, score.accuracy_error)
    return [accuracy, f"{score.invalid:,}", *speed, Text(difference, "bold red") if score.lost else difference]


def _logits(found: Logits) -> list[str]:
    error = "" if found.kl_error is None else f" ± {found.kl_error:.1e}"
    likely = [f"{value:.4g}" for value in (found.perplexity, found.baseline_perplexity)]
    return [f"{found.kl:.1e}{error}", *likely, f"{100 * found.same_top:.1f} %"]


def _with_error(share: float | None, error: float | None, sign: bool = False) -> str:
    """In percent."""
    if share is None:
        return "-"
    found = f"{100 * share:{'+' if sign else ''}.1f}"
    return found if error is None else f"{found} ± {100 * error:.1f}"


def _who(row: Row) -> list[str]:
    if row.variant is None:
        return [BASELINE, "single", "bf16"]
    return [printable(row.variant.backend), row.variant.placement, row.variant.format]


def _about(setup: Setup) -> list[str]:
    where = "" if setup.baseline == setup.checkpoint else f" on {setup.baseline}"
    return [f"eager: transformers' own experts in bf16{where}", f"others: moe_dist's on {setup.checkpoint}"]


def document(rows: Sequence[Row], work: Work, about: dict[str, Any]) -> dict[str, Any]:
    """The same for `--json`, with every answer. Shares are from 0 to 1, times in seconds."""
    setup, task = work.setup, work.task
    return about | {
        "checkpoint": setup.checkpoint,
        "baseline": setup.baseline,
        "task": task and task.name,
        "questions": len(task.questions) if task else 0,
        "batch_size": setup.batch_size,
        "max_new_tokens": setup.new_tokens,
        "seed": work.seed,
        "harness": work.harness and vars(work.harness),
        "rows": [_as_dict(row) for row in rows],
    }


def _as_dict(row: Row) -> dict[str, Any]:
    variant, who = row.variant, _who(row)
    return {
        "experts": who[0],
        "placement": who[1],
        "exchange": variant and variant.exchange,
        "format": who[2],
        "score": row.score and vars(row.score) | {"lost": row.score.lost},
        "logits": row.logits and vars(row.logits),
        "answers": list(row.said),
        "metrics": [vars(each) | {"lost": each.lost} for each in row.metrics],
    }
