"""Where results go while they are measured, and what is printed in the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.bench.lines import line
from moe_dist.bench.output import File, Output, open_output, rows_in, said
from moe_dist.bench.results import Outcome, results_document
from moe_dist.bench.row import Provenance, Result
from moe_dist.bench.sweep import Step
from moe_dist.commands.call import Call
from moe_dist.commands.ending import Ending
from moe_dist.commands.flags import Measuring
from moe_dist.commands.outcome import print_outcome, print_rows
from moe_dist.commands.printing import console, print_csv, print_json
from moe_dist.commands.terminal import Terminal, closed_from_the_start, say, to_standard_output
from moe_dist.errors import ConfigError, OutputError
from moe_dist.exits.exit_codes import OK, OUT_OF_TOLERANCE
from moe_dist.runtime.voice import speaks


@dataclass(frozen=True)
class Summary:
    """What rows come to, which is shown instead of them: `results` in JSON under `key` beside the document and as CSV,
    and to people what `show` prints, which is told where the rows are kept, None where nowhere."""

    key: str
    results: Sequence[Result]
    show: Callable[[Terminal, str | None], None]


class Lines:
    """What `--lines` names. What can't be written is said once, and measuring goes on; a file is tried again with the
    next line, and what is no file is not, as its reader may have had a part."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.problem: OutputError | None = None
        self._pending, self._begun = "", False

    def add(self, *results: Result) -> None:
        """The first ones of a file go instead of what is there."""
        regular = isinstance(self.output, File)
        self._pending += "".join(map(line, results))
        if self.problem and not regular:
            return
        try:
            if regular and not self._begun:
                self.output.write(self._pending)
            else:
                self.output.append(self._pending)
        except OSError as error:
            if self.problem is None:
                say(f"{self.output.path} can't be written: {said(error)}; measuring goes on")
            self.problem = OutputError(self.output.path, f"{said(error)} (lines are missing)")
        else:
            self._pending, self._begun, self.problem = "", True, None


def open_places(
    stack: ExitStack, measuring: Measuring, call: Call, reads: list[str], as_json: bool, resume: bool
) -> tuple[Output | None, Lines | None]:
    """What `--out` and `--lines` name, open until `stack` is left; None without them, and in torchrun's ranks that
    don't speak. Raises ConfigError."""
    if not measuring.out and not measuring.lines and closed_from_the_start(sys.stdout) and speaks():
        raise ConfigError("out", None, "standard output is closed, so results would go nowhere", "a file")
    output = lines = None
    if measuring.out and speaks():
        output = open_output(measuring.out, say, call.descriptors, reads, resumed=resume)
        stack.callback(output.release)
        if resume and not isinstance(output, File):
            raise ConfigError("--resume", measuring.out, "is no regular file, so nothing can be read there", "a file")
    if measuring.lines and speaks():
        if measuring.out and Path(measuring.lines).resolve() == Path(measuring.out).resolve():
            raise ConfigError("--lines", measuring.lines, "is where --out goes", "another file")
        place = open_output(measuring.lines, say, call.descriptors, reads, "lines", resumed=resume)
        stack.callback(place.release)
        if place.on_standard_output and (as_json or measuring.csv or (output and output.on_standard_output)):
            rule = "is standard output, where --json, --csv or --out goes too"
            raise ConfigError("--lines", measuring.lines, rule, "a file, or none of them")
        lines = Lines(place)
    return output, lines


@dataclass
class Kept:
    """What is measured, and where it goes. `measuring.out` is where it was asked for, `output` that place, open."""

    ending: Ending
    measuring: Measuring
    output: Output | None
    lines: Lines | None
    as_json: bool
    about: Provenance
    outcome: Outcome

    def __post_init__(self) -> None:
        if self.output:
            if self.outcome.earlier:
                self.output.holds(self.document())
            self.ending.kept = self.output.kept
        elif self.measuring.out:
            self.ending.kept = rows_in(0, f"in {self.measuring.out}")

    @property
    def lines_alone(self) -> bool:
        """Whether standard output gets lines and nothing else."""
        return self.lines is not None and self.lines.output.on_standard_output

    def begin(self, finished: int) -> None:
        """`finished`: the first rows, which are not measured again."""
        if self.lines:
            rows = self.outcome.rows[:finished]
            self.lines.add(*self.outcome.earlier, self.about, *self.outcome.refused, *rows)

    def document(self) -> dict[str, Any]:
        return results_document(self.about, self.outcome)

    def keep(self, step: Step) -> None:
        """After every turn of a case: what was measured before a failure is kept."""
        if self.lines and step.ended:
            self.lines.add(step.ended)
        if self.output:
            self.output.update(self.document())
        self.ending.kept = self.output.kept if self.output else rows_in(len(self.outcome.rows), "measured")

    def save(self) -> None:
        """After a failure or an interruption: in the file, or where there is none on standard output."""
        if not (self.outcome.rows or self.outcome.failed) or not speaks():
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
            if not self.as_json and not self.lines_alone:
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
        elif self.lines_alone:
            pass
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
        if self.lines and self.lines.problem:
            raise self.lines.problem
        if self.outcome.failed:
            return self.outcome.failed[0].exit_code
        return OK if self.outcome.ok else OUT_OF_TOLERANCE
