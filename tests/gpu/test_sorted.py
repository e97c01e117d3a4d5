"""Pairs sorted by expert on a GPU, few and many of them, against torch's stable sort; rows quantized beside it."""

from __future__ import annotations

import pytest
import torch

from moe_dist.kernels import quantize_rows

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

HIDDEN, TILE = 384, 64


@pytest.mark.parametrize("absent", [0.0, 0.75])
@pytest.mark.parametrize("top_k", [1, 8])
@pytest.mark.parametrize("experts", [1, 8, 43, 64, 256, 512])
def test_sorted_pairs(experts, top_k, absent):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    from moe_dist.kernels.triton.pipeline import Pipeline
    from moe_dist.model.quantization import FP8
    from moe_dist.model.weights import ExpertWeights
    from moe_dist.step import Step, TokenRows, Workspace

    class Sorting(Pipeline):
        def gemm1(self, *_):
            raise NotImplementedError

        gemm2 = gemm1

    w13 = torch.zeros(experts, 256, HIDDEN, device="cuda").to(FP8)
    weights = ExpertWeights("fp8_block", True, w13, torch.zeros(experts, HIDDEN, 128, device="cuda").to(FP8))
    for pairs in (8, 4096, 5000, 65_536, 262_144):
        rows = pairs // top_k
        slots = torch.randint(0, experts, (rows, top_k), dtype=torch.int32, device="cuda")
        slots[torch.rand(slots.shape, device="cuda") < absent] = -1
        x = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
        step = Sorting(Step(Workspace(torch.device("cuda"))), TokenRows(x, slots, slots), weights, TILE, pdl=True)
        step.taken.fill_(9)
        values, scales = step.prepare()

        counts = torch.bincount(slots[slots >= 0].long(), minlength=experts)
        assert torch.equal(step.stops.long(), counts.cumsum(0)), pairs
        assert torch.equal(step.starts.long(), counts.cumsum(0) - counts), pairs
        here = int(counts.sum())
        order = torch.where(slots < 0, experts, slots).flatten().sort(stable=True).indices[:here]
        assert torch.equal(step.order[:here].long(), order), pairs
        first = step.starts // TILE + torch.arange(experts, device="cuda")
        table = torch.full_like(step.table, -1)
        for tile in range(int(counts.max()) // TILE + 1):
            inside = tile * TILE < counts
            table[(first + tile)[inside].long()] = inside.nonzero()[:, 0].int()
        assert torch.equal(step.table, table), pairs
        assert step.taken.tolist() == [0, 0]
        expected = quantize_rows(x, "fp8_block")
        assert torch.equal(values.view(torch.uint8), expected.values_RH.view(torch.uint8)), pairs
        assert torch.equal(scales, expected.scales_RS), pairs
