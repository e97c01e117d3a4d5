"""The command `moe-dist`. Exit codes: 0 fine, 1 a number out of tolerance, 2 bad input, 3 too little machine,
4 a rank failed, 5 the Ray cluster was lost, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_dist import checkpoint
from moe_dist.backends import BACKENDS
from moe_dist.bench.case import Experiment, default_experiment
from moe_dist.bench.results import Outcome, provenance, results_document, write_results
from moe_dist.bench.rounds import turns
from moe_dist.bench.runner import check_fits, group_starter, plan_cases, run_cases
from moe_dist.bench.source import check_models, with_source
from moe_dist.bench.table import last_line, refused_table, size, tables, tuned_table, verdict
from moe_dist.bench.tune import Tuned, check_tunable, compile_ahead, count_steps, tune_shape
from moe_dist.config import model_names, override, read_yaml, resolve_models
from moe_dist.doctor import examine
from moe_dist.errors import ClusterLost, ConfigError, MoeDistError, RankFailure, ResourceError, UnsupportedError
from moe_dist.exchange import EXCHANGES
from moe_dist.plan import Machine, Plan
from moe_dist.progress import Reporter
from moe_dist.runtime.voice import leave_code, speaks
from moe_dist.spec import TOKEN_LAYOUTS
from moe_dist.tables import user_folder

OK, OUT_OF_TOLERANCE, BAD_INPUT, TOO_SMALL, RANK_FAILED, LOST, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
LAST_WORDS_S = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    args = _arguments(arguments)
    try:
        code: int = args.command(args)
        return leave_code(code)
    except MoeDistError as error:
        _report(error, args.json)
        return leave_code(_code(error))
    except KeyboardInterrupt:
        return leave_code(INTERRUPTED)


def _code(error: MoeDistError) -> int:
    codes = ((RankFailure, RANK_FAILED), (ResourceError, TOO_SMALL), (ClusterLost, LOST))
    return next((code for kind, code in codes if isinstance(error, kind)), BAD_INPUT)


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes positional arguments in one run only; here `key=value` may stand anywhere between the flags."""
    parser = _parser()
    args, rest = parser.parse_known_args(given)
    strange = [item for item in rest if item.startswith("-") or "=" not in item or "overrides" not in args]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _report(error: MoeDistError, as_json: bool) -> None:
    if not speaks():
        time.sleep(LAST_WORDS_S)  # torchrun ends all ranks as soon as one ends: the first must have spoken by then
        return
    if as_json:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
    Console(stderr=True).print(f"moe-dist: {error}", style="red", highlight=False, markup=False, soft_wrap=True)


def _console() -> Console:
    console = Console(quiet=not speaks())
    return console if console.is_terminal else Console(width=210, quiet=not speaks())


def doctor(args: argparse.Namespace) -> int:
    found = examine()
    if args.json:
        print(json.dumps(found, indent=1))
        return OK
    console = _console()
    machine = found["machine"]
    console.print(f"{machine['name']}, {machine['cores']} cores, {machine['devices']} CUDA devices", highlight=False)
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["packages"].items())
    console.print(f"Python {found['python']}, {versions}, nvcc {'yes' if found['nvcc'] else 'no'}", highlight=False)
    for kind in ("backends", "exchanges"):
        table = Table(kind[:-1], "usable here", "what to know", header_style="bold")
        for name, answer in found[kind].items():
            table.add_row(name, "[green]yes[/]" if answer["ok"] else "[red]no[/]", answer["reason"])
        console.print(table)
    return OK


def plan(args: argparse.Namespace) -> int:
    experiment = _single(args)
    machine = Machine.detect(experiment.device)
    cases = list(experiment.cases("cpu" if experiment.modes is None else machine.device))
    if len(cases) != 1:
        rule = "plan is for one configuration; compare takes lists"
        raise ConfigError("overrides", " ".join(args.overrides), rule, "one world of tp·ep ranks, one value a key")
    (case,) = cases
    made = case.plan(machine)
    if case.source.checkpoint is not None and not checkpoint.Checkpoint(case.source.checkpoint).holds_weights:
        said = f"{case.source.checkpoint} holds no weights, so the layer's format is what its config.json says"
        Console(stderr=True).print(f"moe-dist: {said}", highlight=False, markup=False, soft_wrap=True)
    if args.json:
        print(json.dumps(made.as_dict() | {"wire_bytes": made.wire_bytes(case.workload.tokens)}, indent=1))
        return OK
    console = _console()
    _print_plan(console, made, case.workload.tokens)
    return OK


