"""Peers: other packages' whole layers, run by our ranks; with a stand-in, as no such package is here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from dist.pool import Pool
from dist.stand_in_peer import NAME, StandIn
from dist.test_workloads_on_ranks import MACHINE, case, measured

from moe_dist.bench.case import Experiment
from moe_dist.bench.findings import merge
from moe_dist.bench.results import make_row
from moe_dist.bench.runner import plan_cases
from moe_dist.comm import Comm
from moe_dist.model.spec import MoESpec
from moe_dist.oracle.numerics import Numerics
from moe_dist.peers import PEERS

SPEC = MoESpec(name="small", hidden=128, intermediate=256, num_experts=8, top_k=2, quant="fp8_block")


def peer_case(**changes: Any) -> Any:
    named = {"exchange": "peer", "backend": NAME, "peer": NAME, "model": SPEC}
    return case(**(named | changes))


@contextmanager
def registered(**changes: Any) -> Iterator[None]:
    """In this process, with other values of its attributes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setattr(StandIn, name, value)
        PEERS.register(NAME, StandIn)
        try:
            yield
        finally:
            PEERS.unregister(NAME)


@pytest.fixture
def there() -> Iterator[None]:
    with registered():
        yield


def beside_ours(comm: Comm, chosen: Any, in_graph: bool = False, **changes: Any) -> Any:
    """What `measured` gives, on a rank that has the package."""
    with registered(**changes):
        return measured(comm, chosen, 2, in_graph)[0]


def wrongly(comm: Comm, chosen: Any) -> Any:
    return beside_ours(comm, chosen, factor=1.05)


def with_numerics(comm: Comm, chosen: Any, numerics: Numerics) -> Any:
    return beside_ours(comm, chosen, numerics=numerics)


@pytest.mark.usefixtures("there")
class TestMeasured:
    @pytest.mark.parametrize("in_graph", [False, True])
    def test_by_the_same_clock_and_oracle_under_a_label_of_its_own(self, pool: Pool, in_graph: bool) -> None:
        chosen = peer_case(grid={"ep": 2}, iters=4)
        found = merge(pool.run(2, beside_ours, chosen, in_graph))
        row = make_row(chosen, chosen.plan(MACHINE), found, "torchrun")
        assert (row.peer, row.exchange, row.backend) == (f"pytest {pytest.__version__}", "peer", NAME)
        assert (row.placement, row.form, row.payload_dtype, row.graph) == ("EP2", "peer", "fp8", in_graph)
        assert row.ok is True, (row.err_oracle, row.err_exact, row.err_token, row.err_repeat, row.err_again)
        assert len(row.round_p50_us) == 2
        assert (row.stages_us, row.unstaged_us, row.bytes_sent, row.link_gbps) == ({}, None, 0, None)

    def test_a_wrong_one_is_found(self, pool: Pool) -> None:
        chosen = peer_case(iters=2)
        found = merge(pool.run(2, wrongly, chosen))
        assert make_row(chosen, chosen.plan(MACHINE), found, "torchrun").ok is False

    def test_the_oracle_follows_where_it_rounds(self, pool: Pool) -> None:
        """Scales of 64 columns are not those of 128: by ours it would be out of tolerance, and by its own it is not."""
        ours, chosen = Numerics(), peer_case(iters=0, tokens=64)
        (right, other) = (
            merge(pool.run(2, with_numerics, chosen, numerics)).errors["err_oracle"] or 0.0
            for numerics in (StandIn.numerics, ours)
        )
        assert right < 0.5 * ours.tolerance < ours.tolerance < other

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"grid": {"tp": 2}}, "whole experts in equal runs"),
            ({"layout": "replicated"}, "equally many sharded tokens"),
            ({"tokens": 25}, "equally many sharded tokens"),
            ({"layers": 2}, "measured as one layer"),
            (
                {"model": SPEC.with_changes(top_k=1, weights_on_input=True)},
                "weighs what comes out of experts, and model.weights_on_input is True",
            ),
            ({"graph": True}, "CUDA graphs need CUDA"),
        ],
    )
    def test_what_it_can_not_do_is_refused_with_the_reason(self, changes: dict[str, Any], reason: str) -> None:
        planned, ((refused),) = plan_cases([peer_case(**changes)], MACHINE)
        assert planned == []
        assert refused.reason.startswith(f"peer {NAME} is not supported: ")
        assert reason in refused.reason


def test_one_that_is_not_installed_costs_its_rows_alone() -> None:
    with registered(here=False):
        made = Experiment(models=(SPEC,), worlds=(2,), placements=("ep",), exchanges=("ag_rs",), tokens=(8,),
                          peers=(NAME,))  # fmt: skip
        planned, refused = plan_cases(made.cases("cpu", "default"), MACHINE)
    assert [(one.backend, one.chosen_by) for one, _ in planned] == [("torch", "default")]
    assert ["pytest is not installed (pip install" in each.reason for each in refused] == [True]


@pytest.mark.usefixtures("there")
def test_every_peer_says_what_it_is() -> None:
    for name, peer in PEERS.usable():
        assert peer.package, name
        assert peer.label().startswith(peer.package)
