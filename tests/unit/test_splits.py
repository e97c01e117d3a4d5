"""How all_to_all splits what it sends: when padding is cheaper than a host that waits for exact numbers."""

from __future__ import annotations

import time
from math import comb

import pytest
import torch

from moe_dist.commands.config import find_model
from moe_dist.exchange import EXCHANGES
from moe_dist.exchange.all_to_all import AllToAll
from moe_dist.exchange.all_to_all.splits import expected_targets
from moe_dist.model.placement import Placement
from moe_dist.model.spec import MoESpec, ParallelSpec

DEEPSEEK = find_model("DeepSeek-V3")
LIMITED = DEEPSEEK.with_changes(num_groups=4, top_groups=2)


class OfDevice:
    def __init__(self, device: str) -> None:
        self.device, self.rank = torch.device(device), 0


def exchange(spec: MoESpec, device: str, **grid) -> AllToAll:
    return AllToAll(OfDevice(device), Placement.build(spec, ParallelSpec(**grid)), spec, "bf16")


def targets(spec: MoESpec, **grid) -> float:
    return expected_targets(spec, Placement.build(spec, ParallelSpec(**grid)))


@pytest.mark.parametrize("ep", [2, 4, 8])
def test_without_groups_the_targets_are_hypergeometric(ep):
    spec = find_model("Qwen3-30B-A3B")
    E, K = spec.num_experts, spec.top_k
    expected = (ep - 1) * (1 - comb(E - E // ep, K) / comb(E, K))
    assert targets(spec, ep=ep) == pytest.approx(expected, rel=0.01)


def test_so_many_experts_that_all_tokens_would_take_long():
    spec = DEEPSEEK.with_changes(num_experts=131_072, hidden=128, intermediate=128, num_groups=1, top_groups=1)
    start = time.process_time()  # whatever else the machine does
    assert targets(spec, ep=4096) == pytest.approx(8, rel=0.02)
    assert time.process_time() - start < 10


def test_the_models_groups_its_slices_and_copies_count():
    assert targets(LIMITED, ep=4) == pytest.approx(1.5, rel=0.02)  # 2 of 4, in 3 of 4 cases the other ones
    assert targets(LIMITED, tp=4) == 3
    assert targets(LIMITED, tp=2, ep=2) == pytest.approx(2.5, rel=0.02)  # either half in 5 of 6 cases, of 3 other ranks
    replicas = {expert: [1 - expert // 128] for expert in range(256)}
    assert targets(DEEPSEEK, ep=2, replicas=replicas) == 0  # the source's own copies serve all
    assert targets(DEEPSEEK) == 0


@pytest.mark.parametrize(
    ("spec", "grid", "bucket", "expected"),
    [
        (DEEPSEEK, {"ep": 2}, 65536, "even"),
        (DEEPSEEK, {"ep": 4}, 2048, "even"),
        (DEEPSEEK, {"ep": 4}, 4096, "exact"),
        (DEEPSEEK, {"ep": 8}, 8192, "exact"),
        (DEEPSEEK, {"tp": 8}, 65536, "even"),  # every token goes everywhere: nothing is padding
        (LIMITED, {"ep": 4}, 8192, "exact"),
        (LIMITED, {"ep": 4}, 1024, "even"),
    ],
)
def test_what_is_chosen_on_gpus(spec, grid, bucket, expected):
    chosen = exchange(spec, "cuda", **grid)
    assert chosen.splits(bucket, captured=False) == expected
    assert chosen.splits(bucket, captured=True) == "even"


@pytest.mark.parametrize("tokens", [1, 8 * 256, 8 * 8192])
def test_the_declared_bytes_hold_for_even_splits(tokens):
    """Rows there and back to seven others, and their lists with a length behind them."""
    spec = DEEPSEEK.with_changes(top_k=2, num_groups=1, top_groups=1)
    placement = Placement.build(spec, ParallelSpec(ep=8))
    shard = -(-tokens // 8)
    row, pairs = 2 * 2 * spec.hidden, 8 * spec.top_k
    chosen = exchange(spec, "cuda", ep=8).splits(shard, captured=False)
    reached = 7 if chosen == "even" else 2
    assert chosen == ("exact" if shard > 256 else "even")
    found = AllToAll.wire_bytes(spec, placement, tokens, "bf16", 2)
    assert found == shard * row * reached + (shard + 1) * pairs * 7


@pytest.mark.parametrize(("tp", "ep", "reached"), [(1, 8, 1), (2, 4, 2), (4, 2, 4), (8, 1, 7)])
def test_every_slice_of_an_expert_counts_as_a_rank_to_reach(tp, ep, reached):
    """One expert a token: its row goes to all ranks that hold a slice of it, but not to the own one of eight."""
    spec, tokens = MoESpec(hidden=4096, intermediate=2048, num_experts=64, top_k=1), 8 * 65536
    placement = Placement.build(spec, ParallelSpec(tp=tp, ep=ep))
    found = AllToAll.wire_bytes(spec, placement, tokens, "bf16", 2)
    assert found == 65536 * 2 * 2 * spec.hidden * reached + 65537 * 8 * 7


@pytest.mark.parametrize(("tokens", "shard"), [(1, 1), (13, 4), (16, 4)])
def test_the_declared_bytes_of_gathering_everything(tokens, shard):
    """Three others get each row of the shard, with its slots and weights, and send their sums back; as all_reduce has
    it, three quarters of twice all sums."""
    spec = MoESpec(hidden=256, intermediate=256, num_experts=8, top_k=2)
    placement = Placement.build(spec, ParallelSpec(ep=4))
    found = {name: EXCHANGES.get(name).wire_bytes(spec, placement, tokens, "bf16", 4) for name in EXCHANGES.names()}
    assert found["ag_rs"] == 3 * shard * (256 * 2 + 2 * 8 + 256 * 4)
    assert found["all_reduce"] == 2 * tokens * 256 * 4 * 3 // 4
    assert found["local"] == 0


def test_where_there_is_no_choice_nothing_is_said():
    placement = Placement.build(DEEPSEEK, ParallelSpec(ep=2))
    for name in ("ag_rs", "all_reduce"):
        assert EXCHANGES.get(name)(OfDevice("cpu"), placement, DEEPSEEK, "bf16").splits(8, captured=False) is None
