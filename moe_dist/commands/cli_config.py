"""Arguments and files to the experiment that a command runs."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from moe_dist import checkpoint
from moe_dist.bench.case import LISTS, ChosenBy, Experiment
from moe_dist.bench.defaults import default_backend, default_modes
from moe_dist.bench.source import check_models, with_source
from moe_dist.commands.config import override, resolve_models
from moe_dist.commands.terminal import say
from moe_dist.commands.yaml_loader import integer
from moe_dist.errors import ConfigError
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MOST_TOKENS
from moe_dist.runtime.voice import speaks, together


class Asked(NamedTuple):
    """An experiment with what nobody named filled in. `why`: who chose the backend, `mode_why`: the mode; empty where
    they were named."""

    experiment: Experiment
    machine: Machine
    chosen_by: ChosenBy = "name"
    why: str = ""
    mode_why: str = ""


def single(args: argparse.Namespace) -> Asked:
    """The experiment of one configuration, for `plan` and `run`."""
    config = one_placement(args) | {
        "name": "run",
        "tokens": [args.tokens],
        "token_layouts": [args.token_layout],
        "skews": [args.skew],
        "payload": args.payload,
        "iters": args.iters,
    }
    if args.exchange:
        config["exchanges"] = [args.exchange]
    return asked_for(override(config, args.overrides), args, sweep=False)


def one_placement(args: argparse.Namespace) -> dict[str, Any]:
    world = args.tp * args.ep
    return {
        "worlds": [world],
        "placements": [f"tp{args.tp}xep{args.ep}"],
        "exchanges": ["local" if world == 1 else "ag_rs"],
    } | ({"backends": [args.backend]} if args.backend else {})


def asked_for(config: dict[str, Any], args: argparse.Namespace, sweep: bool) -> Asked:
    config = _with_flags(config, args)
    together(config.get("runtime") == "torchrun")
    experiment = Experiment(**config)
    source = experiment.source
    if source.checkpoint is not None and source.layer is not None:
        check_models(experiment.models, source, checkpoint.layer_spec(source.checkpoint, source.layer))
    for key in LISTS:
        given, taken = config.get(key), getattr(experiment, key)
        if isinstance(given, (list, tuple)) and len(taken) < len(given) and speaks():
            say(f"{key}: {len(given) - len(taken)} of {len(given)} values stand there already; each is measured once")
    machine = Machine.detect(experiment.device)
    chosen_by: ChosenBy = "name"
    why = mode_why = ""
    if "backends" not in config:
        backend, why = default_backend(experiment, machine)
        experiment, chosen_by = experiment.with_changes(backends=(backend,)), "default"
    if experiment.modes is None and machine.device == "cuda" and (why or not sweep):
        modes, mode_why = default_modes(experiment, machine)
        if mode_why:
            experiment = experiment.with_changes(modes=modes)
    return Asked(experiment, machine, chosen_by, why, mode_why)


def _with_flags(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Flags over the file's keys. Without any model the small embedded default is taken."""
    config = with_source(config, args.checkpoint, args.layer)
    if args.model:
        config["models"] = [args.model]
    elif "models" not in config:
        config["models"] = ["tiny"]
    for key in ("runtime", "device", "layers"):
        if getattr(args, key, None) is not None:
            config[key] = getattr(args, key)
    return resolve_models(config)


def buckets_of(text: str) -> list[int]:
    """The numbers of rows that `tune` takes."""
    try:
        buckets = sorted({integer(part) for part in text.split(",")})
    except ValueError:
        buckets = [0]
    if not 1 <= buckets[0] <= buckets[-1] <= MOST_TOKENS:
        legal = f"1 to {MOST_TOKENS}, with commas between them"
        raise ConfigError("rows", text, "numbers of rows that enter a rank", legal)
    return buckets


def files_read(experiment: Experiment, args: argparse.Namespace) -> list[str]:
    """Files and folders that `--out` must not write over. A model's file is one that holds no results."""
    traces = [skew.removeprefix("file:") for skew in experiment.skews if skew.startswith("file:")]
    given = [getattr(args, "file", None), experiment.source.checkpoint]
    return [*(path for path in given if path is not None), *traces]
