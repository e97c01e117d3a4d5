"""What exchanges take alone: torchrun --standalone --nproc-per-node N benchmarks/exchange_alone.py OUT.json [--model M]

Two tables of one run, in CUDA graphs on GPUs and eagerly on CPUs; each time is the median over iterations of the
slowest rank's, by the clock of `moe-dist compare`.

`alone`: steps of sharded tokens whose backend computes nothing. Its sums are what scratch holds, and all of them are
sent as a backend's are that sends none by itself. Quantizing is in it, as it is in a step. GB/s are the bytes that the
busiest rank sends over the time.

`beside`: whole steps of replicated tokens under TP, and the same backend alone on the same rows and slices. The
difference is what the exchange adds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from moe_dist.backends.base import Backend
from moe_dist.bench.clock import time_steps
from moe_dist.bench.results import provenance
from moe_dist.commands.config import find_model
from moe_dist.engine.graph import StepGraph, capture
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import BLOCK, MoESpec, ParallelSpec
from moe_dist.model.weights import shard_from
from moe_dist.runtime.context import RankContext
from moe_dist.runtime.torchrun_group import TorchrunGroup
from moe_dist.runtime.voice import launched
from moe_dist.step import Sink, Step, TokenRows
from moe_dist.workloads.random_weights import random_expert
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

CALL_S = 500.0
WARM = 10
SHARDED, REPLICATED = ("ag_rs", "all_to_all", "nvlink"), ("all_reduce", "nvlink")
Row = dict[str, Any]


class Nothing:
    """A backend's place in a step. What it leaves undone is its forward: `sink` gets whatever memory holds."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def forward(self, step: Step, rows: TokenRows, sink: Sink) -> None:
        sink.put_all(sink.whole(step))

    def tune(self, step: Step, rows: TokenRows) -> None:
        pass

    def awaits(self, rows: TokenRows) -> bool:
        return rows.arrivals is None


def layer_of(context: RankContext, spec: MoESpec, parallel: ParallelSpec, exchange: str, backend: str, layout: str,
             graph: bool) -> MoELayer:  # fmt: skip
    plan = make_plan(spec, parallel, exchange=exchange, backend=backend, token_layout=layout, graph=graph,
                     machine=Machine.detect(context.device.type))  # fmt: skip
    key = f"weights {spec!r} {parallel!r}"
    if key not in context.memo:
        context.memo[key] = shard_from(
            lambda expert: random_expert(spec, expert, 0, context.device), plan.placement, context.rank
        )
    return MoELayer(plan, context.memo[key], context.comm)


def inputs(context: RankContext, spec: MoESpec, tokens: int, layout: str) -> tuple[Tensor, Any]:
    """Another draw for each rank where tokens are sharded, the same for all where they are replicated."""
    whose = context.rank if layout == "sharded" else 0
    x = Stream("exchange alone", tokens, whose).normal(tokens, spec.hidden).to(spec.torch_dtype).to(context.device)
    return x, synthetic_routing(spec, tokens, "uniform", whose).to(context.device)


def timed(context: RankContext, step: Callable[[], object], graph: bool, iters: int) -> list[float]:
    for _ in range(WARM if graph else 1):
        step()
    return time_steps(context.comm, step, iters, queued=graph)


def alone(context: RankContext, spec: MoESpec, parallel: ParallelSpec, exchange: str, backend: str, tokens: int,
          graph: bool, iters: int) -> tuple[list[float], int]:  # fmt: skip
    """This rank's times of a step without a backend, and the bytes that it sends in one."""
    layer = layer_of(context, spec, parallel, exchange, backend, "sharded", graph)
    layer.paths = tuple(path._replace(backend=Nothing(path.backend)) for path in layer.paths)  # type: ignore[arg-type]
    x, routing = inputs(context, spec, tokens, "sharded")

    def step() -> Tensor:
        y_TH: Tensor = layer(x, routing, max_tokens_per_rank=tokens)
        return y_TH

    before = context.comm.bytes_sent
    step()
    sent = context.comm.bytes_sent - before + layer.path(tokens).exchange.stored_bytes()
    call = StepGraph(layer, tokens, x, routing).replay if graph else step
    return timed(context, call, graph, iters), sent


