"""docs/choosing.md from the recorded files: python benchmarks/make_choosing.py. A test compares the two.

Every line of a table names its rows: their numbers in the file, as `moe-dist report` counts them. Of
each question (which placement, exchange or backend), case and size the latest file that can answer it is taken, and an
older one where that knows more of the choices.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from make_tables import FOLDER
from score_auto import RULES, by_records, by_skew, scores, summary

from moe_dist.balance.balancer import balanced
from moe_dist.balance.loads import expert_loads
from moe_dist.commands.config import find_model
from moe_dist.engine.records import read_record
from moe_dist.engine.ties import explained_us
from moe_dist.model.spec import ParallelSpec
from moe_dist.report.formats import markdown_table
from moe_dist.simulate.calibration import calibration
from moe_dist.simulate.gain import EXCHANGE, Change, Sweep, steps_to_pay
from moe_dist.workloads.skews import synthetic_routing

TARGET = FOLDER.parent / "docs" / "choosing.md"
# Two runs of one sweep each, the first of which chooses, and what they had to do with each other.
PAIRS = (
    ("2026-11-22-h200x2-backends.json", "2026-11-27-h200x2-backends.json", "five days older"),
    ("2026-11-28-h200x2-sweep.json", "2026-11-28-h200x2-sweep-again.json", "on two other GPUs of the host"),
)
LOCAL = "2026-11-22-h200-local.json"
PER_RANK, SKEW, BACKEND, COPIES = (8, 128, 2048, 8192), "zipf:1.2", "cutlass", 16  # of rearranged steps
Row = dict[str, Any]

HEAD = """# Choosing: TP or EP, which exchange, which backend

Made from the files in [benchmarks/](../benchmarks) by `python benchmarks/make_choosing.py`; nothing in its tables is
written by hand. Each line has the fastest choice for so many tokens a rank, what the others take longer, and
the rows that say so, by their numbers in the file. Steps are those of one layer without its shared expert, exchange
included, in a CUDA graph, with sharded tokens. "Tie" is what it is everywhere ([measuring.md](measuring.md)): a
difference within three standard errors or within the 2 % that another start of the ranks moves. Files from before 27
November 2026 have no standard errors: their tables show differences and claim none. `moe-dist plan --placement auto
--exchange auto --backend auto` takes these rows for you, and `moe-dist compare --remember` adds yours, which then count
before them.
"""

OF_LOCAL = """## A rank's share alone

The exchange hides what a backend costs. These are single shares of a layer on one GPU, without any exchange; "rows" are
the tokens that enter the rank. µs, and in brackets times the floor.
"""

TAIL = """## What would change these answers

- **Skew.** Under EP the busiest rank decides: take your own routing (`--record-routing`, `--skew file:PATH`), or
  `moe-dist balance` on it. Under TP all ranks do the same.
- **Another shape.** Narrow slices (few hundred columns a rank) cost TP, few experts a rank cost EP. Only models that
  stand in the tables were measured.
- **Another machine.** H100s and machines without NVLink were not measured; `moe-dist compare` takes minutes.
- **A queue of steps.** A GPU at full load lowers its clock: at prefill a step in a queue takes up to a tenth longer
  than these. `chained_us` of newer files has that.
- **What can't run**: `cutlass` and `deep_gemm` don't compute bf16 layers; channel and dynamic scales run on `triton`
  and `cutlass`; `flashinfer_cutlass` has no geglu. `triton` compiles in seconds at its first use, `cutlass` takes an
  nvcc and a minute, `flashinfer_cutlass` 23 minutes on 64 cores.
- **Newer code.** Each table says its commit; what was measured once is not measured again for every change.

## When to rearrange experts (predicted)
"""

OF_REARRANGED = """\
At decode the weights of active experts are the step, and even pairs hardly change them. Copies are weights to read too:
by the model they pay where one expert alone has more pairs than a rank's share, and not for zipf:1.2 over 256 experts.
"""


class Case(NamedTuple):
    """What rows must have in common to be compared."""

    model: str
    world: int
    skew: str


class Question(NamedTuple):
    """What is chosen: `of` names a row's choice, `within` what the compared rows share beside their case."""

    title: str
    words: str
    of: Callable[[Row], str]
    within: Callable[[Row], str]


def shown(row: Row) -> str:
    return f"{row['placement']} `{row['exchange']}` `{row['backend']}`"


QUESTIONS = (
    Question(
        "TP or EP",
        "The best row of each placement, whichever exchange and backend it has.",
        lambda row: str(row["placement"]),
        lambda row: "",
    ),
    Question(
        "Which exchange",
        "The best row of each exchange, whichever backend it has.",
        lambda row: f"`{row['exchange']}`",
        lambda row: str(row["placement"]),
    ),
    Question(
        "Which backend",
        "The best row of each backend, whichever exchange it has.",
        lambda row: f"`{row['backend']}`",
        lambda row: str(row["placement"]),
    ),
)


