"""Even splits or exact ones: what padding costs, against a host that waits for numbers from the device."""

from __future__ import annotations

from functools import cache

import torch

from moe_dist.exchange.rows import payload_row_bytes
from moe_dist.model.placement import Placement
from moe_dist.model.routing import route
from moe_dist.model.spec import MoESpec
from moe_dist.workloads.streams import Stream

# Bytes. On a GPU a host that learns exact splits stands still until the device has told it, and what it launches next
# comes late: 0.06 to 0.43 ms a step, 0.25 in the mean, by the uniform eager rows recorded on two H200s at 6f94570 with
# exact and at 68ce4c0 with even splits. 117 MB of padding took 0.43 ms longer than that (8,192 tokens, limited:2x1,
# flashinfer_cutlass: even in benchmarks/2026-11-23-h200x2.json, exact in -limited.json), so about this much is worth
# the wait.
PADDING_UP_TO = 45_000_000
DRAWN = 4096  # tokens, fewer where experts or ranks are so many that this would take seconds
MOST_DRAWN = 1 << 25  # numbers


def padding_bytes(spec: MoESpec, placement: Placement, payload: str) -> float:
    """What even splits are expected to move in vain for one token of a rank: rows there and back."""
    others = placement.world - 1
    return (others - expected_targets(spec, placement)) * there_and_back_bytes(spec, payload, spec.torch_dtype.itemsize)


def there_and_back_bytes(spec: MoESpec, payload: str, combine_itemsize: int) -> int:
    """There and back, without its slots and weights."""
    return payload_row_bytes(spec, payload) - 8 * spec.top_k + spec.hidden * combine_itemsize


@cache
def expected_targets(spec: MoESpec, placement: Placement) -> float:
    """How many other ranks a token goes to in the mean if the router's scores are random, under the model's own rule of
    top-k and groups. Drawn from a fixed seed, so that every rank finds the same."""
    drawn = max(16, min(DRAWN, MOST_DRAWN // max(spec.num_experts, spec.top_k * placement.ep)))
    scores_TE = Stream("expected targets").uniform(drawn, spec.num_experts)
    routing = route(scores_TE, spec, torch.zeros_like(scores_TE[0]) if spec.correction_bias else None)
    rows = torch.arange(drawn, device="cpu")
    source = rows % placement.world
    groups_TK = placement.serving_groups(routing.ids_TK, rows, source)
    reached_TG = (groups_TK[..., None] == torch.arange(placement.ep, device="cpu")).any(1)
    targets = placement.tp * int(reached_TG.sum()) - int(reached_TG[rows, source // placement.tp].sum())
    return targets / drawn
