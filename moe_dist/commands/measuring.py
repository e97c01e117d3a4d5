"""Measuring what was asked for, as `run`, `compare` and `check` do: what is refused before any rank starts, ranks,
progress, and results that are kept whatever happens."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from moe_dist.backends import BACKENDS
from moe_dist.bench.case import Case, Experiment
from moe_dist.bench.draws import shortage
from moe_dist.bench.output import said
from moe_dist.bench.results import Outcome, provenance
from moe_dist.bench.resume import resumed
from moe_dist.bench.rounds import turns
from moe_dist.bench.row import Provenance, Refused
from moe_dist.bench.runner import group_starter, plan_cases
from moe_dist.bench.sweep import Step, run_cases
from moe_dist.commands.asked import Asked, files_read
from moe_dist.commands.call import Call
from moe_dist.commands.flags import Measuring
from moe_dist.commands.kept import Kept, Summary, open_places
from moe_dist.commands.printing import print_line
from moe_dist.commands.progress import Reporter
from moe_dist.commands.terminal import say
from moe_dist.engine import records
from moe_dist.engine.plan import Plan
from moe_dist.engine.planning import AUTO
from moe_dist.errors import ConfigError, OutputError, UnsupportedError, listed
from moe_dist.exchange import EXCHANGES
from moe_dist.machine.machine import Machine
from moe_dist.messages.counts import count_of, part_of
from moe_dist.peers import PEERS
from moe_dist.runtime.context import Group
from moe_dist.runtime.voice import launched, speaks
from moe_dist.workloads.skew_names import skew_label


def measure(
    asked: Asked,
    measuring: Measuring,
    call: Call,
    *,
    as_json: bool,
    sweep: bool,
    file: str | None = None,
    resume: bool = False,
    remember: bool = False,
    cases: Sequence[Case] | None = None,
    summed: Callable[[Outcome, Provenance], Summary] | None = None,
) -> int:
    """The exit code. `sweep`: a case that can't run, or fails, is a row of why; without, it is an error. `file`: the
    experiment's, which results must not go over. `resume`: finished rows of the file of `--out` are kept. `remember`:
    all rows become a record that `auto` chooses from. `cases`: instead of all of the experiment's. `summed`: what is
    shown in place of the rows, once they are measured."""
    experiment, machine, ending = asked.experiment, asked.machine, call.ending
    if measuring.csv and as_json:
        raise ConfigError("--csv", True, "is not given beside --json", "one of the two")
    if measuring.verbose:
        experiment = experiment.with_changes(ray=experiment.ray.with_changes(verbose=True))
    _check_names_and_launcher(asked)
    if measuring.build and not machine.elsewhere:
        _build(experiment, machine)
    if cases is None:
        cases = list(experiment.cases(machine.device, asked.chosen_by))
    planned, refused = _planned(cases, experiment, machine, sweep)
    with ExitStack() as stack:
        output, lines = open_places(stack, measuring, call, files_read(experiment, file), as_json, resume)
        about, outcome, left = provenance(machine), Outcome(), planned
        if resume:
            outcome, left = resumed(_resumable(measuring, experiment), about, planned, experiment.runtime)
            if speaks():
                done = part_of(len(planned) - len(left), len(planned), "case")
                say(f"{done} finished in {measuring.out}")
        outcome.refused = refused
        kept = Kept(ending, measuring, output, lines, as_json, about, outcome)
        if not as_json and not measuring.csv and not kept.lines_alone:
            _print_chosen(asked)
            _print_taken(planned)
            _print_shortages(planned)
        kept.begin(len(planned) - len(left))
        try:
            _run(left, experiment, machine, kept, go_on=sweep and experiment.runtime == "ray")
        except BaseException:
            kept.save()
            raise
        code = kept.finish(sweep, summed(outcome, about) if summed else None)
        if remember and speaks():
            _remember(kept)
        return code


def _build(experiment: Experiment, machine: Machine) -> None:
    """Here, before any rank is there: one process compiles, and the user sees how far it is."""
    for backend in (BACKENDS.get(name) for name in experiment.backends if name != AUTO):
        if machine.device == "cuda" or backend.available(machine.device).ok:  # minutes for what can't run: no
            backend.build()


def _planned(
    cases: Sequence[Case], experiment: Experiment, machine: Machine, sweep: bool
) -> tuple[list[tuple[Case, Plan]], list[Refused]]:
    """Cases that can run, and those that can't. Where none can, or one can't and this is no sweep, the reason is an
    error with all that it knows."""
    planned, refused = plan_cases(cases, machine)
    if refused and not sweep:
        for case in cases:
            case.plan(machine)
    if not planned:
        reasons = list(dict.fromkeys(item.reason for item in refused))
        if len(reasons) == 1:
            cases[0].plan(machine)
        none = f"none of placements {listed(experiment.placements)} fits any of worlds {listed(experiment.worlds)}"
        raise UnsupportedError("this experiment", reasons or [none])
    return planned, refused


def _run(left: list[tuple[Case, Plan]], experiment: Experiment, machine: Machine, kept: Kept, go_on: bool) -> None:
    start, signals = group_starter(experiment, machine, left), kept.ending.signals

    def started(world: int, shown: Callable[[str], None]) -> Group:
        try:
            return start(world, shown)
        finally:
            if experiment.runtime == "ray":  # ray.init has set a handler of its own; torchrun's ranks need theirs
                signals.install()

    with Reporter(sum(turns(case) for case, _ in left), quiet=not speaks()) as reporter:

        def shown(text: str) -> None:
            signals.check()
            reporter.shown(text)

        def step_done(step: Step) -> None:
            reporter.step(step.turns_left, step.seconds_left)
            kept.keep(step)

        given = left, started, experiment.case_timeout_s, kept.outcome, shown, reporter.said, step_done
        run_cases(*given, experiment.runtime, go_on, experiment.ray.restarts)


def _remember(kept: Kept) -> None:
    """Say what `auto` takes from now on. A row that is not ok, or not of a plain layer, decides nothing."""
    try:
        record = records.remember(kept.document())
    except OSError as error:
        raise OutputError(records.user_folder(), said(error)) from None
    for setting, timed in record.rows.items():
        mode = "graph" if setting.graph else "eager"
        mode += "" if setting.shared_experts == "none" else f", shared experts {setting.shared_experts}"
        for pick in records.merged(records.pick(record, timed)):
            size = "larger steps" if pick.up_to is None else f"up to {count_of(pick.up_to, 'token')} a rank"
            where = f"TP{setting.tp} x EP{setting.ep}, {setting.token_layout} tokens, {mode}, {size}"
            say(f"auto, {where}: {pick.exchange} with {pick.backend}: {pick.why}")
    if not record.rows:
        say("no row of these results is one that auto chooses by")


def _resumable(measuring: Measuring, experiment: Experiment) -> str:
    """The file that is gone on with, which every rank that runs this command must be able to read."""
    if measuring.out is None:
        raise ConfigError("--resume", True, "is of a results file, and none is given", "--out FILE beside it")
    if experiment.runtime == "torchrun" and (here := launched()).local_world < here.world:
        rule = "needs every rank to read one file, and torchrun's are on several machines"
        raise ConfigError("--resume", True, rule, "ranks of one machine, or --runtime ray")
    return measuring.out


def _check_names_and_launcher(asked: Asked) -> None:
    """An unknown name is a mistake, not a case that can't run here."""
    experiment = asked.experiment
    check_launcher(experiment.runtime)
    if experiment.runtime == "torchrun" and experiment.ray.restarts:
        rule = "torchrun ends all ranks when one has failed, and it alone can start them again"
        raise ConfigError("ray.restarts", experiment.ray.restarts, rule, "torchrun --max-restarts, or --runtime ray")
    for name in experiment.backends:
        if name != AUTO:
            BACKENDS.get(name)
    for name in experiment.exchanges:
        if name != AUTO:
            EXCHANGES.get(name)
    for name in experiment.peers:
        PEERS.get(name)


