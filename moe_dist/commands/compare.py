"""`moe-dist compare`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from moe_dist.bench.defaults import build_quickly, default_experiment
from moe_dist.bench.source import with_source
from moe_dist.commands.asked import asked_for, machine_for
from moe_dist.commands.call import ThisCall
from moe_dist.commands.config import override, read_experiment
from moe_dist.commands.flags import NAMES, NO_SOURCE, NOT_KEPT, Json, Layers, Measuring, Overrides, Runtime, Source
from moe_dist.commands.measuring import measure
from moe_dist.commands.terminal import say
from moe_dist.errors import ConfigError
from moe_dist.peers import PEERS

FILE_HELP = "Experiment file (YAML). Without one: what is here, TP against EP."
File = Annotated[str | None, Parameter(help=FILE_HELP)]
RESUME_HELP = "Keep the finished rows of the file of --out, of the same experiment, commit and machine."
REMEMBER_HELP = "Keep the results where `auto` chooses from, under the user's cache folder."
Remember = Annotated[bool, Parameter(show_default=False, help=REMEMBER_HELP)]
PEERS_HELP = (
    "Measure other packages' whole layers beside ours, where they are installed:"
    f" {', '.join(PEERS.names()) or 'none comes with moe_dist, entry points add them'}."
)
Peers = Annotated[list[str] | None, NAMES, Parameter(show_default=False, help=PEERS_HELP)]
Resume = Annotated[bool, Parameter(show_default=False, help=RESUME_HELP)]


def compare(
    file: File = None,
    /,
    *overrides: Overrides,
    source: Source = NO_SOURCE,
    runtime: Runtime = None,
    layers: Layers = None,
    peers: Peers = None,
    measuring: Measuring = NOT_KEPT,
    resume: Resume = False,
    remember: Remember = False,
    json: Json = False,
    call: ThisCall,
) -> int:
    config = override(read_experiment(file) if file else {}, overrides)
    machine = machine_for(config, source, runtime)
    if remember and machine.device != "cuda":
        raise ConfigError("--remember", True, "is of times on GPUs, and this runs on a CPU", "no such flag here")
    config = with_source(config, source.checkpoint, source.layer)
    if not file:
        default = default_experiment(machine, router=config["source"].get("checkpoint") is not None)
        if machine.device == "cuda" and not machine.elsewhere and "backends" not in config:
            build_quickly(default["backends"], machine, say)
        config = default | config
    if peers:
        config = config | {"peers": peers}
    asked = asked_for(config, source, sweep=True, runtime=runtime, layers=layers, machine=machine)
    return measure(asked, measuring, call, as_json=json, sweep=True, file=file, resume=resume, remember=remember)
