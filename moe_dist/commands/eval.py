"""`moe-dist eval`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from cyclopts import Parameter

from moe_dist.backends import BACKENDS
from moe_dist.bench.case import parse_grid
from moe_dist.bench.results import provenance
from moe_dist.bench.runner import check_fits, machine_of_ranks, starter
from moe_dist.commands.call import ThisCall
from moe_dist.commands.eval_table import document, print_rows
from moe_dist.commands.flags import BACKEND_HELP, NAMES, NUMBER, Ep, Json, Runtime, Tp
from moe_dist.commands.measuring import check_launcher
from moe_dist.commands.printing import console, print_json
from moe_dist.commands.progress import Reporter
from moe_dist.commands.terminal import to_standard_output
from moe_dist.engine.planning import AUTO
from moe_dist.errors import CheckpointError, ConfigError
from moe_dist.exchange import EXCHANGES
from moe_dist.exits.exit_codes import OK, OUT_OF_TOLERANCE
from moe_dist.integrations.evaluation.harness import require
from moe_dist.integrations.evaluation.running import Evaluation, Harness, Row, Start, Work
from moe_dist.integrations.evaluation.setup import (
    Setup,
    Variant,
    logits_bytes,
    planned,
    specs_of,
    vocabulary,
    weight_bytes,
)
from moe_dist.integrations.evaluation.task import Task, read_task
from moe_dist.integrations.transformers.version import installed
from moe_dist.machine.machine import Machine, available_memory
from moe_dist.messages.counts import count_of
from moe_dist.model.spec import LEAST_SEED, MOST_SEED, QUANT_KINDS, ParallelSpec, QuantKind
from moe_dist.runtime.context import Group, RaySpec
from moe_dist.runtime.voice import launched, speaks

MOST_BATCH, MOST_NEW, MOST_TEXT = 65_536, 65_536, 1 << 20
PLACEMENTS = "tp1, tp2, ep4, tp2xep2 and the like"

Checkpoint = Annotated[str, Parameter(help="Folder of a whole Hugging Face model with its tokenizer.")]
TASK_HELP = """File of JSON lines to ask: prompt and answer, or question and answer with "#### N" as GSM8K has them. A
line's own pattern is a regular expression that finds the answer."""
TaskFile = Annotated[str | None, Parameter(help=TASK_HELP.replace("\n", " "))]
LOGITS_HELP = "Compare logits on text that the baseline itself draws, about so many tokens; needs no task."
LogitTokens = Annotated[int | None, NUMBER, Parameter(help=LOGITS_HELP)]
Baseline = Annotated[
    str | None, Parameter(help="Checkpoint that transformers runs in bf16 to compare with (default: the same).")
]
Backends = Annotated[list[str] | None, NAMES, Parameter(show_default=False, help=BACKEND_HELP)]
Placements = Annotated[
    list[str] | None,
    NAMES,
    Parameter(show_default=False, help=f"Several to compare, in place of --tp and --ep: {PLACEMENTS}."),
]
EXCHANGE_HELP = f"Of {', '.join(EXCHANGES.names())}. Default: local on one rank, all_reduce on more."
Exchange = Annotated[str | None, Parameter(help=EXCHANGE_HELP)]
Quant = Annotated[
    str | None, Parameter(help="FP8 format that bf16 experts are quantized to (default: as they are stored).")
]
HARNESS_HELP = "Task of lm-evaluation-harness (the extra `eval`), with data that is on this machine."
HarnessTask = Annotated[str | None, Parameter(name="--harness", help=HARNESS_HELP)]
HarnessTasks = Annotated[str | None, Parameter(help="Folder with YAML files of further tasks for --harness.")]
Limit = Annotated[int | None, NUMBER, Parameter(help="Ask so many questions (default: all).")]
Shots = Annotated[int, NUMBER, Parameter(help="The task's first lines are examples before every prompt, so many.")]
Pattern = Annotated[
    str | None, Parameter(help="Regular expression that finds an answer, for lines without one (default: first line).")
]
BatchSize = Annotated[int, NUMBER, Parameter(help="Questions that are answered together.")]
New = Annotated[int, NUMBER, Parameter(help="Tokens that an answer may have.")]
Seed = Annotated[int, NUMBER, Parameter(help="Of the text for --logits.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], Parameter(help="Where the model runs.")]


def eval(
    checkpoint: Checkpoint,
    /,
    *,
    task: TaskFile = None,
    harness: HarnessTask = None,
    harness_tasks: HarnessTasks = None,
    logits: LogitTokens = None,
    baseline: Baseline = None,
    backends: Backends = None,
    tp: Tp = 1,
    ep: Ep = 1,
    placements: Placements = None,
    exchange: Exchange = None,
    quant: Quant = None,
    limit: Limit = None,
    shots: Shots = 0,
    pattern: Pattern = None,
    batch_size: BatchSize = 8,
    max_new_tokens: New = 256,
    seed: Seed = 0,
    device: Device = "auto",
    runtime: Runtime = None,
    json: Json = False,
    call: ThisCall,
) -> int:
    """Every rank holds the whole model and has every question; its experts are shared out."""
    _check_sizes(batch_size=batch_size, max_new_tokens=max_new_tokens, logits=logits, seed=seed)
    kind = _kind(quant)
    grids = _grids(placements, tp, ep)
    _check_names(backends, exchange)
    _check_baseline(baseline)
    measured = _harness(harness, harness_tasks, limit, shots)
    asked = _asked(task, measured, logits, limit, shots, pattern)
    runtime, ray = runtime or "ray", RaySpec()
    check_launcher(runtime)
    installed()
    if measured:
        require()
    machine = machine_of_ranks(runtime, ray, device)
    names: Sequence[str | None] = backends or (None,)
    found = [planned(checkpoint, grid, exchange, name, kind, machine)[0] for grid in grids for name in names]
    variants = list(dict.fromkeys(found))
    world = _world(runtime, variants)
    _check_room(variants, baseline or checkpoint, checkpoint, machine, world, logits or 0)
    setup = Setup(checkpoint, baseline or checkpoint, batch_size, max_new_tokens, ray.collective_timeout_s)
    work = Work(setup, asked, logits or 0, seed, measured)
    largest = max(each.parallel.world for each in variants)
    rows = _rows(work, variants, starter(runtime, ray, machine, largest), world, call)
    if not speaks():
        return _code(rows)
    if json:
        print_json(document(rows, work, provenance(machine).model_dump(mode="json")))
    else:
        with to_standard_output():
            print_rows(console(), rows, work)
    return _code(rows)


def _rows(work: Work, variants: list[Variant], start: Start, world: int, call: ThisCall) -> list[Row]:
    signals = call.ending.signals
    with Reporter(work.steps(variants), quiet=not speaks(), remaining=True) as reporter:

        def shown(text: str) -> None:
            signals.check()
            reporter.shown(text)

        def started(size: int, told: Callable[[str], None]) -> Group:
            group = start(size, told)
            if group.runtime == "ray":  # ray.init has set a handler of its own
                signals.install()
            return group

        evaluation = Evaluation(work, started, shown, reporter.step)
        return list(evaluation.rows(variants, world))


def _code(rows: Sequence[Row]) -> int:
    return OUT_OF_TOLERANCE if any(row.lost for row in rows) else OK


def _check_sizes(*, batch_size: int, max_new_tokens: int, logits: int | None, seed: int) -> None:
    sizes = (
        ("batch_size", batch_size, MOST_BATCH, "questions that are answered together"),
        ("max_new_tokens", max_new_tokens, MOST_NEW, "tokens that an answer may have"),
        ("logits", logits, MOST_TEXT, "tokens of the baseline's own text"),
    )
    for field, value, most, what in sizes:
        if value is not None and not 1 <= value <= most:
            raise ConfigError(field, value, f"is no number of {what}", f"1 to {most:,}")
    if not LEAST_SEED <= seed <= MOST_SEED:
        raise ConfigError("seed", seed, "has more than 64 bits", f"{LEAST_SEED} to {MOST_SEED}")


def _kind(quant: str | None) -> QuantKind | None:
    found: dict[str, QuantKind] = {each: each for each in QUANT_KINDS}  # type: ignore[misc]
    if quant is not None and quant not in found:
        raise ConfigError("quant", quant, "is no format of experts", QUANT_KINDS)
    return None if quant is None else found[quant]


def _grids(placements: Sequence[str] | None, tp: int, ep: int) -> list[ParallelSpec]:
    if placements is None:
        return [ParallelSpec(tp=tp, ep=ep)]
    if (tp, ep) != (1, 1):
        raise ConfigError("placements", list(placements), "contradicts --tp or --ep, which name one", "one of the two")
    grids = []
    for name in placements:
        grid = parse_grid(name)
        if grid is None:
            raise ConfigError("placements", name, "names no sizes of a placement", PLACEMENTS)
        grids.append(grid)
    return grids


def _check_names(backends: Sequence[str] | None, exchange: str | None) -> None:
    for name in backends or ():
        if name != AUTO:
            BACKENDS.get(name)
    if exchange is not None and exchange != AUTO:
        EXCHANGES.get(exchange)


def _check_baseline(baseline: str | None) -> None:
    if baseline is None:
        return
    try:
        specs_of(baseline, None)
    except CheckpointError as error:
        raise ConfigError("baseline", baseline, error.problem, "the folder of a checkpoint") from None


def _harness(task: str | None, folder: str | None, limit: int | None, shots: int) -> Harness | None:
    if folder is not None:
        if task is None:
            raise ConfigError("harness_tasks", folder, "is of --harness, and no task is named", "--harness TASK")
        if not os.path.isdir(folder):
            raise ConfigError("harness_tasks", folder, "is no folder", "a folder with YAML files of tasks")
    if task is None:
        return None
    if limit is not None and limit < 1:
        raise ConfigError("limit", limit, "is a number of questions", "1 and more")
    if shots < 0:
        raise ConfigError("shots", shots, "is a number of examples", "0 and more")
    return Harness(task, folder and os.path.abspath(folder), limit, shots)


def _asked(
    task: str | None, measured: Harness | None, logits: int | None, limit: int | None, shots: int, pattern: str | None
) -> Task | None:
    """The questions of `--task`."""
    if task is not None:
        return read_task(task, pattern=pattern, limit=limit, shots=shots)
    of_both = {} if measured else {"limit": limit, "shots": shots or None}
    _check_no_task(pattern=pattern, **of_both)
    if logits is None and measured is None:
        rule = "there is nothing to ask and no logits to compare"
        raise ConfigError("task", None, rule, "--task FILE, --harness TASK or --logits N")
    return None


def _world(runtime: str, variants: Sequence[Variant]) -> int:
    """How many ranks there are already."""
    if runtime != "torchrun":
        return 1
    world = launched().world
    for each in variants:
        if each.parallel.world != world:
            rule = f"has {count_of(each.parallel.world, 'rank')}, and torchrun started {world}"
            legal = f"placements of {count_of(world, 'rank')}, or --runtime ray"
            raise ConfigError("placements", each.placement, rule, legal)
    return world


def _check_no_task(**given: object) -> None:
    for field, value in given.items():
        if value is not None:
            raise ConfigError(field, value, "is of a task, and none is given", "--task FILE beside it")


def _check_room(
    variants: list[Variant], baseline: str, checkpoint: str, machine: Machine, world: int, logits: int
) -> None:
    """Whole models: on a CPU all ranks' lie in one memory. FP8 that transformers makes bf16 of takes twice as much.
    What is kept for --logits lies in the host's memory, beside the models on a CPU."""
    most = max(world, *(each.parallel.world for each in variants))
    ranks = most if machine.device == "cpu" else 1
    size = 2 * max(weight_bytes(folder) for folder in {baseline, checkpoint})
    check_fits(size * ranks, machine, f"a whole model on each of {ranks} ranks" if ranks > 1 else "a whole model")
    left = int(0.9 * available_memory()) - (size * ranks if machine.device == "cpu" else 0)
    a_token = logits_bytes(baseline, 1) * most
    if logits * a_token > left:
        width, gib = vocabulary(baseline), logits * a_token / 2**30
        rule = (
            f"the baseline's logits over {width:,} tokens of vocabulary would take up to {gib:.1f} GiB on"
            f" {count_of(most, 'rank')}, and {max(left, 0) / 2**30:.1f} GiB of memory are left for them"
        )
        fewest = "fewer ranks or a machine with more memory"
        raise ConfigError("logits", logits, rule, f"1 to {left // a_token:,}" if left >= a_token else fewest)
