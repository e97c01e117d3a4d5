"""Small forwards of a backend, or the kernels of the exchanges, to be run under compute-sanitizer:
python tests/gpu/sanitized.py BACKEND|exchange."""

import sys

import torch

from moe_dist import kernels
from moe_dist.backends import BACKENDS, Problem
from moe_dist.exchange.all_to_all import lists
from moe_dist.exchange.rows import parts_of
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.step import TokenRows, fresh
from moe_dist.workloads.random_weights import random_weights

CAPABILITY = (9, 0)


def exchange() -> None:
    """What one of three ranks launches around its collectives, which don't run here."""
    take = fresh(torch.device("cuda"))
    spec = MoESpec(hidden=384, intermediate=512, num_experts=7, top_k=3)
    for replicas in ({}, {2: [1, 2]}):
        placement = Placement.build(spec, ParallelSpec(ep=3, replicas=replicas))
        for tokens, bucket in ((1, 1), (13, 16), (600, 700)):
            ids = torch.stack([torch.randperm(7)[:3] for _ in range(tokens)]).to(torch.int32)
            ids[torch.rand(tokens, 3) < 0.1] = -1
            routing = Routing(ids, torch.rand(tokens, 3)).to("cuda")
            x = torch.randn(tokens, spec.hidden, device="cuda").bfloat16()
            for rank, rows in ((1, x), (2, kernels.quantize_rows(x, "fp8_block"))):
                kernels.slots_on(placement, rank, routing.ids_TK, bucket, take)
                for make in (lists.send_lists, lists.even_lists):
                    listed = make(placement, routing, rank, bucket, take)
                    counts = getattr(listed, "counts_W", None)
                    taken = [lists.take_sends(part, listed.token_WB, counts, rank, take) for part in parts_of(rows)]
                    if counts is not None:
                        total = int(listed.pairs_WPM[:, -1, 0].sum())
                        lists.unpack_pairs(listed.pairs_WPM, total, rank, take)
                    sent = taken[0].send.bfloat16()
                    lists.sum_rows(sent, taken[0].receive.bfloat16(), listed.order_TW, counts, bucket, rank)
                wire, _ = lists.packed_sends(placement, routing, parts_of(rows), rank, bucket, take)
                lists.unpack_rows(wire.receive, parts_of(rows), spec.top_k, take)


def backend_forwards(name: str) -> None:
    backend_class = BACKENDS.get(name)
    for quant in ("fp8_block", "none", "fp8_tensor_static", "fp8_channel"):
        spec = MoESpec(hidden=256, intermediate=384, num_experts=5, top_k=2, quant=quant)
        problem = Problem(spec, 384, 5, "cuda", CAPABILITY, "none")
        if not backend_class.supports(problem).ok:
            continue
        backend = backend_class(problem)
        backend.prepare(random_weights(spec, seed=1).to("cuda"))
        for count in (1, 7, 300, 2100):  # the last: pairs enough to be sorted as many
            slots = torch.stack([torch.randperm(5)[:2] for _ in range(count)]).to(torch.int32)
            slots[torch.rand(count, 2) < 0.3] = -1
            rows = TokenRows(torch.randn(count, 256).bfloat16().cuda(), slots.cuda(), torch.rand(count, 2).cuda())
            configs = backend_class.candidates(problem, count) or [None]
            for config in (configs[0], configs[-1]):
                backend.use_config(config)
                backend.forward_alone(rows, torch.bfloat16)


if __name__ == "__main__":
    with torch.inference_mode():
        exchange() if sys.argv[1] == "exchange" else backend_forwards(sys.argv[1])
        torch.cuda.synchronize()
        print("done")