def _print_plan(console: Console, made: Plan, tokens: int) -> None:
    spec, world = made.spec, made.placement.world
    shared = ", no shared expert" if spec.shared_experts == "none" else f", shared expert {spec.shared_experts}"
    console.print(
        f"{spec.name} {spec.quant_label}{shared}, as {made.parallel.label}, {made.token_layout} tokens: exchange"
        f" {made.exchange}, backend {made.backend}, rows travel as {made.payload}, partial sums as {made.combine_dtype}"
        + (", with a change of token layout around it" if made.converts_layout else ""),
        highlight=False,
    )
    ranks = Table("rank", "experts", "slice of intermediate", "weights", header_style="bold")
    for rank in range(world):
        start, stop = made.placement.slice_of(rank)
        experts = len(made.placement.experts_of(rank))
        ranks.add_row(str(rank), str(experts), f"{start} to {stop}", size(made.weight_bytes(rank)))
    console.print(ranks)
    share = -(-tokens // world) if made.token_layout == "sharded" else tokens
    console.print(
        f"{tokens} tokens: at most {made.most_rows(share)} (token, expert) pairs and about"
        f" {size(made.scratch_bytes(share))} of scratch on a rank, at most {size(made.wire_bytes(tokens))} sent by one;"
        " CUDA graph: " + ("yes" if made.capturable.ok else f"no ({made.capturable.reason})"),
        highlight=False,
    )
    for name, source in made.tables().items():
        console.print(f"tuned: {source} {name}" if source else f"tuned: none, defaults (no {name})", highlight=False)
    choices = Table("choice", "name", "possible", "taken", "why not", header_style="bold")
    for choice in made.choices:
        taken = "yes" if choice.chosen else ""
        choices.add_row(choice.kind, choice.name, "yes" if choice.possible else "no", taken, choice.reason)
    console.print(choices)


def run(args: argparse.Namespace) -> int:
    return _measure(_single(args), args, sweep=False)


def compare(args: argparse.Namespace) -> int:
    if args.file and "=" in args.file:  # no file, the first override stands in its place
        args.file, args.overrides = None, [args.file, *args.overrides]
    machine = Machine.detect(args.device or "auto")
    config = with_source(
        override(read_yaml(args.file) if args.file else {}, args.overrides), args.checkpoint, args.layer
    )
    if not args.file:
        router = config["source"].get("checkpoint") is not None
        config = default_experiment(machine, BACKENDS.names(), router) | config
    return _measure(_experiment(config, args), args, sweep=True)


def check(args: argparse.Namespace) -> int:
    """Every placement and exchange of one model at its real shapes, numbers only."""
    config: dict[str, Any] = {
        "name": "check",
        "placements": ["tp", "ep"],
        "worlds": [args.world],
        "exchanges": ["local"] if args.world == 1 else ["all_reduce", "ag_rs", "all_to_all"],
        "backends": args.backend,
        "tokens": args.tokens,
        "skews": args.skew,
        "iters": 0,
        "warmup": 0,
    }
    return _measure(_experiment(override(config, args.overrides), args), args, sweep=True)


def build(args: argparse.Namespace) -> int:
    backend = BACKENDS.get(args.backend)
    backend.build()
    state = backend.available(Machine.detect().device)
    said = "ready" if state.ok else f"built, but it can't run here: {state.reason}"
    print(json.dumps(state._asdict()) if args.json else f"{args.backend}: {said}")
    return OK if state.ok else TOO_SMALL


def tune(args: argparse.Namespace) -> int:
    """One device is enough for any placement: each shape that its ranks have is tuned alone."""
    buckets, folder = _buckets(args.rows), Path(args.out or user_folder())
    if args.seeds < 1:
        raise ConfigError("seeds", args.seeds, "each config is timed and checked with so many", "1 and more")
    for assignment in args.overrides:
        if not assignment.startswith("model."):
            raise ConfigError("override", assignment, "only the model can be changed here", "model.key=value")
    experiment = _experiment(override(_one_placement(args), args.overrides), args)
    machine = Machine.detect(experiment.device)
    case = next(experiment.cases("cpu"))
    check_tunable(case, machine, buckets)
    made = case.plan(machine)
    check_fits(max(made.weight_bytes(rank) for rank in range(made.placement.world)), machine)
    _check_writable(folder / "table.json")
    done: list[tuple[Tuned, Path | None]] = []
    with Reporter(count_steps(made, buckets), remaining=True) as reporter:
        compile_ahead(made, buckets, reporter.shown)
        for part in made.parts():
            tuned = tune_shape(made, part, buckets, args.seeds, experiment.source.seed, reporter.shown, reporter.step)
            done.append((tuned, tuned.table.write(folder) if tuned.table else None))
    if args.json:
        print(json.dumps([tuned.as_dict() | {"file": path and str(path)} for tuned, path in done], allow_nan=False))
    else:
        for tuned, path in done:
            _print_tuned(_console(), tuned, path)
    return OK if all(found.entry for tuned, _ in done for found in tuned.found) else OUT_OF_TOLERANCE


def _print_tuned(console: Console, tuned: Tuned, path: Path | None) -> None:
    console.print(tuned_table(tuned))
    passed_over = [f"{found.rows} rows: {found.reason}" for found in tuned.found if found.reason and found.entry]
    for line in [*passed_over, f"table: {path}" if path else "no table: nothing was found"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _buckets(text: str) -> list[int]:
    try:
        buckets = sorted({int(part) for part in text.split(",")})
    except ValueError:
        buckets = [0]
    if buckets[0] < 1:
        raise ConfigError("rows", text, "numbers of rows that enter a rank", "1 and more, with commas between them")
    return buckets


def demo_checkpoint(args: argparse.Namespace) -> int:
    made = checkpoint.make_checkpoint(
        args.directory,
        hidden=256,
        intermediate=640,
        num_experts=10 if args.model_type == "qwen3_moe" else 16,  # DeepSeek-V3's groups must divide the experts
        model_type=args.model_type,
        seed=args.seed,
    )
    print(json.dumps({"checkpoint": str(made)}) if args.json else f"checkpoint of random weights: {made}")
    return OK


def _single(args: argparse.Namespace) -> Experiment:
    """The experiment of one configuration, for `plan` and `run`."""
    config = _one_placement(args) | {
        "name": "run",
        "tokens": [args.tokens],
        "token_layouts": [args.token_layout],
        "skews": [args.skew],
        "payload": args.payload,
        "iters": args.iters,
    }
    if args.exchange:
        config["exchanges"] = [args.exchange]
    return _experiment(override(config, args.overrides), args)


def _one_placement(args: argparse.Namespace) -> dict[str, Any]:
    world = args.tp * args.ep
    return {
        "worlds": [world],
        "placements": [f"tp{args.tp}xep{args.ep}"],
        "exchanges": ["local" if world == 1 else "ag_rs"],
        "backends": [args.backend],
    }


def _experiment(config: dict[str, Any], args: argparse.Namespace) -> Experiment:
    """Flags over the file's keys. Without any model the small embedded default is taken."""
    config = with_source(config, args.checkpoint, args.layer)
    if args.model:
        config["models"] = [args.model]
    elif "models" not in config:
        config["models"] = ["tiny"]
    for key in ("runtime", "device"):
        if getattr(args, key, None) is not None:
            config[key] = getattr(args, key)
    experiment = Experiment(**resolve_models(config))
    source = experiment.source
    if source.checkpoint is not None and source.layer is not None:
        check_models(experiment.models, source, checkpoint.layer_spec(source.checkpoint, source.layer))
    return experiment


def _measure(experiment: Experiment, args: argparse.Namespace, sweep: bool) -> int:
    machine = Machine.detect(experiment.device)
    if experiment.runtime == "ray" and "TORCHELASTIC_RUN_ID" in os.environ:
        rule = "torchrun has started this process as one of its ranks, and each would start Ray's ranks too"
        raise ConfigError("runtime", "ray", rule, "--runtime torchrun")
    for name in experiment.backends:
        BACKENDS.get(name)  # an unknown name is a mistake, not a case that can't run here
    for name in experiment.exchanges:
        EXCHANGES.get(name)
    if args.build:  # here, before any rank is there: one process compiles, and the user sees how far it is
        for backend in map(BACKENDS.get, experiment.backends):
            if machine.device == "cuda" or backend.available(machine.device).ok:  # minutes for what can't run: no
                backend.build()
    planned, refused = plan_cases(experiment.cases(machine.device), machine)
    if not planned or (refused and not sweep):
        reasons = list(dict.fromkeys(item["reason"] for item in refused))
        raise UnsupportedError("this experiment", reasons or ["it has no case: no placement fits any of its worlds"])
    if args.out:
        _check_writable(Path(args.out))
    outcome = Outcome(refused=refused)
    start = group_starter(experiment, machine)
    about = provenance(machine)
    with Reporter(sum(turns(case) for case, _ in planned), quiet=not speaks()) as reporter:

        def turn_done() -> None:
            reporter.step()
            if args.out and speaks():  # after every turn of a case: what was measured before a failure is kept
                write_results(Path(args.out), about, outcome)

        run_cases(planned, start, experiment.case_timeout_s, outcome, reporter.shown, reporter.said, turn_done)
    if args.json and speaks():
        print(json.dumps(results_document(about, outcome), allow_nan=False))
    elif not args.json:
        _print_outcome(outcome, args, sweep)
    return OK if outcome.ok else OUT_OF_TOLERANCE


def _check_writable(path: Path) -> None:
    """Before anything is measured: results that can't be kept are minutes lost."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("out", str(path), f"can't be written: {error.strerror}") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError("out", str(path), "can't be written", "a file in a directory that you may write to")


def _print_outcome(outcome: Outcome, args: argparse.Namespace, sweep: bool) -> None:
    console = _console()
    for table in tables(outcome.rows):
        console.print(table)
    if outcome.refused:
        console.print(refused_table(outcome.refused))
    failed = [row for row in outcome.rows if row["ok"] is False]
    if failed:
        console.print(f"{len(failed)} of {len(outcome.rows)} rows are out of tolerance.", style="bold red")
    if args.out:
        console.print(f"results: {args.out}", highlight=False)
    timed = [row for row in outcome.rows if row["p50_us"] is not None]
    if not timed:
        passed = sum(row["ok"] is True for row in outcome.rows)
        console.print(f"{passed} of {len(outcome.rows)} cases agree with the oracle.", highlight=False)
    elif sweep:
        for sentence in verdict(timed):
            console.print(f"- {sentence}", highlight=False, soft_wrap=True)
        console.print(last_line(timed), style="bold", highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moe-dist", description="Compare distributed FP8 MoE layers.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
        return sub

    command("doctor", doctor, "what this machine has, and what can run on it")
    for name, function, text in (
        ("plan", plan, "what would run, and why not something else; loads no weights"),
        ("run", run, "measure one configuration"),
    ):
        sub = command(name, function, text)
        _model_flags(sub)
        _grid_flags(sub)
        if name == "run":
            _build_flag(sub)
            sub.add_argument("--out", help="write the results file here")
    sub = command("compare", compare, "placements × exchanges × backends × tokens × skews, side by side")
    sub.add_argument("file", nargs="?", help="experiment file (YAML); without one, the small embedded default")
    _model_flags(sub)
    _build_flag(sub)
    sub.add_argument("--out", help="write the results file here")
    sub = command("check", check, "numbers against the oracle at a model's real shapes")
    _model_flags(sub)
    sub.add_argument("--world", type=int, default=2, help="ranks (default 2)")
    sub.add_argument("--tokens", type=int, nargs="+", default=[1, 16], help="global tokens")
    sub.add_argument("--backend", nargs="+", default=["torch"])
    sub.add_argument("--skew", nargs="+", default=["uniform", "single"])
    _build_flag(sub)
    sub.add_argument("--out", help="write the results file here")
    sub = command("build", build, "compile what a backend needs, once; can take many minutes")
    sub.add_argument("backend", choices=BACKENDS.names())
    sub = command(
        "tune", tune, "find a backend's fastest configs for a model's shapes (random weights), for its tables"
    )
    _source_flags(sub)
    sub.add_argument("--tp", type=int, default=1)
    sub.add_argument("--ep", type=int, default=1)
    sub.add_argument("--backend", default="triton", help="default triton")
    sub.add_argument("--rows", default="1,8,32,128,512,2048,8192", help="rows entering a rank (default %(default)s)")
    sub.add_argument("--seeds", type=int, default=3, help="inputs to time and check with (default 3)")
    sub.add_argument("--out", metavar="DIR", help="folder for the tables (default: the user's cache)")
    sub = command("demo-checkpoint", demo_checkpoint, "write a small checkpoint of random weights to try things on")
    sub.add_argument("directory")
    sub.add_argument("--model-type", default="qwen3_moe", choices=("qwen3_moe", "deepseek_v3"))
    sub.add_argument("--seed", type=int, default=0)
    return parser


def _source_flags(sub: argparse.ArgumentParser) -> None:
    source = sub.add_mutually_exclusive_group()
    source.add_argument("--model", help=f"one of {', '.join(model_names())}, or a YAML file; random weights")
    source.add_argument("--checkpoint", help="folder of a Hugging Face checkpoint; its own experts and router")
    sub.add_argument("--layer", type=int, help="which layer of the checkpoint (default 0)")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default auto")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the experiment: model.quant=none")


def _model_flags(sub: argparse.ArgumentParser) -> None:
    _source_flags(sub)
    sub.add_argument("--runtime", choices=("ray", "torchrun"), help="who starts the ranks (default ray)")


def _build_flag(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--build", action="store_true", help="first build backends that are not built (many minutes)")


def _grid_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--tp", type=int, default=1)
    sub.add_argument("--ep", type=int, default=1)
    sub.add_argument("--exchange", help="default: local on one rank, ag_rs on more")
    sub.add_argument("--backend", default="torch")
    sub.add_argument("--tokens", type=int, default=64, help="global tokens of a step (default 64)")
    sub.add_argument("--token-layout", default="sharded", choices=TOKEN_LAYOUTS)
    sub.add_argument("--skew", default="uniform")
    sub.add_argument("--payload", default="auto")
    sub.add_argument("--iters", type=int, default=100)
