"""`moe-dist doctor`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.text import Text

from moe_dist.bench.table import plain_table
from moe_dist.commands.examined import examine
from moe_dist.commands.flags import Json
from moe_dist.commands.printing import console, print_json
from moe_dist.commands.terminal import Terminal, to_standard_output
from moe_dist.exits.exit_codes import OK
from moe_dist.messages.printable import printable


def doctor(*, json: Json = False) -> int:
    found = examine()
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
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["packages"].items())
    console.print(f"Python {found['python']}, {versions}, nvcc {'yes' if found['nvcc'] else 'no'}")
    for kind in ("backends", "exchanges"):
        table = plain_table(columns=(kind[:-1], "usable here", "what to know"))
        for name, answer in found[kind].items():
            usable = Text("yes", "green") if answer["ok"] else Text("no", "red")
            table.add_row(printable(name), usable, printable(answer["reason"]))
        console.print(table)


def _gpus(gpus: list[dict[str, Any]]) -> str:
    """Alike ones once. They are the driver's, so that one which torch can't use shows."""
    names = Counter(f"{gpu['name']} of {gpu['memory_gib']} GiB" if gpu["memory_gib"] else gpu["name"] for gpu in gpus)
    return ", ".join(f"{count} × " * (count > 1) + printable(name) for name, count in names.items()) or "no GPU"
