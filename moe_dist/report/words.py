"""How a report says what it found: rows, steps and answers in words and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_dist.bench.answer import Answer, last_line, scatters, tie_of
from moe_dist.bench.row import Row
from moe_dist.bench.table import number, speed, stack_of, times_floor
from moe_dist.messages.counts import count_of
from moe_dist.report.findings import Setup, valid

# Tokens a rank up to which a step is called decode, and from which prefill. Nothing is computed from them.
DECODE_MOST, PREFILL_LEAST = 256, 1024


def mode(row: Row) -> str:
    return "in a CUDA graph" if row.graph else "eager"


def tokens_of(row: Row) -> str:
    """Such as `32 tokens (8 a rank)`."""
    per_rank = row.tokens_per_rank
    rank = f" ({per_rank:,} a rank)" if per_rank and per_rank != row.global_tokens else ""
    return f"{count_of(row.global_tokens, 'token')}{rank}"


def phase(row: Row) -> str:
    """Decode, prefill, or a step between them."""
    tokens = row.tokens_per_rank or row.global_tokens
    return "Decode" if tokens <= DECODE_MOST else "Prefill" if tokens >= PREFILL_LEAST else "Step"


def name_of(row: Row) -> str:
    return f"{row.placement} {row.exchange} {row.backend}"


def timed(row: Row) -> str:
    """Such as `2,063 µs (2.01 × floor)`."""
    over = times_floor(row)
    return f"{number(row.p50_us)} µs" + (f" ({over} × floor)" if over != "-" else "")


def verdict(answer: Answer) -> tuple[str, str]:
    """What is claimed, in a sentence with its numbers, and the other placements."""
    first, *others = answer.best
    behind = "; ".join(f"{name_of(row)} takes {timed(row)}, {ratio(row, first)[:-1]} times as long" for row in others)
    if not answer.tie:
        return f"{name_of(first)} is fastest: {timed(first)}.", f"{behind}."
    if scatters(first, others[0]):
        return "A tie: scatter explains the difference.", f"{name_of(first)} takes {timed(first)}; {behind}."
    claim = "No winner is claimed: the scatter of these rows is not known."
    return claim, f"{name_of(first)} takes {timed(first)}; {behind}."


def summary(found: Sequence[Setup]) -> str:
    """The last line of `compare`, and what it can't say of older files."""
    of_all = [answer for setup in found for answer in setup.answers]
    blind = any(answer.tie and not scatters(*answer.best[:2]) for answer in of_all)
    said = [last_line(of_all)]
    if blind:
        said.append("Nothing is claimed where the scatter of rows is not known.")
    if of_all and not found[0].file.machine.get("gpu"):
        said.append("CPU times say nothing about GPUs.")
    if not all(setup.whole for setup in found):
        said.append("Rows that are one rank's share of a layer stand for no placement; their backends are compared.")
    return " ".join(said)


def title_of(setup: Setup) -> str:
    return f"{case_title(setup.first)} · routing {setup.first.skew}"


def case_title(row: Row) -> str:
    """What rows of a setup have in common, and rows that differ in the routing too."""
    kind = "" if row.layer == "whole" else stack_of(row).strip() or f"layer {row.layer}"
    source = row.source if row.source and row.source != "random:0" else ""
    seed = f"seed {row.seed}" if row.seed else ""
    parts = [f"{row.model} {row.quant}", count_of(row.world, "rank"), f"tokens {row.token_layout}", mode(row)]
    return " · ".join(filter(None, [*parts, kind, source, seed]))


def tip(row: Row) -> str:
    """What a mark says of its row."""
    said = [name_of(row), tokens_of(row), timed(row)]
    if row.tflops is not None:
        said.append(f"{number(row.tflops)} TFLOP/s")
    if row.hbm_gbps is not None:
        said.append(f"weights {number(row.hbm_gbps)} GB/s")
    if row.ok is not True:
        said.append(checked(row))
    return ", ".join(said)


def beside(rows: Sequence[Row]) -> list[str]:
    """What each of several rows is called beside the first, the fastest valid one: `fastest`, `1.12x`, `1.01x, tie`,
    and `not claimed` where there is no scatter to tell a tie by. Others than valid ones are what their check says."""
    first, ranked = rows[0], valid(rows)

    def said(row: Row) -> str:
        if row.ok is not True:
            return checked(row)
        if row is not first:
            return _against(row, first)
        if len(ranked) == 1:
            return "the only valid one"
        return {"": "fastest", "tie": "tie"}.get(tie_of(first, ranked[1]), "fastest, not claimed")

    return [said(row) for row in rows]


def _against(row: Row, first: Row) -> str:
    return ", ".join(filter(None, [ratio(row, first), tie_of(first, row)]))


def checked(row: Row) -> str:
    """Never a colour alone."""
    return {True: "yes", False: "NO: out of tolerance", None: "unchecked"}[row.ok]


def ratio(row: Row, first: Row) -> str:
    return f"{speed(row) / speed(first):.2f}x"


def standing(setups_: Iterable[Setup]) -> dict[int, str]:
    """By id of a row what `beside` says of it. Rows that are not the best of their placement family, and those that no
    comparison has, are not in it."""
    return {id(row): said for setup in setups_ for answer in setup.answers
            for row, said in zip(answer.best, beside(answer.best), strict=True)}  # fmt: skip
