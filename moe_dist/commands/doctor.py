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
from moe_dist.commands.flags import Json
from moe_dist.commands.printing import console, print_json
from moe_dist.commands.terminal import Terminal, to_standard_output
from moe_dist.errors import OutputError, ResourceError
from moe_dist.exits.exit_codes import OK
from moe_dist.messages.printable import printable
from moe_dist.tables import cache_folder

MEASURE_HELP = "Measure this GPU's peak rates, for floors, and keep them in the user's cache folder (seconds)."
Measure = Annotated[bool, Parameter(show_default=False, help=MEASURE_HELP)]


def doctor(*, measure: Measure = False, json: Json = False) -> int:
    found = examine()
    if measure:
        found["peaks"] |= {"measured": _measure(found["machine"]["name"])}
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
    for kind in ("backends", "exchanges", "peers"):
        table = plain_table(columns=(kind[:-1], "usable here", "what to know"))
        for name, answer in found[kind].items():
            usable = Text("yes", "green") if answer["ok"] else Text("no", "red")
            table.add_row(printable(name), usable, printable(answer["reason"]))
        console.print(table)


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
