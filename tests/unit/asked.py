"""What a backend is asked to serve, in the tests of `supports`."""

from __future__ import annotations

from moe_dist.backends.base import Problem
from moe_dist.model.spec import MoESpec

HOPPER = (9, 0)


def problem(width=256, num_local=4, capability=HOPPER, payload="bf16", **changes) -> Problem:
    sizes = {"hidden": 256, "intermediate": 512, "num_experts": 4, "top_k": 2}
    return Problem(MoESpec(**sizes | changes), width, num_local, "cuda", capability, payload)
