"""Peers: other packages' whole layers, run by our ranks, with a stand-in for the package, as no GPU is here."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dist.pool import Pool
from dist.test_workloads_on_ranks import MACHINE, case, measured
from torch import Tensor
from torch.nn.functional import silu

from moe_dist.bench.case import Experiment
from moe_dist.bench.findings import merge
from moe_dist.bench.results import make_row
from moe_dist.bench.runner import plan_cases
from moe_dist.comm import Comm
from moe_dist.model.quantization import FP8
from moe_dist.model.spec import MoESpec
from moe_dist.oracle.numerics import Numerics
from moe_dist.peers import PEERS
from moe_dist.peers.deep_gemm_mega import DeepGemmMega
from moe_dist.step import Support

SPEC = MoESpec(name="small", hidden=128, intermediate=256, num_experts=8, top_k=2, quant="fp8_block")


def peer_case(**changes: Any) -> Any:
    named = {"exchange": "peer", "backend": "deep_gemm_mega", "peer": "deep_gemm_mega", "model": SPEC}
    return case(**(named | changes))


class StandIn:
    """The package's functions in plain torch: interleaved gate and up, a scale for each 64 columns of GEMM2's input,
    which has its pair's weight in it already, and sums of bf16."""

    @staticmethod
    def get_symm_buffer_for_sm90_mega_moe(
        group: Any, experts: int, tokens: int, top_k: int, hidden: int, intermediate: int
    ) -> Any:
        return SimpleNamespace(
            group=group,
            experts=experts,
            x=torch.zeros(tokens, hidden).to(FP8),
            x_sf=torch.zeros(tokens, hidden // 128),
            topk_idx=torch.full((tokens, top_k), -1, dtype=torch.int64),
            topk_weights=torch.zeros(tokens, top_k),
        )

    @staticmethod
    def transform_weights_for_mega_moe_sm90(first: Any, second: Any) -> Any:
        w13, s13 = first
        gate, up = (half.float().unflatten(1, (-1, 8)) for half in w13.chunk(2, dim=1))
        return (torch.stack([gate, up], dim=2).flatten(1, 3).to(FP8), s13), second

    @staticmethod
    def fp8_mega_moe(y: Tensor, first: Any, second: Any, buffer: Any, **_: Any) -> None:
        tokens, rank = len(y), dist.get_rank(buffer.group)
        mine = buffer.x[:tokens].float() * buffer.x_sf[:tokens].repeat_interleave(128, 1)
        x, ids, weights = (gathered(each, buffer.group) for each in (mine, buffer.topk_idx[:tokens],
                                                                    buffer.topk_weights[:tokens]))  # fmt: skip
        total = torch.zeros_like(x)
        owned = len(first[0])
        for slot in range(owned):
            gate, up = first[0][slot].float().unflatten(0, (-1, 2, 8)).unbind(1)
            w13 = torch.cat([gate.flatten(0, 1), up.flatten(0, 1)]) * spread(first[1][slot])
            row, place = (ids == rank * owned + slot).nonzero(as_tuple=True)
            a, b = (x[row] @ w13.T).chunk(2, dim=1)
            h = (silu(a) * b * weights[row, place][:, None]).unflatten(1, (-1, 64))
            scale = h.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
            h = ((h / scale).to(FP8).float() * scale).flatten(1)
            total.index_add_(0, row, (h @ (second[0][slot].float() * spread(second[1][slot])).T).bfloat16().float())
        dist.all_reduce(total, group=buffer.group)
        y.copy_(total[rank * tokens : (rank + 1) * tokens])


def spread(scale: Tensor) -> Tensor:
    return scale.repeat_interleave(128, 0).repeat_interleave(128, 1)


def gathered(mine: Tensor, group: Any) -> Tensor:
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return torch.cat(everyone)


def beside_ours(comm: Comm, chosen: Any, in_graph: bool = False, wrong: bool = False) -> Any:
    """What `measured` gives, on a rank that has the package."""
    kept = DeepGemmMega.available, DeepGemmMega.version
    DeepGemmMega.available = classmethod(lambda cls, device: Support(True))  # type: ignore[method-assign,assignment]
    DeepGemmMega.version = classmethod(lambda cls: "0.1.4.test")  # type: ignore[method-assign,assignment]
    sys.modules["deep_gemm"] = StandIn  # type: ignore[assignment]
    forward = StandIn.fp8_mega_moe
    if wrong:
        StandIn.fp8_mega_moe = staticmethod(lambda y, *given, **more: (forward(y, *given, **more), y.mul_(1.05)))  # type: ignore[method-assign,assignment]
    try:
        return measured(comm, chosen, 2, in_graph)[0]
    finally:
        StandIn.fp8_mega_moe = staticmethod(forward)  # type: ignore[method-assign]
        DeepGemmMega.available, DeepGemmMega.version = kept  # type: ignore[method-assign]
        del sys.modules["deep_gemm"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeepGemmMega, "available", classmethod(lambda cls, device: Support(True)))


@pytest.mark.usefixtures("installed")
class TestMeasured:
    @pytest.mark.parametrize("in_graph", [False, True])
    def test_by_the_same_clock_and_oracle_under_a_label_of_its_own(self, pool: Pool, in_graph: bool) -> None:
        chosen = peer_case(grid={"ep": 2}, iters=4)
        found = merge(pool.run(2, beside_ours, chosen, in_graph))
        row = make_row(chosen, chosen.plan(MACHINE), found, "torchrun")
        assert (row.peer, row.exchange, row.backend) == ("sgl-deep-gemm 0.1.4.test", "peer", "deep_gemm_mega")
        assert (row.placement, row.form, row.payload_dtype, row.graph) == ("EP2", "peer", "fp8", in_graph)
        assert row.ok is True, (row.err_oracle, row.err_exact, row.err_token, row.err_repeat, row.err_again)
        assert len(row.round_p50_us) == 2
        assert (row.stages_us, row.unstaged_us, row.bytes_sent, row.link_gbps) == ({}, None, 0, None)

    def test_a_wrong_one_is_found(self, pool: Pool) -> None:
        chosen = peer_case(iters=2)
        found = merge(pool.run(2, beside_ours, chosen, False, True))
        assert make_row(chosen, chosen.plan(MACHINE), found, "torchrun").ok is False

    def test_the_oracle_follows_where_it_rounds(self, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Scales of 64 columns are not those of 128: by ours it would be out of tolerance, and by its own it is not."""
        ours, chosen = Numerics(), peer_case(iters=0, tokens=64)
        (right, other) = (
            merge(pool.run(2, with_numerics, chosen, numerics)).errors["err_oracle"] or 0.0
            for numerics in (DeepGemmMega.numerics, ours)
        )
        assert right < 0.5 * ours.tolerance < ours.tolerance < other

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"grid": {"tp": 2}}, "whole experts in equal runs"),
            ({"grid": {"ep": 2, "replicas": {0: [1]}}}, "whole experts in equal runs"),
            ({"model": SPEC.with_changes(quant="fp8_channel")}, "computes fp8_block"),
            ({"layout": "replicated"}, "equally many sharded tokens"),
            ({"tokens": 25}, "equally many sharded tokens"),
            ({"layers": 2}, "measured as one layer"),
            ({"graph": True}, "CUDA graphs need CUDA"),
        ],
    )
    def test_what_it_can_not_do_is_refused_with_the_reason(self, changes: dict[str, Any], reason: str) -> None:
        planned, ((refused),) = plan_cases([peer_case(**changes)], MACHINE)
        assert planned == []
        assert refused.reason.startswith("peer deep_gemm_mega is not supported: ")
        assert reason in refused.reason


def with_numerics(comm: Comm, chosen: Any, numerics: Numerics) -> Any:
    kept, DeepGemmMega.numerics = DeepGemmMega.numerics, numerics
    try:
        return beside_ours(comm, chosen)
    finally:
        DeepGemmMega.numerics = kept


def test_one_that_is_not_installed_costs_its_rows_alone() -> None:
    made = Experiment(models=(SPEC,), worlds=(2,), placements=("ep",), exchanges=("ag_rs",), tokens=(8,),
                      peers=("deep_gemm_mega",))  # fmt: skip
    planned, refused = plan_cases(made.cases("cpu", "default"), MACHINE)
    assert [(one.backend, one.chosen_by) for one, _ in planned] == [("torch", "default")]
    assert ["sgl-deep-gemm is not installed (pip install" in each.reason for each in refused] == [True]


def test_every_peer_says_what_it_is() -> None:
    for name, peer in PEERS.usable():
        assert peer.package, name
        assert peer.label().startswith(peer.package)
        assert not peer.available("cpu").ok
