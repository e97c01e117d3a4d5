"""A peer for tests, where no package with a whole layer is: the kernel of fake_deep_gemm, run by itself."""

from __future__ import annotations

import torch
from dist import fake_deep_gemm
from torch import Tensor

from moe_dist.exchange.fused import in_equal_runs
from moe_dist.kernels import put_pairs, quantize_rows
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, TokenLayout
from moe_dist.oracle.numerics import Numerics
from moe_dist.peers import Peer, PeerCase
from moe_dist.peers.base import PeerStep
from moe_dist.step import Support

NAME = "stand_in"


class StandIn(Peer):
    package = "pytest"  # one that is installed
    deterministic = True
    capturable = True
    numerics = Numerics(gemm2_group=64, gemm2_power_of_2=True, gemm2_weighted=True)
    payload, combine = "fp8", "bf16"
    here = True
    factor = 1.0  # of its results

    @classmethod
    def available(cls, device: str) -> Support:
        return Support(cls.here, "" if cls.here else f"{cls.package} is not installed (pip install {cls.package})")

    @classmethod
    def supports(cls, spec: MoESpec, placement: Placement, token_layout: TokenLayout, shares: list[int]) -> Support:
        if not in_equal_runs(placement) or spec.quant != "fp8_block":
            return Support(False, "runs fp8_block under EP, whole experts in equal runs")
        if token_layout != "sharded" or len(set(shares)) > 1:
            return Support(False, "was written for equally many sharded tokens on every rank")
        return Support(True)

    @classmethod
    def prepare(cls, case: PeerCase) -> PeerStep:
        spec, shard = case.spec, case.shard
        sizes = spec.num_experts, case.bucket, spec.top_k, spec.hidden, spec.intermediate
        memory = fake_deep_gemm.get_symm_buffer_for_sm90_mega_moe(case.group, *sizes)
        shard.turn(gate_first=True)
        first, second = (shard.w13_eFH, shard.s13), (shard.w2_eHi, shard.s2)
        weights = fake_deep_gemm.transform_weights_for_mega_moe_sm90(first, second)  # type: ignore[arg-type]

        def step(x_TH: Tensor, routing: Routing) -> Tensor:
            tokens, rows = len(x_TH), quantize_rows(x_TH, "fp8_block")
            memory.x[:tokens].copy_(rows.values_RH)
            assert rows.scales_RS is not None
            memory.x_sf[:tokens].copy_(rows.scales_RS)
            into = memory.topk_idx[:tokens], memory.topk_weights[:tokens]
            put_pairs(routing.ids_TK, routing.weights_TK, spec.num_experts, *into)
            y_TH = torch.empty_like(x_TH)
            fake_deep_gemm.older(y_TH, *weights, memory)
            return y_TH.mul_(cls.factor)

        return step