def beside(context: RankContext, spec: MoESpec, exchange: str, backend: str, tokens: int, graph: bool,
           iters: int) -> tuple[list[float], list[float]]:  # fmt: skip
    """This rank's times of a step of replicated tokens, and of its backend alone on the same rows."""
    layer = layer_of(context, spec, ParallelSpec(tp=context.world), exchange, backend, "replicated", graph)
    x, routing = inputs(context, spec, tokens, "replicated")
    slots = layer.plan.placement.slots_on(context.rank, routing.ids_TK).to(torch.int32)
    rows, path = TokenRows(x, slots, routing.weights_TK), layer.path(tokens)

    def local() -> Tensor:
        return path.backend.forward_alone(rows, layer.plan.out_dtype)

    if graph:
        whole, by_itself = StepGraph(layer, tokens, x, routing).replay, capture(local, local)[0].replay
    else:
        whole, by_itself = (lambda: layer(x, routing)), local
    return timed(context, whole, graph, iters), timed(context, by_itself, graph, iters)


def slowest(of_ranks: Sequence[Sequence[float]]) -> float:
    return median(map(max, zip(*of_ranks, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="DeepSeek-V3")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 128, 2048, 8192], help="of a rank")
    parser.add_argument("--replicated", type=int, nargs="*", default=[8, 128], help="replicated tokens")
    parser.add_argument("--iters", type=int, default=100)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    world, graph, backend = launched().world, device == "cuda", "triton" if device == "cuda" else "torch"
    sharded, replicated = ([name for name in names if name != "nvlink" or graph] for names in (SHARDED, REPLICATED))
    spec, group = find_model(given.model), TorchrunGroup(world, device)
    # An exchange does not know how wide experts are, so these are as narrow as they can be.
    narrow = spec.with_changes(intermediate=BLOCK * world)
    found: dict[str, list[Row]] = {"alone": [], "beside": []}

    def run(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        return group.run(function, *arguments, timeout_s=CALL_S, shown=len)

    def told(kind: str, row: Row, text: str) -> None:
        found[kind].append(row)
        if group.rank == 0:
            print(text, flush=True)

    for parallel in (ParallelSpec(ep=world), ParallelSpec(tp=world)):
        for exchange in sharded:
            for tokens in given.tokens:
                times = run(alone, narrow, parallel, exchange, backend, tokens, graph, given.iters)
                us, sent = slowest([each for each, _ in times]), max(count for _, count in times)
                row = {"placement": parallel.label, "exchange": exchange, "tokens_per_rank": tokens, "p50_us": us}
                row |= {"bytes_sent": sent, "gbps": sent / us / 1e3}
                told("alone", row, f"{parallel.label:6} {exchange:11} {tokens:6,} a rank  {us:9,.1f} µs"
                     f"  {row['gbps']:6.1f} GB/s")  # fmt: skip
    for exchange in replicated:
        for tokens in given.replicated:
            times = run(beside, spec, exchange, backend, tokens, graph, given.iters)
            whole, local = (slowest([each[number] for each in times]) for number in (0, 1))
            row = {"placement": f"TP{world}", "exchange": exchange, "backend": backend, "global_tokens": tokens}
            row |= {"p50_us": whole, "backend_us": local}
            told("beside", row, f"TP{world} {exchange}, {tokens:,} replicated: {whole:,.1f} µs, backend"
                 f" {local:,.1f}, rest {whole - local:,.1f}")  # fmt: skip
    if group.rank == 0:
        about = provenance(Machine.detect(device)).model_dump(mode="json")
        document = {
            "what": "exchanges alone",
            "model": spec.name,
            "world": world,
            **about,
            "iters": given.iters,
            **found,
        }
        given.out.write_text(json.dumps(document, indent=1) + "\n")
    group.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
