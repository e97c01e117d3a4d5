"""Local experts as a serving stack runs them: captured in its own CUDA graph, with eager steps of other sizes between
the replays. In one process."""

from __future__ import annotations

import pytest
import torch
from gpu.ranks import backends_here

from moe_dist.backends import BACKENDS
from moe_dist.integrations.local_experts import LocalExperts
from moe_dist.model.spec import MoESpec
from moe_dist.oracle.reference import relative_error
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(500)]

SPEC = MoESpec(name="of tests", hidden=2048, intermediate=768, num_experts=32, top_k=4)
HELD = list(range(3, 32, 2))


@pytest.mark.parametrize("held", [None, HELD])
def test_in_the_graph_of_another(held):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    for name in (name for name in backends_here() if BACKENDS.get(name).capturable):
        weights = random_weights(SPEC, 0, device, held)
        experts = LocalExperts(name, SPEC, weights, held, SPEC.num_experts)
        x = Stream("a test's tokens", device=device).normal(512, SPEC.hidden).bfloat16()
        routing = synthetic_routing(SPEC, 512, "zipf:1.2", 0, 0).to(device)

        def step(count, experts=experts, x=x, routing=routing):
            return experts(x[:count], routing.ids_TK[:count], routing.weights_TK[:count])

        right = step(32).clone()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")  # the host waits for nothing
        try:
            step(32)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = step(32)
        step(512)  # the workspace grows, and the graph's arena must stay
        step(32)
        torch.empty(64 << 20, dtype=torch.uint8, device=device).fill_(0xFF)
        made.zero_()
        graph.replay()
        assert relative_error(made, right) < 1e-3, name
