"""`moe-dist doctor`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Annotated, Any

import torch
from cyclopts import Parameter
from rich.text import Text

from moe_dist.bench.peaks import Peaks, keep, measure_peaks
from moe_dist.bench.table import plain_table
from moe_dist.comm import Comm
from moe_dist.commands.examined import examine
from moe_dist.commands.flags import Json, Runtime
from moe_dist.commands.measuring import check_launcher
from moe_dist.commands.printing import console, print_json
from moe_dist.commands.terminal import Terminal, to_standard_output
from moe_dist.errors import ConfigError, OutputError, ResourceError
from moe_dist.exits.exit_codes import OK
from moe_dist.messages.printable import printable
from moe_dist.runtime.context import RaySpec
from moe_dist.runtime.voice import speaks
from moe_dist.tables import cache_folder

MEASURE_HELP = "Measure this GPU's peak rates, for floors, and keep them in the user's cache folder (seconds)."
Measure = Annotated[bool, Parameter(show_default=False, help=MEASURE_HELP)]


PAIRS_HELP = "Start a process on each node of the Ray cluster, or take torchrun's ranks, and test the network between."
Pairs = Annotated[bool, Parameter(show_default=False, help=PAIRS_HELP)]


def doctor(*, measure: Measure = False, pairs: Pairs = False, runtime: Runtime = None, json: Json = False) -> int:
    if runtime is not None and not pairs:
        raise ConfigError("--runtime", runtime, "says who starts the ranks, and none are started", "--pairs beside it")
    found = examine()
    if measure:
        found["peaks"] |= {"measured": _measure(found["machine"]["name"])}
    if pairs:
        found["pairs"] = _pairs(runtime or "ray")
    if not speaks():  # another of torchrun's ranks does
        return OK
    if json:
        print_json(found, indent=1)
    else:
        with to_standard_output():
            print_doctor(console(), found)
    return OK


def print_doctor(console: Terminal, found: dict[str, Any]) -> None:
    machine = found["machine"]
    console.print(f"{machine['name']}, {machine['cores']} cores, {machine['devices']} CUDA devices")
    if (driver := found["driver"])["version"]:
        console.print(f"NVIDIA driver {driver['version']} with {_gpus(driver['gpus'])}")
    for source, peaks in found["peaks"].items():
        if peaks:
            console.print(f"peak rates, {source}: {Peaks(**peaks)}")
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["packages"].items())
    console.print(f"Python {found['python']}, {versions}, nvcc {'yes' if found['nvcc'] else 'no'}")
    _print_checks(console, found["checks"])
    if "pairs" in found:
        _print_pairs(console, found["pairs"])
    for kind in filter(found.get, ("backends", "exchanges", "peers")):
        table = plain_table(columns=(kind[:-1], "usable here", "what to know"))
        for name, answer in found[kind].items():
            usable = Text("yes", "green") if answer["ok"] else Text("no", "red")
            table.add_row(printable(name), usable, printable(answer["reason"]))
        console.print(table)


def _print_checks(console: Terminal, checks: list[dict[str, Any]]) -> None:
    table = plain_table(columns=("check", "good", "what was found"))
    for each in checks:
        good = {True: Text("yes", "green"), False: Text("no", "red"), None: Text("-")}[each["ok"]]
        said = each["found"] + (f". Remedy: {each['remedy']}" if each["remedy"] else "")
        table.add_row(each["name"], good, printable(said))
    console.print(table)


def _print_pairs(console: Terminal, pairs: dict[str, Any]) -> None:
    table = plain_table(columns=("from", "to", "interface", "ms", "MB/s", "problem"))
    for way in pairs["ways"]:
        numbers = [f"{way[key]:.3g}" if way[key] is not None else "-" for key in ("milliseconds", "megabytes_s")]
        ends = (printable(pairs["members"][way[end]]) for end in ("source", "target"))
        table.add_row(*ends, printable(f"{way['interface']} {way['address']}"), *numbers, printable(way["problem"]))
    console.print(table)
    for advice in pairs["advice"]:
        exports = " ".join(f"{name}={value}" for name, value in advice["variables"].items())
        said = f"export {exports}" if exports else advice["problem"]
        console.print(f"{printable(advice['host'])}: {printable(said)}", soft_wrap=True)


def _pairs(runtime: str) -> dict[str, Any]:
    """What the members found of each other's interfaces, and what to set on each host."""
    check_launcher(runtime)
    from moe_dist.runtime.pair_members import pairs_of_nodes, pairs_of_ranks
    from moe_dist.runtime.pairs import advise

    spec = RaySpec()
    limit = spec.start_timeout_s
    places, ways = pairs_of_ranks(limit) if runtime == "torchrun" else pairs_of_nodes(spec, limit)
    return {
        "members": [f"{place.host} ({place.member})" for place in places],
        "ways": [asdict(way) for way in ways],
        "advice": [asdict(each) for each in advise(places, ways)],
    }


def _measure(name: str) -> dict[str, float]:
    """Raises ResourceError without a GPU, OutputError where they can't be kept."""
    if not torch.cuda.is_available():
        raise ResourceError("GPUs to measure", 1, 0, "Run this on a machine with one.")
    peaks = measure_peaks(Comm.single("cuda"))
    try:
        keep(name, peaks)
    except OSError as error:
        raise OutputError(cache_folder(), error.strerror or str(error)) from None
    return asdict(peaks)


def _gpus(gpus: list[dict[str, Any]]) -> str:
    """Alike ones once. They are the driver's, so that one which torch can't use shows."""
    names = Counter(f"{gpu['name']} of {gpu['memory_gib']} GiB" if gpu["memory_gib"] else gpu["name"] for gpu in gpus)
    return ", ".join(f"{count} × " * (count > 1) + printable(name) for name, count in names.items()) or "no GPU"
