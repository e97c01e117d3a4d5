"""The Triton row kernels against torch in Triton's interpreter; run by test_kernels.py in a process of its own."""

import pytest
import torch
import triton_interpreter  # noqa: F401  # before any kernel is decorated

from moe_dist import kernels
from moe_dist.placement import Placement
from moe_dist.routing import Routing
from moe_dist.spec import MoESpec, ParallelSpec

FP8_KINDS = ("fp8_block", "fp8_channel", "fp8_tensor_static", "fp8_tensor_dynamic")


@pytest.mark.parametrize("kind", FP8_KINDS)
def test_quantize_rows_gives_the_codes_of_torch(kind):
    from moe_dist.kernels.triton.quantize import quantize_rows
    from moe_dist.quantization import quantize_rows as expected_rows

    for rows, width in ((5, 320), (1, 128), (3, 100)):
        x = (torch.randn(rows, width) * 3).bfloat16()
        x[0] = 0  # zero rows stay zero
        found, expected = (quantize(x, kind, torch.tensor(0.02)) for quantize in (quantize_rows, expected_rows))
        assert torch.equal(found.values_RH.view(torch.uint8), expected.values_RH.view(torch.uint8))
        if expected.scales_RS is None:
            assert found.scales_RS is None
        else:
            assert torch.equal(found.scales_RS, expected.scales_RS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_take_sends(dtype):
    from moe_dist.kernels.triton.rows import take_sends

    token = torch.tensor([[3, 0, -1, -1], [-1, -1, -1, -1], [0, 1, 2, 6]], dtype=torch.int32)
    counts = torch.tensor([2, 0, 4], dtype=torch.int32)
    for shape in ((7, 320), (7, 3), (7,)):
        rows = torch.randn(shape).to(dtype)
        expected = rows.float()[[3, 0, 0, 1, 2, 6]]
        for take in (take_sends, kernels.take_sends):
            assert torch.equal(take(rows, token, counts)[:6].float(), expected)
            padded = take(rows, token, None)  # rows of padding may hold anything
            assert torch.equal(padded[[0, 1, 8, 9, 10, 11]].float(), expected)


def test_sum_rows():
    from moe_dist.kernels.triton.rows import sum_rows

    rows = torch.randn(9, 200)
    order = torch.tensor([[0, -1, 2], [-1, -1, -1], [1, 1, 0]], dtype=torch.int32)
    counts = torch.tensor([2, 2, 5], dtype=torch.int32)
    for arguments in ((counts, 0), (None, 3)):
        assert torch.allclose(sum_rows(rows, order, *arguments), kernels.sum_rows(rows, order, *arguments), atol=1e-6)


def test_send_lists():
    from moe_dist.kernels.triton.sendlist import even_lists, send_lists, unpack_pairs

    for tp, ep, replicas, tokens, bucket in (
        (1, 4, {}, 37, 40), (2, 2, {0: [1], 6: [0]}, 5, 5), (1, 3, {2: [1, 2]}, 600, 640), (4, 1, {}, 3, 9),
    ):  # fmt: skip
        spec = MoESpec(hidden=128, intermediate=512, num_experts=7, top_k=3)
        placement = Placement.build(spec, ParallelSpec(tp=tp, ep=ep, replicas=replicas))
        ids = torch.stack([torch.randperm(7)[:3] for _ in range(tokens)]).to(torch.int32)
        ids[torch.rand(tokens, 3) < 0.1] = -1
        routing = Routing(ids, torch.rand(tokens, 3))
        rank = placement.world - 1
        expected = kernels.send_lists(placement, routing, rank, bucket)
        found = send_lists(placement, routing, rank, bucket)
        for name, one, other in zip(expected._fields, found, expected, strict=True):
            if name == "pairs_WPM":  # of the last place only the number counts
                assert torch.equal(one[:, -1, 0], other[:, -1, 0])
                one, other = one[:, :-1], other[:, :-1]
            assert torch.equal(one, other), (name, tp, ep)
        rows = int(expected.counts_W.sum())
        for one, other in zip(unpack_pairs(found[2], rows), kernels.unpack_pairs(found[2], rows), strict=True):
            assert torch.equal(one, other), (tp, ep)
        even = kernels.even_lists(placement, routing, rank, bucket)
        for name, one, other in zip(even._fields, even_lists(placement, routing, rank, bucket), even, strict=True):
            assert torch.equal(one, other), (name, tp, ep)
        assert torch.equal(even.slots_SK, expected.pairs_WPM[:, :-1, :3].flatten(0, 1))
        assert torch.equal(even.weights_SK, expected.pairs_WPM[:, :-1, 3:].flatten(0, 1).view(torch.float32))


@pytest.mark.parametrize("kind", ["bf16", "fp8_block"])
def test_packed_sends(kind):
    """Rows packed and unpacked are those that the lists name; padding has slot -1 and weight 0."""
    from moe_dist.exchange.base import parts_of
    from moe_dist.kernels.triton.sendlist import packed_sends, unpack_rows

    for tp, ep, replicas, tokens, bucket in ((1, 4, {}, 13, 16), (2, 2, {0: [1], 6: [0]}, 5, 5), (1, 2, {}, 0, 2)):
        spec = MoESpec(hidden=384, intermediate=512, num_experts=7, top_k=3)
        placement = Placement.build(spec, ParallelSpec(tp=tp, ep=ep, replicas=replicas))
        ids = torch.randint(0, 7, (tokens, 3), dtype=torch.int32)
        ids[torch.rand(tokens, 3) < 0.2] = -1
        routing = Routing(ids, torch.rand(tokens, 3))
        x = torch.randn(tokens, 384).bfloat16()
        parts = parts_of(x if kind == "bf16" else kernels.quantize_rows(x, kind))
        rank = placement.world - 1
        expected_wire, expected_order = kernels.packed_sends(placement, routing, parts, rank, bucket)
        words = [part.flatten(1).view(torch.int32) for part in parts]
        wire, order = packed_sends(placement, routing, words, rank, bucket)
        assert torch.equal(order, expected_order)
        assert torch.equal(wire[:, -6:], expected_wire[:, -6:])
        used = (wire[:, -6:-3] >= 0).any(1)  # rows of padding may hold anything
        assert torch.equal(wire[used], expected_wire[used])
        pieces = unpack_rows(wire, [kernels.row_bytes(part) // 4 for part in parts] + [3, 3])
        for piece, expected in zip(pieces, kernels.unpack_rows(expected_wire, parts, 3), strict=True):
            assert torch.equal(piece[used], expected.flatten(1).view(torch.int32)[used])