def main() -> None:
    TARGET.write_text(page())


def page() -> str:
    """The whole page."""
    documents = {path.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("20*.json"), reverse=True)}
    documents = {name: document for name, document in documents.items() if "rows" in document}
    parts = [HEAD]
    for question in QUESTIONS:
        parts += [f"## {question.title}", "", question.words, "", *answered(question, documents)]
    parts += [*of_rules(), OF_LOCAL, *of_shares(documents[LOCAL]), TAIL, *rearranged(), OF_REARRANGED]
    return "\n".join(parts).rstrip() + "\n"


def answered(question: Question, documents: dict[str, Any]) -> Iterator[str]:
    """For each case and size the latest file with rows of several choices, and older ones that know more choices."""
    known: dict[tuple[Case, str, int], set[str]] = {}
    for name, document in documents.items():
        found: dict[tuple[Case, str], dict[int, dict[str, tuple[int, Row]]]] = {}
        for number, row in enumerate(document["rows"], 1):
            if not is_step(row):
                continue
            key = Case(row["model"], row["world"], row["skew"]), question.within(row)
            best = found.setdefault(key, {}).setdefault(row["tokens_per_rank"], {})
            choice = question.of(row)
            if choice not in best or row["p50_us"] < best[choice][1]["p50_us"]:
                best[choice] = number, row
        for case in dict.fromkeys(case for case, _ in found):
            lines = []
            for key, sizes in found.items():
                for tokens, best in sorted(sizes.items()):
                    if key[0] != case or len(best) < 2 or known.get((*key, tokens), set()) >= best.keys():
                        continue
                    known.setdefault((*key, tokens), set()).update(best)
                    lines.append(line(tokens, best))
            if lines:
                yield from [heading(case, name, document), ""]
                yield from markdown_table(["tokens a rank", "take", "µs", "× floor", "the others", "rows"], lines)
                yield ""


def is_step(row: Row) -> bool:
    """Checked, whole, in a graph, of even shares and plain placements: what can answer for others."""
    plain = (
        row.get("layer") == "whole" and row["token_layout"] == "sharded" and row.get("token_split", "even") == "even"
    )
    plain = plain and not {"+", "@"} & set(row["placement"]) and row.get("peer") is None
    return plain and bool(row["graph"]) and bool(row.get("p50_us")) and bool(row.get("ok"))


def heading(case: Case, name: str, document: dict[str, Any]) -> str:
    machine = document["machine"]
    about = f"{document['date'][:10]}, commit {document['commit'][:7]}, [file](../benchmarks/{name})"
    known = all(map(scatters, filter(is_step, document["rows"])))
    claim = "" if known else "\nwithout standard errors: no difference is claimed"
    return f"**{case.model}**, {case.world} × {machine['gpu']}, routing {case.skew}\n({about}){claim}"


def line(tokens: int, best: dict[str, tuple[int, Row]]) -> list[str]:
    ordered = sorted(best.items(), key=lambda item: item[1][1]["p50_us"])
    (_, (number, first)), *others = ordered
    compared = []
    for choice, (_, row) in others:
        tie = ", tie" if is_tie(first, row) else ""
        compared.append(f"{choice} {row['p50_us'] / first['p50_us']:.2f}x{tie}")
    numbers = ", ".join(str(each) for each in (number, *(number for _, (number, _) in others)))
    floor = f"{first['p50_us'] / first['floor_us']:.2f}" if first.get("floor_us") else "-"
    return [f"{tokens:,}", shown(first), f"{first['p50_us']:,.0f}", floor, "; ".join(compared), numbers]


def is_tie(first: Row, second: Row) -> bool:
    """As `moe_dist.bench.answer.tied` has it. Of rows without scatter nothing is claimed, which their heading says."""
    if not (scatters(first) and scatters(second)):
        return False
    starts = [(row.get("run"), row.get("start")) for row in (first, second)]
    times = first["p50_us"], second["p50_us"]
    explained = explained_us(times, (first["scatter_us"], second["scatter_us"]), starts[0] == starts[1])
    return bool(abs(times[1] - times[0]) <= explained)


def scatters(row: Row) -> bool:
    return row.get("scatter_us") is not None


