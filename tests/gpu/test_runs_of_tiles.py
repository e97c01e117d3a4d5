"""GEMM2 of `cutlass` with tiles that come in runs, whose weights are loaded once: as if each came alone."""

from __future__ import annotations

import random

import pytest
import torch

from moe_dist.kernels import quantize_rows

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
HIDDEN, EXPERTS, TOP_K = 7040, 5, 2  # columns: 27 tiles and a half of 256, so that 20,000 rows make runs of three


@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("width", [64, 128, 320, 512])
@pytest.mark.parametrize("quant", ["fp8_block", "fp8_channel", "fp8_tensor_static"])
def test_runs_give_the_same_bits(quant, width, share, monkeypatch):
    """Experts with no tokens, one, and many, whole and cut ranges of columns."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    from moe_dist.kernels.cutlass import fused_moe
    from moe_dist.kernels.cutlass.library import load
    from moe_dist.model.spec import MoESpec
    from moe_dist.step import Step, TokenRows, Workspace
    from moe_dist.workloads.random_weights import random_weights

    spec = MoESpec(hidden=HIDDEN, intermediate=width, num_experts=EXPERTS, top_k=TOP_K, quant=quant)
    weights = random_weights(spec, 3, "cuda")
    matrices, chance = fused_moe.Matrices(load(), weights), random.Random(width + share)
    for rows in (3, 700, 20_000, 40_000):
        shares = [chance.choice((0, 1, 3, 20)) for _ in range(EXPERTS)]
        shares[chance.randrange(EXPERTS)] += 1
        drawn = torch.multinomial(torch.tensor(shares, dtype=torch.float), rows * TOP_K, replacement=True)
        slots = drawn.view(rows, TOP_K).int().cuda()
        slots[torch.rand(slots.shape, device="cuda") < 0.1] = -1
        x = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
        given = TokenRows(quantize_rows(x, quant, weights.a13), slots, torch.rand(slots.shape, device="cuda"))
        found = []
        for runs in (0, 1):
            monkeypatch.setattr(fused_moe, "RUNS_FROM", runs)
            config = fused_moe.Config(share, share)
            pipeline = fused_moe.CutlassPipeline(Step(Workspace(torch.device("cuda"))), given, matrices, config)
            pipeline.out.zero_()
            pipeline.gemm1(*pipeline.prepare(), spec.activation)
            if quant == "fp8_channel":
                pipeline.requantize()
            for start, stop in ((0, HIDDEN), (256, 6912)):
                pipeline.gemm2(start, stop)
            torch.cuda.synchronize()
            assert pipeline.taken.tolist() == [0, 0]
            found.append(pipeline.out.clone())
        assert torch.equal(*found), rows
        assert bool(found[0].any())
