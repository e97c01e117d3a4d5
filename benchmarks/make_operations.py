"""The figures of docs/operations.md from the recorded faults: python benchmarks/make_operations.py [PARTS]. PARTS is
the folder that `make test-faults` has filled; then the record is made from it first. A test compares the two."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from textwrap import wrap
from typing import Any

from moe_dist.report.formats import markdown_table

FOLDER = Path(__file__).parent
RECORD = FOLDER / "2026-11-28-faults.json"
TARGET = FOLDER.parent / "docs" / "operations.md"
BEGIN, END = "<!-- figures: made by benchmarks/make_operations.py -->", "<!-- end of figures -->"
RUNTIMES = ("ray", "torchrun")
UNHARMED = ("none", "pause", "slow")  # after which the right result must come
Row = dict[str, Any]


def main() -> None:
    if len(sys.argv) > 1:
        record(Path(sys.argv[1]))
    TARGET.write_text(page())


def record(parts: Path) -> None:
    """One fault a line, so that two records can be compared."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(parts.glob("*.json"))}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=FOLDER)
    before = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    document = {
        "date": date.today().isoformat(), "what": "faults", "command": "make test-faults",
        "commit": commit.stdout.strip(), "note": before.get("note", ""),
        "machine": {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
                    "linux": platform.release(), "torch": version("torch"), "ray": version("ray")},
    }  # fmt: skip
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in document.items()]
    lines += [f"{json.dumps(name)}: {_part(part)}" for name, part in found.items()]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _part(part: dict[str, Any]) -> str:
    """Lists of objects with one object a line, and paths without their folders, which say more about one machine."""
    texts = []
    for key, value in part.items():
        listed = isinstance(value, list) and value and isinstance(value[0], dict)
        text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" if listed else json.dumps(value)
        text = re.sub(r"(?<![\w.])/[\w./-]*/([\w.-]+)", r"\1", text)
        texts.append(f" {json.dumps('faults' if key == 'rows' else key)}: {text}")
    return "{\n" + ",\n".join(texts) + "\n}"


def page() -> str:
    """The page as it is, with the figures of the record."""
    before, _, rest = TARGET.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n\n" + "\n".join(figures(json.loads(RECORD.read_text()))) + "\n" + END + after


def figures(document: dict[str, Any]) -> list[str]:
    machine, faults = document["machine"], [row for name in RUNTIMES for row in document[name]["faults"]]
    right = sum(not row["wrong"] for row in faults)
    lines = [
        f"{document['date']}, commit {document['commit']}, `{document['command']}`. A CPU machine with"
        f" {machine['cores']} cores, torch {machine['torch']}, Ray {machine['ray']}.",
        *wrap(document["note"], 120),
        f"{right} of {len(faults)} faults of the record came out as promised.",
        "",
        "Seconds from the fault to the error. What a limit or a timeout comes before has both in its promise.",
        "",
    ]
    lines += _kinds(faults)
    lines += ["", "Seconds until a whole command had ended, after what happened to it while it measured:", ""]
    lines += markdown_table(
        ("what", "signal", "runtime", "seconds", "exit code"),
        [(row["what"], row["signal"], row["runtime"], f"{row['ended_s']:.1f}", str(row["exit_code"]))
         for row in document["clusters"]["faults"]],
    )  # fmt: skip
    lines += ["", *_after(document)]
    return lines


def _kinds(faults: Sequence[Row]) -> list[str]:
    rows = []
    for kind in sorted({row["kind"] for row in faults}, key=lambda kind: (kind in UNHARMED, kind.lower())):
        cells = [kind.replace("_", " ")]
        for runtime in RUNTIMES:
            own = [row for row in faults if (row["kind"], row["runtime"]) == (kind, runtime)]
            seconds = sorted(row["named_s"] for row in own if row["named_s"] is not None and kind not in UNHARMED)
            cells += [
                str(len(own)),
                " / ".join(f"{value:.1f}" for value in spread(seconds)) if seconds else "right result",
            ]
        promised = sorted({row["promise_s"] for row in faults if row["kind"] == kind})
        rows.append((*cells, " or ".join(f"{value:g}" for value in promised) if kind not in UNHARMED else ""))
    head = ("fault", "Ray: faults", "median / p95 / max", "torchrun: faults", "median / p95 / max", "promise")
    return markdown_table(head, rows)


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, 95th percentile and maximum of sorted values."""
    return statistics.median(seconds), seconds[math.ceil(0.95 * len(seconds)) - 1], seconds[-1]


def _after(document: dict[str, Any]) -> list[str]:
    again = sorted(row["again_s"] for row in document["ray"]["faults"] if row["again_s"] is not None)
    soak, ranks = document["soak"], document["soak"]["ranks"]
    took = " / ".join(f"{value:.1f}" for value in spread(again))
    worlds = sorted({rank["world"] for rank in ranks})
    checked, worst = sum(rank["checked"] for rank in ranks), max(rank["worst_error"] for rank in ranks)
    grown = max(rank["growth_mib"] for rank in ranks)
    return [
        f"`recover` after {len(again)} faults: {took} s, median / p95 / max, with new processes and weights. The",
        "same ten steps then gave the same bits each time.",
        "",
        f"Soak: {soak['steps']:,} steps on {worlds[0]} to {worlds[-1]} ranks in {soak['seconds']:.0f} s. {checked}",
        f"outputs were compared with the oracle; the largest error was {worst:.4f}, of {ranks[0]['limit']} allowed.",
        f"A rank's memory grew by {grown:.1f} MiB at most after its first tenth. No rank had more open files or",
        "threads at the end.",
        "",
    ]


if __name__ == "__main__":
    main()
