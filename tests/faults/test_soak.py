"""Ten thousand steps of changing sizes and skew on 2 to 4 ranks: no wrong step, and nothing that grows."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import psutil
import pytest
import torch
from dist.pool import Pool
from faults.outcome import keep
from faults.work import BUCKET, EXCHANGES, SEED, SPEC, counts_of, global_inputs

from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.model.spec import ParallelSpec
from moe_dist.model.weights import shard
from moe_dist.oracle.reference import oracle_layer, relative_error
from moe_dist.workloads.random_weights import random_weights

pytestmark = pytest.mark.faults

STEPS = int(os.environ.get("MOE_DIST_SOAK_STEPS", "10000"))
SHARES = {2: 0.5, 3: 0.3, 4: 0.2}  # of the steps, by number of ranks
PART, CHECK_EVERY = 250, 50  # steps of one call, and between two comparisons with the oracle
GROWTH_MIB = 8.0  # of a rank after its first tenth; allocators round up
_layers: dict[tuple[int, str], tuple[Comm, MoELayer]] = {}


def steps(comm: Comm, first: int, count: int) -> dict[str, Any]:
    """This rank's part of so many steps: the largest error against the oracle, and what the process holds then."""
    worst, checked = 0.0, 0
    with torch.inference_mode():
        for number in range(first, first + count):
            layer = _layer(comm, EXCHANGES[number % len(EXCHANGES)])
            x, routing = global_inputs(number, comm.world)
            counts = counts_of(number, comm.world)
            start = sum(counts[: comm.rank])
            stop = start + counts[comm.rank]
            bucket, captured = (BUCKET, True) if number % 3 == 0 else (None, False)
            y = layer(x[start:stop], routing.rows(start, stop), max_tokens_per_rank=bucket, captured=captured)
            if number % CHECK_EVERY == 0 and stop > start:
                worst = max(worst, relative_error(y, _expected(layer, x, routing, counts)[start:stop]))
                checked += 1
    process = psutil.Process()
    return {
        "worst": worst, "checked": checked, "rss_mib": process.memory_info().rss / 2**20,
        "files": process.num_fds(), "threads": threading.active_count(), "limit": layer.backend.numerics.tolerance,
    }  # fmt: skip


def _layer(comm: Comm, exchange: str) -> MoELayer:
    """One of each kind for a process's life; a pool makes a new Comm for each call."""
    key = comm.world, exchange
    if key not in _layers:
        plan = make_plan(SPEC, ParallelSpec(ep=comm.world), exchange=exchange, backend="torch")
        _layers[key] = comm, MoELayer(plan, shard(random_weights(SPEC, seed=SEED), plan.placement, comm.rank), comm)
    return _layers[key][1]


def _expected(layer: MoELayer, x: torch.Tensor, routing: Any, counts: list[int]) -> torch.Tensor:
    placement, bounds, start = layer.plan.placement, [], 0
    for count in counts:
        bounds.append((start, start + count))
        start += count
    weights = random_weights(SPEC, seed=SEED)
    shards = [shard(weights, placement, rank) for rank in range(placement.world)]
    groups = placement.serving_groups(routing.ids_TK, *layer.exchange.identify(bounds))
    together = layer.exchange.quantized_together(bounds)
    return oracle_layer(
        x, routing, shards, SPEC, placement, together, groups, layer.backend.numerics, layer.exchange.scaled_by
    )


@pytest.mark.timeout(3600)
def test_ten_thousand_steps(pool: Pool) -> None:
    done, begin, parts = 0, time.monotonic(), []
    for world, share in SHARES.items():
        own: list[list[dict[str, Any]]] = []
        while len(own) * PART < STEPS * share:
            own.append(pool.run(world, steps, done, PART, timeout_s=300.0))
            done += PART
        for rank in range(world):
            held = [each[rank] for each in own]
            settled = held[max(0, len(held) // 10)]
            growth = held[-1]["rss_mib"] - settled["rss_mib"]
            parts.append({
                "world": world, "rank": rank, "steps": len(own) * PART, "checked": sum(e["checked"] for e in held),
                "worst_error": max(e["worst"] for e in held), "limit": held[0]["limit"], "growth_mib": round(growth, 2),
                "files": [settled["files"], held[-1]["files"]], "threads": [settled["threads"], held[-1]["threads"]],
            })  # fmt: skip
    keep("soak", {"steps": done, "seconds": round(time.monotonic() - begin, 1), "ranks": parts})
    assert done >= STEPS
    for part in parts:
        assert part["checked"] > 0
        assert part["worst_error"] <= part["limit"], part
        assert part["growth_mib"] < GROWTH_MIB, part
        assert part["files"][0] == part["files"][1], part
        assert part["threads"][0] == part["threads"][1], part
