"""`moe-dist tune`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from moe_dist.bench.output import open_output, said
from moe_dist.bench.runner import check_fits
from moe_dist.bench.table import tuned_table
from moe_dist.bench.tune import Tuned, check_tunable, compile_ahead, count_steps, tune_shape
from moe_dist.commands.asked import asked_for, files_read, one_placement
from moe_dist.commands.config import override
from moe_dist.commands.flags import MODEL_KEYS_HELP, NO_SOURCE, NUMBER, NUMBERS, Ep, Json, Source, Tp
from moe_dist.commands.printing import console, print_json
from moe_dist.commands.progress import Reporter
from moe_dist.commands.terminal import Terminal, say, to_standard_output
from moe_dist.errors import ConfigError, OutputError, listed
from moe_dist.exits.exit_codes import OK, OUT_OF_TOLERANCE
from moe_dist.machine.machine import Machine
from moe_dist.messages.counts import count_of
from moe_dist.messages.printable import printable
from moe_dist.model.spec import MOST_TOKENS, MoESpec
from moe_dist.tables import user_folder

MOST_SEEDS = 1000
ROWS = [1, 8, 32, 128, 512, 2048, 8192]

Keys = Annotated[str, Parameter(name="key=value", help=MODEL_KEYS_HELP)]
Backend = Annotated[str, Parameter(help="Whose configs.")]
Rows = Annotated[list[int], NUMBERS, Parameter(help="Rows entering a rank.")]
Seeds = Annotated[int, NUMBER, Parameter(help="Inputs to time and check with.")]
Out = Annotated[str | None, Parameter(help="Folder for the tables (default: the user's cache).")]


def tune(
    *overrides: Keys,
    source: Source = NO_SOURCE,
    tp: Tp = 1,
    ep: Ep = 1,
    backend: Backend = "triton",
    rows: Rows = ROWS,
    seeds: Seeds = 3,
    out: Out = None,
    json: Json = False,
) -> int:
    """One device is enough for any placement: each shape that its ranks have is tuned alone."""
    buckets, folder = buckets_of(rows), Path(out or user_folder())
    if not 1 <= seeds <= MOST_SEEDS:
        raise ConfigError("seeds", seeds, "each config is timed and checked with so many", f"1 to {MOST_SEEDS}")
    for assignment in overrides:
        if not assignment.startswith("model."):
            legal = f"model.KEY=value with a KEY of {listed(list(MoESpec.model_fields))}"
            raise ConfigError("override", assignment, "only the model can be changed here", legal)
    machine = Machine.detect(source.device or "auto")  # this one, whatever cluster is named: no ranks are started
    config = override(one_placement(tp, ep, backend), overrides)
    experiment = asked_for(config, source, sweep=False, machine=machine).experiment
    case = next(experiment.cases("cpu"))
    check_tunable(case, machine, buckets)
    made = case.plan(machine)
    check_fits(max(made.weight_bytes(rank) for rank in range(made.placement.world)), machine)
    open_output(folder / f".moe-dist-{os.getpid()}", say, reads=files_read(experiment))
    done: list[tuple[Tuned, Path | None]] = []
    with Reporter(count_steps(made, buckets), remaining=True) as reporter:
        compile_ahead(made, buckets, reporter.shown)
        for part in made.parts():
            tuned = tune_shape(made, part, buckets, seeds, experiment.source.seed, reporter.shown, reporter.step)
            done.append((tuned, _written(tuned, folder)))
    if json:
        print_json([tuned.as_dict() | {"file": path and str(path)} for tuned, path in done])
    else:
        with to_standard_output():
            for tuned, path in done:
                print_tuned(console(), tuned, path)
    if any(tuned.table and not path for tuned, path in done):
        raise OutputError(folder, "not every table that was found is there")
    return OK if all(found.entry for tuned, _ in done for found in tuned.found) else OUT_OF_TOLERANCE


def buckets_of(rows: list[int]) -> list[int]:
    """The numbers of rows that `tune` takes, each once."""
    for number in rows:
        if not 1 <= number <= MOST_TOKENS:
            raise ConfigError("rows", number, "is no number of rows that enter a rank", f"1 to {MOST_TOKENS:,}")
    return sorted(set(rows))


def _written(tuned: Tuned, folder: Path) -> Path | None:
    try:
        return tuned.table.write(folder) if tuned.table else None
    except OSError as error:
        say(f"{folder} can't be written: {said(error)}; tuning goes on")
        return None


def print_tuned(console: Terminal, tuned: Tuned, path: Path | None) -> None:
    console.print(tuned_table(tuned))
    passed = [found for found in tuned.found if found.reason and found.entry]
    passed_over = [f"{count_of(found.rows, 'row')}: {found.reason}" for found in passed]
    for line in [*passed_over, f"table: {path}" if path else "no table: nothing was found"]:
        console.print(printable(line), soft_wrap=True)
