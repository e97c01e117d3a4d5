"""`moe-dist diff`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from moe_dist.bench.diff import Side, compare_results, diff_table, read_results
from moe_dist.commands.flags import Json
from moe_dist.commands.printing import console, print_json
from moe_dist.commands.terminal import say, show, to_standard_output
from moe_dist.exits.exit_codes import OK, OUT_OF_TOLERANCE, SLOWER

Old = Annotated[str, Parameter(help="Results file of --out, the earlier one.")]
New = Annotated[str, Parameter(help="The later one.")]
Wide = Annotated[bool, Parameter(show_default=False, help="Show rows that are the same too.")]


def diff(old: Old, new: New, /, *, wide: Wide = False, json: Json = False) -> int:
    documents = {path: read_results(path) for path in (old, new)}
    found = compare_results(documents[old], documents[new])
    before, after = (Side.of(path, documents[path]) for path in (old, new))
    if found.machines:
        say(f"measured on different machines: {', '.join(found.machines)}")
    if json:
        changes = [asdict(change) | {"verdict": change.verdict} for change in found.changes]
        sides = {"old": asdict(before), "new": asdict(after)}
        print_json(sides | {"changes": changes, "alone": found.alone, "machines": list(found.machines)})
    else:
        with to_standard_output():
            for name, side in (("old", before), ("new", after)):
                console().print(f"{name}: {side.line()}")
            counts = Counter(change.verdict for change in found.changes)
            if wide or counts["same"] < len(found.changes):
                show(console(), diff_table(found, wide))
            known = [f"{counts[verdict]} {verdict}" for verdict in ("slower", "faster", "same")]
            said = [f"{len(found.changes)} rows: {', '.join(known)}"]
            if counts["unknown"]:
                said.append(f"{counts['unknown']} have no scatter, so nothing is claimed")
            if counts["other routing"]:
                said.append(f"{counts['other routing']} have another draw of the routing")
            if counts["wrong numbers"]:
                said.append(f"{counts['wrong numbers']} have wrong numbers, out of tolerance in one file at least")
            if found.alone:
                said.append(f"{found.alone} are in one file only")
            console().print("; ".join(said) + ".")
    return OUT_OF_TOLERANCE if found.wrong else SLOWER if found.slower else OK
