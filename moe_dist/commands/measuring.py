"""Measuring what was asked for, as `run`, `compare` and `check` do: what is refused before any rank starts, ranks,
progress, and results that are kept whatever happens."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_dist.backends import BACKENDS
from moe_dist.bench.case import Case
from moe_dist.bench.output import Output, open_output, rows_in
from moe_dist.bench.results import Outcome, provenance, results_document
from moe_dist.bench.rounds import turns
from moe_dist.bench.row import Provenance, Result
from moe_dist.bench.runner import group_starter, plan_cases, run_cases
from moe_dist.commands.asked import Asked, files_read
from moe_dist.commands.call import Call
from moe_dist.commands.ending import Ending
from moe_dist.commands.flags import Measuring
from moe_dist.commands.outcome import print_outcome, print_rows
from moe_dist.commands.printing import console, print_csv, print_json, print_line
from moe_dist.commands.progress import Reporter
from moe_dist.commands.terminal import Terminal, closed_from_the_start, say, to_standard_output
from moe_dist.errors import ConfigError, UnsupportedError, listed
from moe_dist.exchange import EXCHANGES
from moe_dist.exits.exit_codes import OK, OUT_OF_TOLERANCE
from moe_dist.runtime.context import Group
from moe_dist.runtime.voice import launched, speaks


def measure(
    asked: Asked,
    measuring: Measuring,
    call: Call,
    *,
    as_json: bool,
    sweep: bool,
    file: str | None = None,
    cases: Sequence[Case] | None = None,
    summed: Callable[[Outcome, Provenance], Summary] | None = None,
) -> int:
    """The exit code. `sweep`: a case that can't run is a row of why; without, it is an error. `file`: the experiment's,
    which results must not go over. `cases`: instead of all of the experiment's. `summed`: what is shown in place of the
    rows, once they are measured."""
    experiment, machine, ending = asked.experiment, asked.machine, call.ending
    if measuring.csv and as_json:
        raise ConfigError("--csv", True, "is not given beside --json", "one of the two")
    if measuring.verbose:
        experiment = experiment.with_changes(ray=experiment.ray.with_changes(verbose=True))
    _check_names_and_launcher(asked)
    if measuring.build:  # here, before any rank is there: one process compiles, and the user sees how far it is
        for backend in map(BACKENDS.get, experiment.backends):
            if machine.device == "cuda" or backend.available(machine.device).ok:  # minutes for what can't run: no
                backend.build()
    if cases is None:
        cases = list(experiment.cases(machine.device, asked.chosen_by))
    planned, refused = plan_cases(cases, machine)
    if refused and not sweep:  # then its reason is the error, with all that it knows
        for case in cases:
            case.plan(machine)
    if not planned:
        reasons = list(dict.fromkeys(item.reason for item in refused))
        none = f"none of placements {listed(experiment.placements)} fits any of worlds {listed(experiment.worlds)}"
        raise UnsupportedError("this experiment", reasons or [none])
    if not measuring.out and closed_from_the_start(sys.stdout) and speaks():
        raise ConfigError("--out", None, "standard output is closed, so results would go nowhere", "a file")
    output = None
    if measuring.out and speaks():
        output = open_output(measuring.out, say, call.descriptors, files_read(experiment, file))
    if not as_json and not measuring.csv:
        _print_chosen(asked)
    results = _Results(ending, measuring, output, as_json, provenance(machine), Outcome(refused=refused))
    start = group_starter(experiment, machine)

    def started(world: int, shown: Callable[[str], None]) -> Group:
        try:
            return start(world, shown)
        finally:
            if experiment.runtime == "ray":  # ray.init has set a handler of its own; torchrun's ranks need theirs
                ending.signals.install()

    with Reporter(sum(turns(case) for case, _ in planned), quiet=not speaks()) as reporter:

        def shown(text: str) -> None:
            ending.signals.check()
            reporter.shown(text)

        def turn_done() -> None:
            reporter.step()
            results.keep()

        try:
            run_cases(planned, started, experiment.case_timeout_s, results.outcome, shown, reporter.said, turn_done)
        except BaseException:
            results.save()
            raise
    return results.finish(sweep, summed(results.outcome, results.about) if summed else None)


def _check_names_and_launcher(asked: Asked) -> None:
    """An unknown name is a mistake, not a case that can't run here."""
    experiment = asked.experiment
    if experiment.runtime == "ray" and "TORCHELASTIC_RUN_ID" in os.environ:
        rule = "torchrun has started this process as one of its ranks, and each would start Ray's ranks too"
        raise ConfigError("runtime", "ray", rule, "--runtime torchrun")
    if experiment.runtime == "torchrun":
        launched()
    for name in experiment.backends:
        BACKENDS.get(name)
    for name in experiment.exchanges:
        EXCHANGES.get(name)


