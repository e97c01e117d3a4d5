"""What the debug mode adds to a step on CPUs: torchrun --standalone --nproc-per-node 4 benchmarks/debug_mode.py

Two groups of the same ranks have a layer each, one of them in the debug mode, and step in turn. Prints the median
milliseconds of rank 0 for each, by exchange and tokens of a rank.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from moe_dist import Comm, MoELayer, MoESpec, ParallelSpec, make_plan
from moe_dist.machine.machine import Machine
from moe_dist.model.weights import shard
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

SPEC = MoESpec(hidden=512, intermediate=512, num_experts=16, top_k=4)
STEPS, WARM = 40, 5


def layer_of(exchange: str, debug: bool) -> MoELayer:
    comm = Comm.from_group("cpu", dist.new_group())
    plan = make_plan(
        SPEC, ParallelSpec(ep=comm.world), exchange=exchange, backend="torch", machine=Machine.detect("cpu")
    )
    return MoELayer(plan, shard(random_weights(SPEC, 0), plan.placement, comm.rank), comm, debug=debug)


def timed(layer: MoELayer, tokens: int) -> float:
    x = Stream("debug mode", layer.comm.rank).normal(tokens, SPEC.hidden).bfloat16()
    routing = synthetic_routing(SPEC, tokens, "uniform", layer.comm.rank)
    dist.barrier()
    began = time.perf_counter()
    layer(x, routing)
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    torch.set_num_threads(1)
    for exchange in ("ag_rs", "all_to_all"):
        layers = {debug: layer_of(exchange, debug) for debug in (False, True)}
        for tokens in (8, 128):
            found: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(STEPS):
                for debug, layer in layers.items():
                    found[debug].append(timed(layer, tokens))
            off, on = (statistics.median(found[debug][WARM:]) for debug in (False, True))
            if dist.get_rank() == 0:
                print(f"{exchange}, {tokens} tokens a rank: {off:.1f} ms, in the debug mode {on:.1f} ms", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