def of_rules() -> Iterator[str]:
    """What `auto` and the rules of serving stacks lose on runs that they don't know."""
    yield from ("## What a rule costs", "")
    yield "What is chosen for every cell of a run (a placement of a model and a size), over the best of that cell."
    yield "`auto` chooses exchange and backend by another run of the same sweep, whose even routings answer for all. A"
    yield "rule chooses a backend, with the best exchange for it. A cell without the backend has no score."
    yield ""
    for recorded, run, about in PAIRS:
        models = dict.fromkeys(row["model"] for row in json.loads((FOLDER / run).read_text())["rows"])
        yield f"{' and '.join(models)}: [run](../benchmarks/{run}); `auto` by [another](../benchmarks/{recorded}),"
        yield f"{about}"
        yield ""
        yield from markdown_table(["rule", "routing", "cells", "within 3 %", "beyond 10 %", "worst"],
                                  list(costs(recorded, run)))  # fmt: skip
        yield ""


def costs(recorded: str, run: str) -> Iterator[list[str]]:
    ways = {"`auto`": by_records([read_record(FOLDER / recorded, "user")]), **RULES}
    for name, chosen in ways.items():
        for skew, rows in by_skew(FOLDER / run).items():
            found = summary(name, list(scores(chosen, [rows])))
            within = "-" if found["within_3_percent"] is None else f"{found['within_3_percent']:.0%}"
            worst = "-" if found["worst_loss"] is None else f"{found['worst_loss']:.0%}"
            yield [name, skew, str(found["cells"]), within, str(found["beyond_10_percent"]), worst]


def of_shares(document: dict[str, Any]) -> Iterator[str]:
    machine = document["machine"]
    about = f"{document['date'][:10]}, commit {document['commit'][:7]}, [file](../benchmarks/{LOCAL})"
    yield f"{machine['gpu']} ({about})"
    yield ""
    rows = [row for row in document["rows"] if ":" not in row["backend"]]  # others are bare products, no backends
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    lines = []
    for shard in dict.fromkeys((row["model"], row["placement"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["placement"]) == shard]
        for tokens in sorted({row["global_tokens"] for row in mine}):
            cells = {row["backend"]: row for row in mine if row["global_tokens"] == tokens}
            fastest = min(row["p50_us"] for row in cells.values())
            lines.append([", ".join(shard), f"{tokens:,}", *(share(cells.get(name), fastest) for name in backends)])
    yield from markdown_table(["shard", "rows", *(f"`{name}`" for name in backends)], lines)
    yield ""


def share(row: Row | None, fastest: float) -> str:
    if row is None:
        return "-"
    text = f"{row['p50_us']:,.0f} ({row['ratio']:.2f})"
    return f"**{text}**" if row["p50_us"] == fastest else text


def rearranged() -> Iterator[str]:
    """What `moe-dist balance` predicts of steps of several sizes."""
    spec, grid, model = find_model("DeepSeek-V3"), ParallelSpec(ep=4), calibration(None).model
    lines, moved = [], []
    gbps = model.link(EXCHANGE).gbps or 0.0
    for tokens in PER_RANK:
        routing = synthetic_routing(spec, tokens * grid.world, SKEW, 0)
        loads = expert_loads(routing, spec.num_experts)
        plain, copied = (Change(spec, grid, balanced(loads, grid, copies)) for copies in (0, COPIES))
        gain, with_copies = (each.gain(model, BACKEND, routing, routing.tokens) for each in (plain, copied))
        moved.append(max(plain.moved_bytes()))
        steps = steps_to_pay(gain, moved[-1], gbps)
        seen = Sweep(model, BACKEND, spec, grid, 0, routing.tokens).break_even()
        times = (f"{us:,.0f}" for us in (gain.before_us, gain.after_us, with_copies.after_us))
        since = "none up to zipf:2" if seen is None else f"zipf:{seen:g}"
        lines.append(
            [
                f"{tokens:,}",
                f"{plain.loads(routing)[0].imbalance:.2f}",
                *times,
                "-" if steps is None else f"{steps:,}",
                since,
            ]
        )
    least, most = (f"{size / 2**30:.1f}" for size in (min(moved), max(moved)))
    yield f"""\
DeepSeek-V3, EP4 on H200s with `{EXCHANGE}` and `{BACKEND}`, predicted from the recorded rows by
`moe-dist balance --model DeepSeek-V3 --ep 4 --backend {BACKEND} --skew {SKEW} --tokens N`, and with
`--redundant {COPIES}`; no rearranged step was measured on GPUs yet. µs of the step of {SKEW} that the placement
was made for; after how many steps the gain has paid for moving {least} to {most} GiB of weights to a rank at
{gbps:,.0f} GB/s; the exponent from which a measurement would show a gain on later tokens.
"""
    head = ["tokens a rank", "busiest rank, pairs over the mean", "before", "rearranged", f"with {COPIES} copies"]
    yield from markdown_table([*head, "steps that pay", "from"], lines)
    yield ""


if __name__ == "__main__":
    main()
