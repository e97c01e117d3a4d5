"""Commits, or settings of one commit, side by side on one machine, in turns, by `moe-dist compare`:

    python benchmarks/variants.py OUT.json --variant NAME=TREE[,MODULE.CONSTANT=VALUE...] ... [--ranks N] [--turns N]
        -- ARGUMENTS OF COMPARE

TREE is a folder with the package in it, such as a work tree of git or `.` for this one. A constant of a module, a
number named as in `exchange.nvlink.engines.AHEAD_FROM=0`, is set in every rank before anything starts. One that is not
there is refused, and so is one of which another module has a copy by then, imported by name: it would keep the old
number. Variants run forwards, then backwards, and so on, so that a machine which drifts harms none of them:

    python benchmarks/variants.py before-after.json --ranks 2 --variant old=../old --variant new=. \\
        -- models=[Qwen3-30B-A3B] placements=[tp,ep] backends=[cutlass] tokens=[16,4096] modes=[graph]

Prints for each case the median of each variant's turns and what the others take more or less than the first, and writes
every turn's results file into OUT.json as it is, under `runs`. A variant that fails ends the comparison with exit
code 1.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

CASE = ("model", "placement", "exchange", "backend", "graph", "skew", "tokens_per_rank")
# What else tells cases apart. It is printed only where it differs within what was compared.
BESIDE = (
    "source", "quant", "activation", "shared_experts", "token_layout", "token_split", "layer", "form", "payload_dtype",
    "combine_dtype", "splits", "seed",
)  # fmt: skip
AS_RANK = "--as-rank"


class Variant(NamedTuple):
    name: str
    tree: Path
    settings: dict[str, Any]

    @classmethod
    def of(cls, text: str) -> Variant:
        name, _, rest = text.partition("=")
        tree, *pairs = rest.split(",")
        if not name or not tree or not (Path(tree) / "moe_dist").is_dir():
            raise argparse.ArgumentTypeError(f"{text!r}: NAME=TREE, where TREE is a folder with moe_dist in it")
        try:
            settings = {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in pairs)}
            if not all(isinstance(value, int | float) for value in settings.values()):  # true and false are numbers too
                raise ValueError
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: MODULE.CONSTANT=VALUE, where VALUE is a number") from None
        return cls(name, Path(tree).resolve(), settings)


def main() -> int:
    if sys.argv[1:2] == [AS_RANK]:
        return as_rank(json.loads(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variant", type=Variant.of, action="append", required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--turns", type=int, default=2)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, compared = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    names = [variant.name for variant in given.variant]
    if len(set(names)) < len(names):
        parser.error(f"--variant: {', '.join(names)}: each needs a name of its own")
    if given.turns < 1:
        parser.error(f"--turns {given.turns}: at least 1")
    runs: list[dict[str, Any]] = []
    for turn in range(given.turns):
        for variant in given.variant[:: -1 if turn % 2 else 1]:
            began = time.monotonic()
            results = run(variant, given.ranks, compared)
            if results is None:
                print(f"{variant.name} failed; see above", file=sys.stderr)
                return 1
            runs.append({"variant": variant.name, "settings": variant.settings, "turn": turn, "results": results})
            print(f"turn {turn + 1} of {given.turns}, {variant.name}: {time.monotonic() - began:.0f} s", flush=True)
            given.out.write_text(json.dumps({"what": "variants", "command": sys.argv[1:], "runs": runs}, indent=1))
    print("\n".join(table(runs, names)))
    return 0


def run(variant: Variant, ranks: int, arguments: list[str]) -> dict[str, Any] | None:
    """The results file of one run; None where it failed. A row out of tolerance is a failure too."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__,
            AS_RANK, json.dumps(variant.settings), "compare", "--runtime", "torchrun", "--out", str(out), *arguments,
        ]  # fmt: skip
        path = os.pathsep.join([str(variant.tree), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(command, env=environment, cwd=variant.tree, stdout=subprocess.PIPE)
        if done.returncode or not out.exists():
            sys.stderr.buffer.write(done.stdout)
            return None
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def as_rank(settings: dict[str, Any], arguments: list[str]) -> int:
    """One rank: the command line of whichever tree is first on the path, with these constants."""
    for name, value in settings.items():
        place, _, constant = name.rpartition(".")
        module = importlib.import_module(f"moe_dist.{place}")
        if not hasattr(module, constant):
            raise SystemExit(f"moe_dist.{place} has no {constant}")
        if kept := [each for each in holders(module.__name__, constant) if each not in settings]:
            raise SystemExit(f"moe_dist.{name} has a copy in each of these, to be set beside it: {', '.join(kept)}")
        setattr(module, constant, value)
    sys.argv = ["moe-dist", *arguments]
    runpy.run_module("moe_dist", run_name="__main__")
    return 0


def holders(place: str, constant: str) -> list[str]:
    """Where modules that are loaded already have imported a constant of `place` by name, and so have a copy of it."""
    found = []
    for name, module in sorted(sys.modules.items()):
        if not name.startswith("moe_dist.") or not (file := getattr(module, "__file__", None)):
            continue
        for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module == place:
                imported = (alias.asname or alias.name for alias in node.names if alias.name == constant)
                found += [f"{name.removeprefix('moe_dist.')}.{each}" for each in imported]
    return found


def table(runs: list[dict[str, Any]], names: list[str]) -> list[str]:
    """One line for each case and variant, as wide as 80 columns."""
    rows = [(each["variant"], row) for each in runs for row in each["results"]["rows"]]
    telling = [key for key in BESIDE if len({row.get(key) for _, row in rows}) > 1]
    times: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for variant, row in rows:
        found = times.setdefault(tuple(row.get(key) for key in (*CASE, *telling)), {})
        found.setdefault(variant, []).append(row["p50_us"])
    lines = []
    for (model, placement, exchange, backend, graph, skew, tokens, *beside), found in times.items():
        mode = "graph" if graph else "eager"
        lines.append(f"{model} {placement} {exchange} {backend} {mode} {skew}, {tokens} tokens a rank")
        if beside:
            lines.append("  " + ", ".join(f"{key} {value}" for key, value in zip(telling, beside, strict=True)))
        first = median(found[names[0]]) if names[0] in found else None
        for name in names:
            if name in found:
                here = median(found[name])
                more = "" if first is None or name == names[0] else f"{here - first:+9.1f} µs {here / first - 1:+7.1%}"
                turns = " ".join(f"{each:.1f}" for each in found[name])
                lines.append(f"  {name:16s} {here:10.1f} µs {more:19s}  ({turns})")
    return lines


if __name__ == "__main__":
    sys.exit(main())
