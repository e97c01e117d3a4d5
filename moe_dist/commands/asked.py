"""Arguments and files to the experiment that a command runs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from moe_dist import checkpoint
from moe_dist.balance.placement_file import KIND
from moe_dist.bench.case import LISTS, ChosenBy, Experiment
from moe_dist.bench.defaults import default_backend, default_model, default_modes, settle_placements
from moe_dist.bench.runner import machine_of_ranks
from moe_dist.bench.source import check_models, with_source
from moe_dist.commands.config import check_keys, find_model, override, resolve_models
from moe_dist.commands.flags import Configuration, Grid, Source
from moe_dist.commands.terminal import say
from moe_dist.engine.planning import AUTO
from moe_dist.errors import ConfigError
from moe_dist.machine.machine import Machine
from moe_dist.messages.counts import part_of
from moe_dist.model.spec import MOST_RANKS
from moe_dist.runtime.context import RaySpec
from moe_dist.runtime.voice import speaks, together


class Asked(NamedTuple):
    """An experiment with what nobody named filled in. `why`: who chose the backend, `mode_why`: the mode, `model_why`:
    the model; empty where they were named. `placement_why`: a line for each placement that `auto` has taken."""

    experiment: Experiment
    machine: Machine
    chosen_by: ChosenBy = "name"
    why: str = ""
    mode_why: str = ""
    model_why: str = ""
    placement_why: tuple[str, ...] = ()


def single(
    overrides: Iterable[str],
    source: Source,
    grid: Grid,
    runtime: str | None = None,
    layers: int | None = None,
    machine: Machine | None = None,
    record_routing: str | None = None,
    world: int | None = None,
) -> Asked:
    """The experiment of one configuration, for `plan` and `run`. `machine`: None is this one. `world`: so many ranks in
    the placement that was fastest when measured, and with the exchange and the backend that were, where none are
    named; None: those of `grid`."""
    config = configuration(grid) | {"name": "run", "tokens": [grid.tokens], "iters": grid.iters}
    if world is not None:
        config = {"exchanges": [AUTO], "backends": [AUTO]} | config | {"worlds": [world], "placements": [AUTO]}
    if record_routing is not None:
        config["record_routing"] = record_routing
    config = override(config, overrides)
    return asked_for(config, source, sweep=False, runtime=runtime, layers=layers, machine=machine)


def configuration(chosen: Configuration) -> dict[str, Any]:
    """What its flags set of an experiment."""
    config = one_placement(chosen.tp, chosen.ep, chosen.backend) | {
        "token_layouts": [chosen.token_layout],
        "token_splits": [chosen.token_split],
        "skews": [chosen.skew],
        "payload": chosen.payload,
    }
    return config | ({"exchanges": [chosen.exchange]} if chosen.exchange else {})


def one_placement(tp: int, ep: int, backend: str | None) -> dict[str, Any]:
    for flag, size in (("--tp", tp), ("--ep", ep)):
        if size < 1:
            raise ConfigError(flag, size, "is a number of ranks", f"1 to {MOST_RANKS:,}")
    world = tp * ep
    return {
        "worlds": [world],
        "placements": [f"tp{tp}xep{ep}"],
    } | ({"backends": [backend]} if backend else {})


def asked_for(
    config: dict[str, Any],
    source: Source,
    *,
    sweep: bool,
    runtime: str | None = None,
    layers: int | None = None,
    machine: Machine | None = None,
) -> Asked:
    """`config` is a file's keys with overrides; flags go over them. `sweep`: several configurations are compared.
    `machine`: None is that of the ranks."""
    check_keys(config)
    flags = {"runtime": runtime, "device": source.device, "layers": layers}
    machine = machine or machine_for(config, source, runtime)
    config, model_why = _with_flags(config, source, flags, machine)
    if not sweep:  # by the ranks that flags and keys have come to
        config.setdefault("exchanges", ["local" if config.get("worlds") == [1] else "ag_rs"])
    together(config.get("runtime") == "torchrun")
    experiment = Experiment(**config)
    if experiment.peers and not sweep:
        rule = "are measured beside ours, and this command is about one configuration"
        raise ConfigError("experiment.peers", list(experiment.peers), rule, "moe-dist compare")
    stored = experiment.source
    if stored.checkpoint is not None and stored.layer is not None:
        check_models(experiment.models, stored, checkpoint.layer_spec(stored.checkpoint, stored.layer))
    for key in LISTS:
        given, taken = config.get(key), getattr(experiment, key)
        if isinstance(given, (list, tuple)) and len(taken) < len(given) and speaks():
            twice = part_of(len(given) - len(taken), len(given), "value", "stand")
            say(f"{key}: {twice} there already; each is measured once")
    chosen_by: ChosenBy = "name"
    why = mode_why = ""
    lines: list[str] = []
    if AUTO in experiment.placements:
        named = experiment.backends if "backends" in config else None
        experiment, lines = settle_placements(experiment, machine, named)
    if "backends" not in config:
        backend, why = default_backend(experiment, machine)
        experiment, chosen_by = experiment.with_changes(backends=(backend,)), "default"
    if experiment.modes is None and machine.device == "cuda" and (why or not sweep):
        modes, mode_why = default_modes(experiment, machine)
        if mode_why:
            experiment = experiment.with_changes(modes=modes)
    return Asked(experiment, machine, chosen_by, why, mode_why, model_why, tuple(lines))


def _with_flags(
    config: dict[str, Any], source: Source, flags: dict[str, Any], machine: Machine
) -> tuple[dict[str, Any], str]:
    """Flags that are given, over the file's keys, and who chose the model if nobody named it."""
    config = with_source(config, source.checkpoint, source.layer)
    config |= {key: value for key, value in flags.items() if value is not None}
    why = ""
    if source.model:
        config["models"] = [source.model]
    elif "models" not in config:
        config["models"] = [_unnamed(config, machine)]
        why = "default on such a machine" if machine.elsewhere else "default on this machine"
    return resolve_models(config), why


def machine_for(config: dict[str, Any], source: Source, runtime: str | None) -> Machine:
    """That the ranks of such a configuration will be on. Keys have not been checked yet: what a wrong one would say is
    said later."""
    device = source.device or config.get("device", "auto")
    section = config.get("ray", {})
    ray = RaySpec()
    with suppress(ConfigError):
        ray = RaySpec(**section) if isinstance(section, dict) else ray
    named = runtime or config.get("runtime", "ray")
    return machine_of_ranks(named, ray, device if device in ("cpu", "cuda") else "auto")


def _unnamed(config: dict[str, Any], machine: Machine) -> str:
    """The model that nobody named. Keys have not been checked yet either."""
    worlds, layers = config.get("worlds", list(Experiment.model_fields["worlds"].default)), config.get("layers", 1)
    sizes = [world for world in worlds if type(world) is int] if isinstance(worlds, (list, tuple)) else []
    return default_model(machine, find_model, min(sizes, default=1), layers if type(layers) is int else 1)


def files_read(experiment: Experiment, file: str | None = None) -> list[str]:
    """Files and folders that `--out` must not write over; `file` is the experiment's. A model's file is one that holds
    no results."""
    traces = [skew.removeprefix("file:") for skew in experiment.skews if skew.startswith("file:")]
    maps = [name.removeprefix(KIND) for name in experiment.placements if name.startswith(KIND)]
    return [*(path for path in (file, experiment.source.checkpoint) if path is not None), *traces, *maps]
