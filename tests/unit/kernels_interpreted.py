"""The Triton row kernels against torch in Triton's interpreter; run by test_kernels.py in a process of its own."""

import itertools

import pytest
import torch
import triton_interpreter  # noqa: F401  # before any kernel is decorated

from moe_dist import kernels
from moe_dist.exchange.all_to_all import lists as lists_of
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.step import fresh

TAKE = fresh(torch.device("cpu"))
FP8_KINDS = ("fp8_block", "fp8_channel", "fp8_tensor_static", "fp8_tensor_dynamic")


@pytest.mark.parametrize("kind", FP8_KINDS)
def test_quantize_rows_gives_the_codes_of_torch(kind):
    from moe_dist.kernels.triton.quantize import quantize_rows
    from moe_dist.model.quantization import quantize_rows as expected_rows

    for rows, width in ((5, 320), (1, 128), (3, 100)):
        x = (torch.randn(rows, width) * 3).bfloat16()
        x[0] = 0  # zero rows stay zero
        found = quantize_rows(x, kind, torch.tensor(0.02), None, TAKE)
        expected = expected_rows(x, kind, torch.tensor(0.02))
        assert torch.equal(found.values_RH.view(torch.uint8), expected.values_RH.view(torch.uint8))
        if expected.scales_RS is None:
            assert found.scales_RS is None
        else:
            assert torch.equal(found.scales_RS, expected.scales_RS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_take_sends(dtype):
    from moe_dist.exchange.all_to_all.row_kernels import take_sends

    lists = [[3, 0], [], [0, 1, 2, 6]]
    token = torch.tensor([one + [-1] * (4 - len(one)) for one in lists], dtype=torch.int32)
    counts = torch.tensor([len(one) for one in lists], dtype=torch.int32)
    for shape in ((7, 320), (7, 3), (7,)):
        rows = torch.randn(shape).to(dtype)
        for rank, taken in itertools.product(range(3), (take_sends, lists_of.take_sends)):
            others = lists[:rank] + lists[rank + 1 :]
            listed = [token for one in others for token in one]
            places = [4 * place + k for place, one in enumerate(others) for k in range(len(one))]
            for given, at in ((counts, range(len(listed))), (None, places)):  # rows of padding may hold anything
                send, receive = taken(rows, token, given, rank, TAKE)
                assert (len(send), len(receive)) == (8, 12)
                assert torch.equal(send[list(at)].float(), rows.float()[listed])
                assert torch.equal(receive[: len(lists[rank])].float(), rows.float()[lists[rank]])


def test_sum_rows():
    from moe_dist.exchange.all_to_all.row_kernels import sum_rows

    order = torch.tensor([[0, -1, 2], [-1, -1, -1], [1, 1, 0]], dtype=torch.int32)
    counts = torch.tensor([2, 2, 5], dtype=torch.int32)
    for rank, given in itertools.product(range(3), (counts, None)):
        computed = [torch.randn(5 if given is None else int(count), 200) for count in counts]
        back = torch.cat(computed[:rank] + computed[rank + 1 :])
        expected = torch.zeros(3, 200)
        for token, w in (order >= 0).nonzero().tolist():
            expected[token] += computed[w][order[token, w]]
        for add in (sum_rows, lists_of.sum_rows):
            assert torch.allclose(add(back, computed[rank], order, given, 5, rank), expected, atol=1e-6)


def test_slots_on():
    from moe_dist.kernels.triton.slots import slots_on

    spec = MoESpec(hidden=128, intermediate=512, num_experts=7, top_k=3)
    placement = Placement.build(spec, ParallelSpec(tp=2, ep=3))
    for tokens in (1, 200):
        ids = torch.randint(-1, 7, (tokens, 3), dtype=torch.int32)
        ids[0] = torch.tensor([-2, 7, 1 << 30])  # no experts: they count as -1
        for rank in (0, 3, 5):
            found = slots_on(placement, rank, ids, TAKE)
            assert found.dtype == torch.int32
            assert torch.equal(found, placement.slots_on(rank, ids))


def test_put_pairs():
    from moe_dist.kernels.triton.pairs import put_pairs

    for tokens, bucket in ((0, 3), (1, 1), (200, 207)):
        ids, weights = torch.randint(-1, 7, (tokens, 3), dtype=torch.int32), torch.rand(tokens, 3)
        if tokens:
            ids[0] = torch.tensor([-2, 7, 1 << 30])  # no experts: they count as -1
        weights.masked_fill_((ids < 0) | (ids >= 7), float("nan"))
        found, expected = ((torch.full((bucket + 1, 3), 5), torch.full((bucket + 1, 3), 5.0)) for _ in range(2))
        put_pairs(ids, weights, 7, found[0][:bucket], found[1][:bucket])
        kernels.put_pairs(ids, weights, 7, expected[0][:bucket], expected[1][:bucket])
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert expected[0][-1].tolist() == [5, 5, 5]


def test_token_gate():
    from moe_dist.kernels.triton.token_gate import token_gate

    for rows, hidden, dtype in ((1, 4096, torch.bfloat16), (37, 200, torch.float32), (3, 7168, torch.bfloat16)):
        x, gate = torch.randn(rows, hidden).to(dtype), torch.randn(1, hidden) / hidden**0.5
        found = token_gate(x, gate, TAKE)
        assert torch.allclose(found.double(), (x.double() @ gate.double().T).sigmoid(), atol=1e-6)


def test_send_lists():
    from moe_dist.exchange.all_to_all.list_kernels import even_lists, send_lists, unpack_pairs

    for tp, ep, replicas, tokens, bucket in (
        (1, 4, {}, 37, 40), (2, 2, {0: [1], 6: [0]}, 5, 5), (1, 3, {2: [1, 2]}, 600, 640), (4, 1, {}, 3, 9),
    ):  # fmt: skip
        spec = MoESpec(hidden=128, intermediate=512, num_experts=7, top_k=3)
        placement = Placement.build(spec, ParallelSpec(tp=tp, ep=ep, replicas=replicas))
        ids = torch.stack([torch.randperm(7)[:3] for _ in range(tokens)]).to(torch.int32)
        for strange in (-1, -7, 7, 8, 1 << 30):  # none of them is an expert
            ids[torch.rand(tokens, 3) < 0.05] = strange
        routing = Routing(ids, torch.rand(tokens, 3).masked_fill((ids < 0) | (ids >= 7), float("nan")))
        for rank in {0, 1, placement.world - 1}:
            expected = lists_of.send_lists(placement, routing, rank, bucket, TAKE)
            found = send_lists(placement, routing, rank, bucket, TAKE)
            for name, one, other in zip(expected._fields, found, expected, strict=True):
                if name == "pairs_WPM":  # of the last place only the number counts
                    assert torch.equal(one[:, -1, 0], other[:, -1, 0])
                    one, other = one[:, :-1], other[:, :-1]
                assert torch.equal(one, other), (name, tp, ep)
            lists = [pairs[: int(count)] for pairs, count in zip(expected.pairs_WPM, expected.counts_W, strict=True)]
            own_first = torch.cat([lists[rank], *lists[:rank], *lists[rank + 1 :]])
            for unpack in (unpack_pairs, lists_of.unpack_pairs):
                slots, weights = unpack(found[2], len(own_first), rank, TAKE)
                assert torch.equal(slots, own_first[:, :3])
                assert torch.equal(weights, own_first[:, 3:].contiguous().view(torch.float32))
            padded = expected.pairs_WPM[:, :-1]
            sent = torch.cat([padded[:rank], padded[rank + 1 :]]).flatten(0, 1)
            order, tokens_out, *found = even_lists(placement, routing, rank, bucket, TAKE)
            even = lists_of.even_lists(placement, routing, rank, bucket, TAKE)
            assert torch.equal(order, even.order_TW)
            assert torch.equal(tokens_out, even.token_WB)
            listed = lists_of.Traffic(*found[:2]), lists_of.Traffic(*found[2:])
            for slots, weights in (listed, (even.slots, even.weights)):
                assert len(slots.receive) == len(weights.receive) == placement.world * bucket
                for expected_rows, place in ((sent, "send"), (padded[rank], "receive")):
                    one, other = (getattr(of, place)[: len(expected_rows)] for of in (slots, weights))
                    assert torch.equal(one, expected_rows[:, :3])
                    assert torch.equal(other, expected_rows[:, 3:].contiguous().view(torch.float32))


@pytest.mark.parametrize("kind", ["bf16", "fp8_block"])
def test_packed_sends(kind):
    """Rows packed and unpacked are those that the lists name; padding has slot -1 and weight 0."""
    from moe_dist.exchange.all_to_all.list_kernels import packed_sends, unpack_rows
    from moe_dist.exchange.rows import parts_of

    for tp, ep, replicas, tokens, bucket in ((1, 4, {}, 13, 16), (2, 2, {0: [1], 6: [0]}, 5, 5), (1, 2, {}, 0, 2)):
        spec = MoESpec(hidden=384, intermediate=512, num_experts=7, top_k=3)
        placement = Placement.build(spec, ParallelSpec(tp=tp, ep=ep, replicas=replicas))
        ids = torch.randint(0, 7, (tokens, 3), dtype=torch.int32)
        ids[torch.rand(tokens, 3) < 0.2] = -1
        routing = Routing(ids, torch.rand(tokens, 3))
        x = torch.randn(tokens, 384).bfloat16()
        parts = parts_of(x if kind == "bf16" else kernels.quantize_rows(x, kind))
        for rank in {0, placement.world - 1}:
            expected, expected_order = lists_of.packed_sends(placement, routing, parts, rank, bucket, TAKE)
            *wires, order = packed_sends(placement, routing, parts, rank, bucket, TAKE)
            found = lists_of.Traffic(*wires)
            assert torch.equal(order, expected_order)
            assert (len(found.send), len(found.receive)) == (len(expected.send), len(expected.receive))
            for wire, wanted in ((found.send, expected.send), (found.receive[:bucket], expected.receive[:bucket])):
                assert torch.equal(wire[:, -6:], wanted[:, -6:])
                used = (wire[:, -6:-3] >= 0).any(1)  # rows of padding may hold anything
                assert torch.equal(wire[used], wanted[used])
                unpacked = unpack_rows(wire, parts, 3, TAKE), lists_of.unpack_rows(wanted, parts, 3, TAKE)
                for piece, one in zip(*unpacked, strict=True):
                    assert (piece.dtype, piece.shape) == (one.dtype, one.shape)
                    assert torch.equal(piece.view(torch.uint8)[used], one.view(torch.uint8)[used])
