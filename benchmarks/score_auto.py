"""What `auto` would lose: python benchmarks/score_auto.py RECORD.json... -- RUN.json...

RECORD files choose, as they would from the user's records; RUN files, measured independently of them, say how good each
choice was. A cell is a setting (model, placement, layout, mode) and a size. Of each: the time that RUN has for the
chosen pair, over the fastest pair's there. A pair that RUN has not measured is a cell without a score, and is counted.
Even routings choose, as they do for `auto`; what that costs under another skew is scored for each that RUN has. For
comparison the same for rules that serving stacks go by.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from moe_dist.engine.records import SKEWS, Record, Setting, Timed, pick, read_record

CLOSE, FAR = 0.03, 0.10
Pair = tuple[str, str]


class Score(NamedTuple):
    """`loss`: of the chosen pair's time over the fastest one's, None where it was not measured. A difference within the
    spread of both counts as none."""

    setting: Setting
    tokens_per_rank: int
    pair: Pair
    best: Pair
    loss: float | None


def scores(chosen: Callable[[Setting, int, list[Timed]], Pair | None], runs: list[Record]) -> Iterator[Score]:
    """Of every cell of the runs for which something was chosen."""
    for run in runs:
        for setting, timed in run.rows.items():
            by_size: dict[int, list[Timed]] = defaultdict(list)
            for row in timed:
                by_size[row.tokens_per_rank].append(row)
            for size, rows in sorted(by_size.items()):
                pair = chosen(setting, size, rows)
                if pair is None or len(rows) < 2:
                    continue
                best = min(rows, key=lambda row: row.p50_us)
                found = next((row for row in rows if (row.exchange, row.backend) == pair), None)
                loss = None
                if found is not None:
                    spread = 2 * (found.scatter_us**2 + best.scatter_us**2) ** 0.5
                    behind = found.p50_us - best.p50_us
                    loss = 0.0 if behind <= spread else behind / best.p50_us
                yield Score(setting, size, pair, (best.exchange, best.backend), loss)


def by_records(records: list[Record]) -> Callable[[Setting, int, list[Timed]], Pair | None]:
    """As engine/choosing.py: the first record that has the setting; pairs that the run lacks are left out of both."""

    def chosen(setting: Setting, size: int, rows: list[Timed]) -> Pair | None:
        here = {(row.exchange, row.backend) for row in rows}
        for record in records:
            timed = [row for row in record.rows.get(setting, ()) if (row.exchange, row.backend) in here]
            if timed:
                picks = pick(record, timed)
                taken = next(each for each in picks if each.up_to is None or size <= each.up_to)
                return taken.exchange, taken.backend
        return None

    return chosen


def by_rule(under_ep: str, under_tp: str) -> Callable[[Setting, int, list[Timed]], Pair | None]:
    """One backend under EP, one under TP, at every size; the exchange is the run's best for it."""

    def chosen(setting: Setting, size: int, rows: list[Timed]) -> Pair | None:
        backend = under_ep if setting.ep > 1 else under_tp
        able = [row for row in rows if row.backend == backend]
        return (min(able, key=lambda row: row.p50_us).exchange, backend) if able else None

    return chosen


def summary(name: str, found: list[Score]) -> dict[str, Any]:
    losses = [score.loss for score in found if score.loss is not None]
    return {
        "chosen_by": name,
        "cells": len(losses),
        "unmeasured": len(found) - len(losses),
        "within_3_percent": sum(loss <= CLOSE for loss in losses) / len(losses) if losses else None,
        "beyond_10_percent": sum(loss > FAR for loss in losses),
        "median_loss": median(losses) if losses else None,
        "worst_loss": max(losses, default=None),
    }


RULES = {
    "triton everywhere": by_rule("triton", "triton"),
    "cutlass everywhere": by_rule("cutlass", "cutlass"),
    "flashinfer_cutlass under EP, triton under TP": by_rule("flashinfer_cutlass", "triton"),
}


def by_skew(path: Path) -> dict[str, Record]:
    """A run's rows of even routings, and those of each other skew."""
    even = read_record(path, "user")
    others = {row["skew"] for row in json.loads(path.read_text())["rows"]} - {*SKEWS}
    return {SKEWS[0]: even} | {skew: read_record(path, "user", (skew,)) for skew in sorted(others)}


def main(arguments: list[str]) -> int:
    if arguments.count("--") != 1:
        print(__doc__, file=sys.stderr)
        return 2
    cut = arguments.index("--")
    records = [read_record(Path(name), "user") for name in arguments[:cut]]
    runs: dict[str, list[Record]] = defaultdict(list)
    for name in arguments[cut + 1 :]:
        for skew, run in by_skew(Path(name)).items():
            runs[skew].append(run)
    ways = {"auto": by_records(records), **RULES}
    for skew, of_skew in runs.items():
        found = {name: list(scores(chosen, of_skew)) for name, chosen in ways.items()}
        for score in found["auto"]:
            lost = "not measured" if score.loss is None else f"{score.loss:.1%}"
            mode = "graph" if score.setting.graph else "eager"
            grid = f"TP{score.setting.tp}xEP{score.setting.ep}"
            where = f"H{score.setting.hidden} {grid} {score.setting.token_layout} {mode} {skew}"
            print(f"{where} {score.tokens_per_rank:>6}: {' '.join(score.pair)} loses {lost} to {' '.join(score.best)}")
        for name, each in found.items():
            print(json.dumps({"skew": skew} | summary(name, each)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
