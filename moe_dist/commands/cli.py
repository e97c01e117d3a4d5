"""The command `moe-dist`. Its exit codes stand in exit_codes.py."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_dist import checkpoint
from moe_dist.backends import BACKENDS
from moe_dist.bench.case import default_experiment
from moe_dist.bench.output import Output, open_descriptors, open_output, rows_in, said
from moe_dist.bench.results import Outcome, provenance, results_document
from moe_dist.bench.rounds import turns
from moe_dist.bench.row import Provenance
from moe_dist.bench.runner import check_fits, group_starter, plan_cases, run_cases
from moe_dist.bench.source import with_source
from moe_dist.bench.tune import Tuned, check_tunable, compile_ahead, count_steps, tune_shape
from moe_dist.commands.cli_config import Asked, asked_for, buckets_of, files_read, one_placement, single
from moe_dist.commands.cli_options import check_flags, parse
from moe_dist.commands.cli_print import print_doctor, print_outcome, print_plan, print_rows, print_tuned
from moe_dist.commands.config import override, read_yaml
from moe_dist.commands.doctor import examine
from moe_dist.commands.ending import Ending
from moe_dist.commands.progress import Reporter
from moe_dist.commands.terminal import Terminal, closed_from_the_start, say, terminal, to_standard_output
from moe_dist.errors import ConfigError, OutputError, UnsupportedError
from moe_dist.exchange import EXCHANGES
from moe_dist.exits.exit_codes import BAD_INPUT, OK, OUT_OF_TOLERANCE, TOO_SMALL
from moe_dist.machine.machine import Machine
from moe_dist.messages.printable import one_line
from moe_dist.runtime.context import Group
from moe_dist.runtime.voice import death, launched, leave_code, speaks, together, torchrun_is_meant
from moe_dist.tables import user_folder

MOST_SEEDS = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code. With `arguments` it leaves the process as it was; without, it is all that the process does."""
    descriptors = open_descriptors(inherited=arguments is None)  # before any of our own
    ending = Ending(speaks, leave_code, death)
    together(torchrun_is_meant(sys.argv[1:] if arguments is None else arguments))

    def command() -> int:
        try:
            args = parse(arguments, COMMANDS)
        except SystemExit as stopped:  # argparse has said why
            return stopped.code if isinstance(stopped.code, int) else BAD_INPUT if stopped.code else OK
        args.ending, ending.as_json = ending, args.json
        args.descriptors = descriptors
        together(getattr(args, "runtime", None) == "torchrun")
        check_flags(args)
        code: int = args.command(args)
        return code

    return ending.code_of(command, last=arguments is None)


def _console() -> Terminal:
    return terminal(quiet=not speaks())


def _print_json(document: Any) -> None:
    with to_standard_output():
        print(json.dumps(document, allow_nan=False))


def _print_line(text: str) -> None:
    with to_standard_output():
        _console().print(one_line(text), soft_wrap=True)


def doctor(args: argparse.Namespace) -> int:
    found = examine()
    with to_standard_output():
        if args.json:
            print(json.dumps(found, indent=1))
        else:
            print_doctor(_console(), found)
    return OK


def plan(args: argparse.Namespace) -> int:
    asked = single(args)
    cases = list(asked.experiment.cases("cpu" if asked.experiment.modes is None else asked.machine.device))
    if len(cases) != 1:
        rule = "plan is for one configuration; compare takes lists"
        raise ConfigError("overrides", " ".join(args.overrides), rule, "one world of tp·ep ranks, one value a key")
    (case,) = cases
    made = case.plan(asked.machine)
    if case.source.checkpoint is not None and not checkpoint.Checkpoint(case.source.checkpoint).holds_weights:
        say(f"{case.source.checkpoint} holds no weights, so the layer's format is what its config.json says")
    sent = {"layers": case.layers, "wire_bytes": made.wire_bytes(case.workload.tokens), "chosen_by": asked.chosen_by}
    with to_standard_output():
        if args.json:
            print(json.dumps(made.as_dict() | sent, indent=1))
        else:
            print_plan(_console(), made, case.workload.tokens, asked.why, case.layers)
    return OK


def run(args: argparse.Namespace) -> int:
    return _measure(single(args), args, sweep=False)