def check_launcher(runtime: str) -> None:
    """Raise ConfigError where this process was not started as this runtime needs it."""
    if runtime == "ray" and "TORCHELASTIC_RUN_ID" in os.environ:
        rule = "torchrun has started this process as one of its ranks, and each would start Ray's ranks too"
        raise ConfigError("runtime", "ray", rule, "--runtime torchrun")
    if runtime == "torchrun":
        launched()


def _print_chosen(asked: Asked) -> None:
    if asked.model_why:
        print_line(f"model {', '.join(model.name for model in asked.experiment.models)} ({asked.model_why})")
    if asked.why:
        print_line(f"backend {', '.join(asked.experiment.backends)} ({asked.why})")
    for line in asked.placement_why:
        print_line(line)
    if asked.mode_why:
        print_line(f"mode {', '.join(asked.experiment.modes or ())} ({asked.mode_why})")


def _print_taken(planned: list[tuple[Case, Plan]]) -> None:
    """What `auto` has taken for each case, and why."""
    for case, plan in planned:
        choice = plan.choice()
        if choice.why:
            print_line(f"{case.label}: auto takes {choice.exchange} with {choice.backend}: {choice.why}")


def _print_shortages(planned: list[tuple[Case, Plan]]) -> None:
    """Recorded routings that have less than was asked for; their rows say it too."""
    traced = {(case.model, case.workload.skew, case.workload.tokens, case.layers): case for case, _ in planned}
    for case in traced.values():
        if said := shortage(case.model, case.workload, case.layers):
            work = case.workload
            print_line(f"routing {skew_label(work.skew, work.trace)}, {count_of(work.tokens, 'token')}: {said}")