def _print_chosen(asked: Asked) -> None:
    if asked.why:
        print_line(f"backend {', '.join(asked.experiment.backends)} ({asked.why})")
    if asked.mode_why:
        print_line(f"mode {', '.join(asked.experiment.modes or ())} ({asked.mode_why})")


@dataclass(frozen=True)
class Summary:
    """What rows come to, which is shown instead of them: `results` in JSON under `key` beside the document and as CSV,
    and to people what `show` prints, which is told where the rows are kept, None where nowhere."""

    key: str
    results: Sequence[Result]
    show: Callable[[Terminal, str | None], None]


@dataclass
class _Results:
    """What is measured, and where it goes. `measuring.out` is where it was asked for, `output` that place, open; None
    without one, and in torchrun's ranks that don't speak."""

    ending: Ending
    measuring: Measuring
    output: Output | None
    as_json: bool
    about: Provenance
    outcome: Outcome = field(default_factory=Outcome)

    def __post_init__(self) -> None:
        self.ending.kept = (
            self.output.kept if self.output else rows_in(0, f"in {self.measuring.out}") if self.measuring.out else ""
        )

    def document(self) -> dict[str, Any]:
        return results_document(self.about, self.outcome)

    def keep(self) -> None:
        """After every turn of a case: what was measured before a failure is kept."""
        if self.output:
            self.output.update(self.document())
        self.ending.kept = self.output.kept if self.output else rows_in(len(self.outcome.rows), "measured")

    def save(self) -> None:
        """After a failure or an interruption: in the file, or where there is none on standard output."""
        if not self.outcome.rows or not speaks():
            return
        document = self.document()
        if self.output:
            self.output.close(document)
            self.ending.kept = self.output.kept
            self.ending.as_json &= not self.output.on_standard_output  # one document was printed
        if self.output is None or self.output.problem:
            lost = f"on standard output; {self.measuring.out} has those that the lost rank wrote"
            there = lost if self.measuring.out and not self.output else ""
            self.ending.kept = rows_in(len(self.outcome.rows), there or "on standard output, in no file")
            self.ending.results = document
            if not self.as_json:
                with to_standard_output():
                    print_rows(console(), self.outcome, self.measuring.wide)

    def finish(self, sweep: bool, summary: Summary | None = None) -> int:
        """Write and print them all, and return the exit code."""
        document = self.document()
        if summary:
            document[summary.key] = [each.model_dump(mode="json") for each in summary.results]
        if self.output:
            sys.stdout.flush()  # it may be where results go
            self.output.close(document)
        if self.as_json:
            if speaks() and not (self.output and self.output.on_standard_output):
                print_json(document)
            self.ending.as_json = False  # one document was printed
        elif self.measuring.csv:
            print_csv(summary.results if summary else self.outcome.rows)
        else:
            written = self.measuring.out if self.output and not self.output.problem else None
            with to_standard_output():
                if summary:
                    summary.show(console(), written)
                else:
                    print_outcome(console(), self.outcome, written, sweep, self.measuring.wide)
        if self.output and self.output.problem:
            self.ending.kept = ""  # the error says it
            raise self.output.problem
        return OK if self.outcome.ok else OUT_OF_TOLERANCE
