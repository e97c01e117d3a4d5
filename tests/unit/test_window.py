"""What a rank learns of a launch that has waited for a peer in vain, and when."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moe_dist.comm import Comm
from moe_dist.comm.symmetric import Aside
from moe_dist.errors import ConfigError, RankFailure
from moe_dist.exchange.nvlink import window
from moe_dist.exchange.nvlink.engines import Ranges
from moe_dist.exchange.nvlink.sinks import Ahead
from moe_dist.exchange.nvlink.window import Ends
from moe_dist.step import Step, Workspace


def lost(phase: int, peer: int, step: int) -> SimpleNamespace:
    return SimpleNamespace(problem=lambda: (phase, peer, step), sizes=(1 << 30,))


@pytest.mark.parametrize(("phase", "name"), [(0, "rows"), (1, "sums")])
def test_the_peer_that_did_not_come_is_named_with_phase_and_step(phase, name):
    comm = Comm.single()
    comm.sequence = 5
    comm.check_window()  # nothing is shared yet
    comm.shared = SimpleNamespace(problem=lambda: None)
    comm.begin_step()
    comm.shared = lost(phase, 3, 41)
    for call in (comm.check_window, comm.begin_step):
        with pytest.raises(RankFailure, match=rf"rank 3 .*nvlink, {name} .*waited .* of step 41$") as failure:
            call()
        assert (failure.value.rank, failure.value.seq) == (3, 5)  # steps and collectives are counted apart


def test_every_collective_that_comes_after_it_says_so():
    comm = Comm(0, 2, torch.device("cpu"))
    comm.shared = lost(0, 1, 7)
    with pytest.raises(RankFailure, match="rank 1"):
        comm._run("all_reduce", lambda: pytest.fail("nothing may be launched"))


@pytest.mark.parametrize("comes", [True, False])
def test_who_waits_for_its_device_says_so(monkeypatch, comes):
    """Through a stand-in for its event, which is ready at the third look, or never."""
    comm, noted, looks = Comm(1, 2, torch.device("cpu"), timeout_s=0.05), [], []
    comm.sequence, comm.noted = 6, lambda *given: noted.append(given)
    here = SimpleNamespace(copy_=lambda *_, **__: None, tolist=lambda: [7])

    def query() -> bool:
        looks.append(None)
        return comes and len(looks) > 2

    monkeypatch.setattr(torch, "empty", lambda *_, **__: here)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, query=query))
    arrived = comm.to_host(SimpleNamespace(is_cuda=True, shape=(1,), dtype=torch.int64))
    assert noted == []
    if comes:
        assert arrived() == [7]
    else:
        with pytest.raises(RankFailure, match=r"rank 1 failed in to_host .*did not get this far in 0\.05 s"):
            arrived()
    assert noted == [("to_host", 6), ("", 6)]


@pytest.mark.parametrize(
    ("tokens", "ahead", "copied", "early"),
    [(4, 0, False, True), (4, 128, False, False), (4, 0, True, False), (1000, 0, False, False)],
)
def test_sums_are_added_early_where_one_launch_is_all_that_comes_before(monkeypatch, tokens, ahead, copied, early):
    """A rank with few tokens of its own may have copied them, and waits for those copies too."""
    from moe_dist.exchange.nvlink import sum_kernels

    launched, y = [], torch.empty(tokens, 256)
    monkeypatch.setattr(sum_kernels, "launch", lambda *given, **options: launched.append((given[-1][-1], options)))
    monkeypatch.setattr(sum_kernels, "end_phase", lambda *_: None)
    memory = SimpleNamespace(view=lambda *_: y, words=None, failed=None, addresses_W=None)
    regions = SimpleNamespace(sums=((), y.dtype))
    visit = SimpleNamespace(window=memory, regions=regions, ahead=Ranges(ahead, int(ahead > 0)), sums_at=0,
                            served_TW=None, bucket=tokens, copies=Aside(torch.device("cpu")))  # fmt: skip
    if copied:
        visit.copies.copy([(torch.empty(1), torch.empty(1))])
        visit.copies.join()
    sum_kernels.add_sums(visit, None, 0, y, Ends(0, 2, 1, early=True))
    assert launched == [(early, {"launch_pdl": True} if early else {})]
    launched.clear()
    sum_kernels.add_sums(visit, None, 0, y, Ends(0, 2, 1))
    assert launched == [(False, {})]


@pytest.mark.parametrize(
    ("asked", "capability", "early"), [(True, (9, 0), True), (True, (8, 0), False), (False, (9, 0), False)]
)
def test_launches_are_early_where_that_is_asked_for_and_gpus_can(monkeypatch, asked, capability, early):
    monkeypatch.setattr(window, "EARLY", asked)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    comm = SimpleNamespace(device=torch.device("cuda", 0), rank=0, world=2, timeout_s=1.0)
    assert Ends.of(comm).early is early
    assert not Ends.of(Comm.single()).early


def test_memory_of_a_kernel_is_made_between_two_meetings(monkeypatch):
    """A rank that has refused the step is found before anybody waits for it in the package's own rendezvous."""
    comm, order = Comm.single(), []
    monkeypatch.setattr(comm, "barrier", lambda: order.append("met"))
    for _ in range(2):
        comm.keep("key", lambda: order.append("made"))
    assert order == ["met", "made", "met"]


def test_a_window_does_not_grow_while_a_graph_is_captured(monkeypatch):
    comm = Comm.single()
    comm.shared = SimpleNamespace(problem=lambda: None, sizes=(1 << 20, 1 << 21))
    assert comm.window(1 << 20, 1 << 21) is comm.shared
    comm.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ConfigError, match="can't grow while a CUDA graph is captured"):
        comm.window((1 << 20) + 1, 1)


@pytest.mark.parametrize("came", [0, 1])
def test_columns_that_nobody_handed_over_are_not_sent(came):
    """They would be whatever scratch held."""
    sums = ((1, 4 * 512), torch.bfloat16)
    memory = SimpleNamespace(local=torch.empty(0), peer_view=None)
    visit = SimpleNamespace(
        window=memory, regions=SimpleNamespace(sums=sums), bucket=4, ahead=Ranges(256, 1), sums_at=0
    )
    sink = Ahead(Step(Workspace(torch.device("cpu"))), (4, 512), torch.bfloat16, visit, 0, None)
    for start, stop in sink.columns()[:came]:
        sink.put(start, stop, sink.target(start, stop))
    with pytest.raises(RuntimeError, match=f"handed over {came} of 2 ranges"):
        sink.finish()