def compare(args: argparse.Namespace) -> int:
    machine = Machine.detect(args.device or "auto")
    config = override(read_yaml(args.file) if args.file else {}, args.overrides)
    config = with_source(config, args.checkpoint, args.layer)
    if not args.file:
        router = config["source"].get("checkpoint") is not None
        config = default_experiment(machine, tuple(name for name, _ in BACKENDS.usable()), router) | config
    return _measure(asked_for(config, args, sweep=True), args, sweep=True)


def check(args: argparse.Namespace) -> int:
    """Every placement and exchange of one model at its real shapes, numbers only."""
    config: dict[str, Any] = {
        "name": "check",
        "placements": ["tp", "ep"],
        "worlds": [args.world],
        "exchanges": ["local"] if args.world == 1 else ["all_reduce", "ag_rs", "all_to_all"],
        "tokens": args.tokens,
        "skews": args.skew,
        "iters": 0,
        "warmup": 0,
    }
    if args.backend:
        config["backends"] = args.backend
    asked = asked_for(override(config, args.overrides), args, sweep=True)
    if not asked.experiment.check:
        raise ConfigError("check", False, "contradicts the command, which does nothing but check", "run or compare")
    return _measure(asked, args, sweep=True)


def build(args: argparse.Namespace) -> int:
    backend = BACKENDS.get(args.backend)
    backend.build()
    state = backend.available(Machine.detect().device)
    text = "ready" if state.ok else f"built, but it can't run here: {state.reason}"
    if args.json:
        _print_json(state._asdict())
    else:
        _print_line(f"{args.backend}: {text}")
    return OK if state.ok else TOO_SMALL


def tune(args: argparse.Namespace) -> int:
    """One device is enough for any placement: each shape that its ranks have is tuned alone."""
    buckets, folder = buckets_of(args.rows), Path(args.out or user_folder())
    if not 1 <= args.seeds <= MOST_SEEDS:
        raise ConfigError("seeds", args.seeds, "each config is timed and checked with so many", f"1 to {MOST_SEEDS}")
    for assignment in args.overrides:
        if not assignment.startswith("model."):
            raise ConfigError("override", assignment, "only the model can be changed here", "model.key=value")
    experiment = asked_for(override(one_placement(args), args.overrides), args, sweep=False).experiment
    machine = Machine.detect(experiment.device)
    case = next(experiment.cases("cpu"))
    check_tunable(case, machine, buckets)
    made = case.plan(machine)
    check_fits(max(made.weight_bytes(rank) for rank in range(made.placement.world)), machine)
    open_output(folder / f".moe-dist-{os.getpid()}", say, reads=files_read(experiment, args))
    done: list[tuple[Tuned, Path | None]] = []
    with Reporter(count_steps(made, buckets), remaining=True) as reporter:
        compile_ahead(made, buckets, reporter.shown)
        for part in made.parts():
            tuned = tune_shape(made, part, buckets, args.seeds, experiment.source.seed, reporter.shown, reporter.step)
            done.append((tuned, _written(tuned, folder)))
    if args.json:
        _print_json([tuned.as_dict() | {"file": path and str(path)} for tuned, path in done])
    else:
        with to_standard_output():
            for tuned, path in done:
                print_tuned(_console(), tuned, path)
    if any(tuned.table and not path for tuned, path in done):
        raise OutputError(folder, "not every table that was found is there")
    return OK if all(found.entry for tuned, _ in done for found in tuned.found) else OUT_OF_TOLERANCE


def _written(tuned: Tuned, folder: Path) -> Path | None:
    try:
        return tuned.table.write(folder) if tuned.table else None
    except OSError as error:
        say(f"{folder} can't be written: {said(error)}; tuning goes on")
        return None


def demo_checkpoint(args: argparse.Namespace) -> int:
    try:
        made = checkpoint.make_checkpoint(
            args.directory,
            hidden=256,
            intermediate=640,
            num_experts=10 if args.model_type == "qwen3_moe" else 16,  # DeepSeek-V3's groups must divide the experts
            model_type=args.model_type,
            seed=args.seed,
        )
    except OSError as error:
        raise OutputError(args.directory, said(error)) from None
    if args.json:
        _print_json({"checkpoint": str(made)})
    else:
        _print_line(f"checkpoint of random weights: {made}")
    return OK


