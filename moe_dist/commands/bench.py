"""`moe-dist bench`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter

from moe_dist.bench.case import LARGEST_STACK, LISTS, MOST_ITERATIONS
from moe_dist.bench.phases import (
    MEASURED,
    MOST_LAYERS,
    BenchResult,
    combined,
    fitting_layers,
    phase_cases,
    requests_of,
    step_sizes,
)
from moe_dist.bench.phases_lines import append_lines, check_lines
from moe_dist.bench.results import Outcome
from moe_dist.bench.row import Provenance
from moe_dist.commands.asked import Asked, asked_for, configuration
from moe_dist.commands.call import ThisCall
from moe_dist.commands.config import override
from moe_dist.commands.flags import (
    NO_PROFILE,
    NO_SOURCE,
    NOT_KEPT,
    NUMBER,
    NUMBERS,
    Configuration,
    Json,
    Measuring,
    Profiling,
    Runtime,
    Source,
    keys_help,
)
from moe_dist.commands.kept import Summary
from moe_dist.commands.measuring import measure
from moe_dist.commands.outcome import print_rows
from moe_dist.commands.phases_table import print_phases, report
from moe_dist.commands.profiling import print_traces, profiled
from moe_dist.commands.terminal import Terminal, say
from moe_dist.errors import ConfigError, OutputError
from moe_dist.files import one_path
from moe_dist.messages.printable import printable
from moe_dist.runtime.voice import speaks

OWN = {
    "tokens": "--batch-size, --input-len and --chunked-prefill-size",
    "layers": "--layers and --measured-layers",
    "record_routing": "no such key; run records one",
}

Keys = Annotated[str, Parameter(name="key=value", help=keys_help(*OWN))]
BatchSizes = Annotated[list[int], NUMBERS, Parameter(name="--batch-size", help="Sequences.")]
InputLens = Annotated[list[int], NUMBERS, Parameter(name="--input-len", help="Tokens of each prompt.")]
OutputLens = Annotated[list[int], NUMBERS, Parameter(name="--output-len", help="Tokens that each sequence gets.")]
Layers = Annotated[int, NUMBER, Parameter(help="MoE layers of the model (DeepSeek-V3 has 58).")]
MeasuredLayers = Annotated[
    int | None,
    NUMBER,
    Parameter(help=f"Time so many, as one stack, and scale to --layers (default: up to {MEASURED}, as many as fit)."),
]
Chunk = Annotated[int, NUMBER, Parameter(help="Most global tokens of a step of prefill; -1 for no chunks.")]
Iters = Annotated[int, NUMBER, Parameter(help="Timed steps of each size; all others are taken to be like them.")]
Seed = Annotated[int, NUMBER, Parameter(help="Of tokens and routing.")]
RunName = Annotated[str, Parameter(help="What results are called.")]
ResultFile = Annotated[str | None, Parameter(help="Append results to this file, a line of JSON for each batch.")]
ShowReport = Annotated[bool, Parameter(show_default=False, help="Print the report in Markdown too.")]
SkipWarmup = Annotated[bool, Parameter(show_default=False, help="No untimed steps before the timed ones.")]
ONE_BATCH, PROMPT, ANSWER, ONE_WAY = [1], [1024], [16], Configuration()


def bench(
    *overrides: Keys,
    batch_size: BatchSizes = ONE_BATCH,
    input_len: InputLens = PROMPT,
    output_len: OutputLens = ANSWER,
    layers: Layers = 1,
    measured_layers: MeasuredLayers = None,
    chunked_prefill_size: Chunk = 8192,
    source: Source = NO_SOURCE,
    runtime: Runtime = None,
    chosen: Configuration = ONE_WAY,
    iters: Iters = 20,
    seed: Seed = 0,
    skip_warmup: SkipWarmup = False,
    run_name: RunName = "default",
    result_filename: ResultFile = None,
    show_report: ShowReport = False,
    profiling: Profiling = NO_PROFILE,
    measuring: Measuring = NOT_KEPT,
    json: Json = False,
    call: ThisCall,
) -> int:
    """Each size of step is measured and checked as `run` does it."""
    requests = requests_of(batch_size, input_len, output_len, chunked_prefill_size)
    _check_layers(layers, measured_layers)
    config = configuration(chosen) | {"name": "bench", "tokens": step_sizes(requests), "iters": iters, "seed": seed}
    config |= {"warmup": 0} if skip_warmup else {}
    asked = _one(asked_for(_overridden(config, overrides), source, sweep=False, runtime=runtime), skip_warmup)
    _check_places(result_filename, measuring.out)
    if measured_layers is None:
        measured_layers, reason = fitting_layers(asked.experiment, asked.machine, requests, layers)
        if reason and speaks():
            say(f"{measured_layers} of {layers} layers will be timed, as {measured_layers + 1} can't be: {reason}")
    experiment = asked.experiment.with_changes(layers=measured_layers)
    of_phases = phase_cases(experiment, asked.machine.device, asked.chosen_by, requests)
    wanted = profiled(of_phases, profiling, measuring.out or result_filename)
    once = list({(case.workload.tokens, case.graph): case for case in wanted}.values())
    problems: list[OutputError] = []

    def summed(outcome: Outcome, about: Provenance) -> Summary:
        found = [combined(request, of_phases, outcome.rows, run_name, layers, about) for request in requests]
        problems.extend(_appended(result_filename, found))

        def show(console: Terminal, kept: str | None) -> None:
            if measuring.wide:
                print_rows(console, outcome, wide=True)
            print_phases(console, found)
            if show_report:
                console.print(report(found), soft_wrap=True, markup=False, highlight=False)
            for name, path in (("rows", kept), ("results", None if problems else result_filename)):
                if path:
                    console.print(f"{name}: {printable(path)}", soft_wrap=True)
            print_traces(once)

        return Summary("bench", found, show)

    code = measure(asked, measuring, call, as_json=json, sweep=False, cases=once, summed=summed)
    if problems:
        raise problems[0]
    return code


def _check_layers(layers: int, measured_layers: int | None) -> None:
    if not 1 <= layers <= MOST_LAYERS:
        raise ConfigError("layers", layers, "is a number of MoE layers", f"1 to {MOST_LAYERS:,}")
    most = min(layers, LARGEST_STACK)
    if measured_layers is not None and not 1 <= measured_layers <= most:
        raise ConfigError("measured_layers", measured_layers, f"are timed of {layers} layers", f"1 to {most}")


def _overridden(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for key, value in override({}, overrides).items():
        if key in OWN:
            raise ConfigError(key, value, "is no key of bench", OWN[key])
    return override(config, overrides)


def _one(asked: Asked, skip_warmup: bool) -> Asked:
    """Raise ConfigError for several configurations, and for one of which nothing would be timed."""
    experiment = asked.experiment
    for key in LISTS:
        values = getattr(experiment, key)
        if key not in ("tokens", "modes") and len(values) > 1:
            raise ConfigError(f"experiment.{key}", list(values), "are several: bench times one configuration", "one")
    if not experiment.iters:
        raise ConfigError("experiment.iters", 0, "steps would be timed", f"1 to {MOST_ITERATIONS:,}")
    if skip_warmup and experiment.warmup:
        raise ConfigError("experiment.warmup", experiment.warmup, "contradicts --skip-warmup", "one of the two")
    return asked


def _check_places(result_filename: str | None, out: str | None) -> None:
    if result_filename is None:
        return
    if out and one_path(out) == one_path(result_filename):
        raise ConfigError("result_filename", result_filename, "is the file of --out too", "another file")
    if speaks():
        check_lines(result_filename)


def _appended(result_filename: str | None, found: Sequence[BenchResult]) -> list[OutputError]:
    """What went wrong with it, to be raised when all is printed."""
    try:
        if result_filename is not None and speaks():
            append_lines(result_filename, found)
    except OutputError as error:
        return [error]
    return []
