"""Steps of more than 65,535 tokens a rank, where a grid's second dimension ends and offsets need 64 bits."""

from __future__ import annotations

import pytest
import torch

from moe_dist.exchange.all_to_all import lists
from moe_dist.kernels.triton.fused_moe import Config, fused_moe
from moe_dist.model.placement import Placement
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.step import fresh
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.skews import synthetic_routing

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
TOKENS = 65_600


def test_rows_are_listed_sent_and_added_up_as_on_a_cpu():
    spec = MoESpec(hidden=128, intermediate=256, num_experts=8, top_k=2)
    placement = Placement.build(spec, ParallelSpec(ep=2))
    routing = synthetic_routing(spec, TOKENS, "uniform", 0)
    rows = torch.randn(TOKENS, 64).bfloat16()
    for counted in (True, False):
        found = {}
        for device in ("cpu", "cuda"):
            take = fresh(torch.device(device))
            listed = lists.send_lists(placement, routing.to(device), 0, TOKENS, take)
            counts = listed.counts_W if counted else None
            sent = lists.take_sends(rows.to(device), listed.token_WB, counts, 0, take)
            here, there = map(int, listed.counts_W)
            slots, weights = lists.unpack_pairs(listed.pairs_WPM, here + there, 0, take)
            back = sent.send.float() * 2
            y = lists.sum_rows(back, sent.receive.float(), listed.order_TW, counts, TOKENS, 0)
            real = there if counted else listed.token_WB[1] >= 0
            send = sent.send[:real] if counted else sent.send[real]
            found[device] = (
                listed.order_TW,
                listed.token_WB,
                listed.counts_W,
                send,
                sent.receive[:here],
                slots,
                weights,
                y,
            )
        for one, other in zip(found["cpu"], found["cuda"], strict=True):
            assert torch.equal(one.float(), other.cpu().float())


def test_the_fused_moe_with_outputs_beyond_32_bit_offsets():
    """524,800 pairs of 4,352 values are more than 2^31: in one step the same bits as in eight."""
    spec = MoESpec(hidden=4352, intermediate=128, num_experts=8, top_k=8)
    assert TOKENS * spec.top_k * spec.hidden > 2**31
    weights = random_weights(spec, 0, "cuda")
    routing = synthetic_routing(spec, TOKENS, "uniform", 0).to("cuda")
    x = torch.randn(TOKENS, spec.hidden, device="cuda", dtype=torch.bfloat16)
    config = Config(bm=128, swap=False, bn1=128, bk1=128, warps1=8, stages1=3, bn2=128, bk2=128, warps2=8, stages2=3)

    def run(start: int, stop: int) -> torch.Tensor:
        chosen = routing.rows(start, stop)
        return fused_moe(x[start:stop], chosen.ids_TK, chosen.weights_TK, weights, "swiglu", config, torch.bfloat16)

    share = TOKENS // 8
    pieces = [run(start, start + share) for start in range(0, TOKENS, share)]
    assert torch.equal(run(0, TOKENS), torch.cat(pieces))