def _measure(asked: Asked, args: argparse.Namespace, sweep: bool) -> int:
    experiment, machine = asked.experiment, asked.machine
    if experiment.runtime == "ray" and "TORCHELASTIC_RUN_ID" in os.environ:
        rule = "torchrun has started this process as one of its ranks, and each would start Ray's ranks too"
        raise ConfigError("runtime", "ray", rule, "--runtime torchrun")
    if experiment.runtime == "torchrun":
        launched()
    for name in experiment.backends:
        BACKENDS.get(name)  # an unknown name is a mistake, not a case that can't run here
    for name in experiment.exchanges:
        EXCHANGES.get(name)
    if args.build:  # here, before any rank is there: one process compiles, and the user sees how far it is
        for backend in map(BACKENDS.get, experiment.backends):
            if machine.device == "cuda" or backend.available(machine.device).ok:  # minutes for what can't run: no
                backend.build()
    planned, refused = plan_cases(experiment.cases(machine.device, asked.chosen_by), machine)
    if not planned or (refused and not sweep):
        reasons = list(dict.fromkeys(item.reason for item in refused))
        raise UnsupportedError("this experiment", reasons or ["it has no case: no placement fits any of its worlds"])
    if not args.out and closed_from_the_start(sys.stdout) and speaks():
        raise ConfigError("out", None, "standard output is closed, so results would go nowhere", "a file")
    output = None
    if args.out and speaks():
        output = open_output(args.out, say, args.descriptors, files_read(experiment, args))
    if not args.json:
        _print_chosen(asked)
    outcome, about, ending = Outcome(refused=refused), provenance(machine), args.ending
    ending.kept = output.kept if output else rows_in(0, f"in {args.out}") if args.out else ""
    start = group_starter(experiment, machine)

    def started(world: int) -> Group:
        try:
            return start(world)
        finally:
            if experiment.runtime == "ray":  # ray.init has set a handler of its own; torchrun's ranks need theirs
                ending.signals.install()

    with Reporter(sum(turns(case) for case, _ in planned), quiet=not speaks()) as reporter:

        def shown(text: str) -> None:
            ending.signals.check()
            reporter.shown(text)

        def turn_done() -> None:
            reporter.step()
            if output:  # after every turn of a case: what was measured before a failure is kept
                output.update(results_document(about, outcome))
            ending.kept = output.kept if output else rows_in(len(outcome.rows), "measured")

        try:
            run_cases(planned, started, experiment.case_timeout_s, outcome, shown, reporter.said, turn_done)
        except BaseException:
            _keep_what_there_is(outcome, about, output, args)
            raise
    return _finish(outcome, about, output, args, sweep)


def _print_chosen(asked: Asked) -> None:
    if asked.why:
        _print_line(f"backend {', '.join(asked.experiment.backends)} ({asked.why})")
    if asked.mode_why:
        _print_line(f"mode {', '.join(asked.experiment.modes or ())} ({asked.mode_why})")


def _keep_what_there_is(outcome: Outcome, about: Provenance, output: Output | None, args: argparse.Namespace) -> None:
    """After a failure or an interruption: in the file, or where there is none on standard output."""
    if not outcome.rows or not speaks():
        return
    document = results_document(about, outcome)
    if output:
        output.close(document)
        args.ending.kept = output.kept
        args.ending.as_json &= not output.on_standard_output  # one document was printed
    if output is None or output.problem:
        there = f"on standard output; {args.out} has those that the lost rank wrote" if args.out and not output else ""
        args.ending.kept = rows_in(len(outcome.rows), there or "on standard output, in no file")
        args.ending.results = document
        if not args.json:
            with to_standard_output():
                print_rows(_console(), outcome)


def _finish(outcome: Outcome, about: Provenance, output: Output | None, args: argparse.Namespace, sweep: bool) -> int:
    document = results_document(about, outcome)
    if output:
        sys.stdout.flush()  # it may be where results go
        output.close(document)
    if args.json:
        if speaks() and not (output and output.on_standard_output):
            _print_json(document)
        args.ending.as_json = False  # one document was printed
    else:
        with to_standard_output():
            print_outcome(_console(), outcome, args.out if output and not output.problem else None, sweep)
    if output and output.problem:
        args.ending.kept = ""  # the error says it
        raise output.problem
    return OK if outcome.ok else OUT_OF_TOLERANCE


COMMANDS = {
    "doctor": doctor,
    "plan": plan,
    "run": run,
    "compare": compare,
    "check": check,
    "build": build,
    "tune": tune,
    "demo-checkpoint": demo_checkpoint,
}
