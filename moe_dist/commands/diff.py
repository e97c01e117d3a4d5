"""`moe-dist diff`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from moe_dist.bench.diff import Diff, Side, compare_results, diff_table, missing_table, read_results
from moe_dist.commands.flags import Json
from moe_dist.commands.printing import console, print_json
from moe_dist.commands.terminal import say, show, to_standard_output
from moe_dist.exits.exit_codes import GONE, OK, OUT_OF_TOLERANCE, SLOWER
from moe_dist.messages.counts import count_of, verb

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
        missing = [asdict(row) for row in found.missing]
        alone = {"missing": missing, "added": found.added}
        print_json(sides | {"changes": changes} | alone | {"machines": list(found.machines)})
    else:
        with to_standard_output():
            for name, side in (("old", before), ("new", after)):
                console().print(f"{name}: {side.line()}")
            if wide or any(change.verdict != "same" for change in found.changes):
                show(console(), diff_table(found, wide))
            if found.missing:
                show(console(), missing_table(found))
            console().print("; ".join(_said(found)) + ".")
    return OUT_OF_TOLERANCE if found.wrong else SLOWER if found.slower else GONE if found.missing else OK


def _said(found: Diff) -> list[str]:
    counts = Counter(change.verdict for change in found.changes)
    known = [f"{counts[verdict]} {verdict}" for verdict in ("slower", "faster", "same")]
    said = [f"{count_of(len(found.changes), 'row')} of both: {', '.join(known)}"]
    if some := counts["unknown"]:
        said.append(f"{some} {verb(some, 'have')} no scatter, so nothing is claimed")
    if some := counts["other routing"]:
        said.append(f"{some} {verb(some, 'have')} another draw of the routing")
    if some := counts["wrong numbers"]:
        said.append(f"{some} {verb(some, 'have')} wrong numbers, out of tolerance in one file at least")
    if some := len(found.missing):
        of_old = count_of(len(found.changes) + some, "row")
        listed = Counter(row.listed for row in found.missing if row.listed)
        what = ", ".join(f"{count} {kind}" for kind, count in listed.items())
        said.append(
            f"{some} of old's {of_old} {verb(some, 'are')} missing in new" + (f" ({what} there)" if what else "")
        )
    if found.added:
        said.append(f"{found.added} {verb(found.added, 'are')} in new only")
    return said
