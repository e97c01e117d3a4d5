"""The how-to of docs/architecture.md, tried: a backend and an exchange of one's own, in a few lines each."""

import pytest
import torch

from moe_dist.backends import BACKENDS
from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.comm import Comm
from moe_dist.errors import UnsupportedError
from moe_dist.exchange import EXCHANGES
from moe_dist.exchange.replicated import AllReduce
from moe_dist.layer import MoELayer
from moe_dist.machine import Machine
from moe_dist.plan import make_plan
from moe_dist.reference import relative_error
from moe_dist.routing import synthetic_routing
from moe_dist.spec import MoESpec, ParallelSpec
from moe_dist.step.rows import Support
from moe_dist.weights import random_weights, shard

SPEC = MoESpec(hidden=256, intermediate=256, num_experts=6, top_k=2)
CPU = Machine("cpu", 1, "test")


class SwigluOnly(TorchBackend):
    """A backend that takes what it can and says why not for the rest."""

    @classmethod
    def supports(cls, problem):
        ok = problem.spec.activation == "swiglu"
        return Support(ok, "" if ok else f"computes swiglu only, not {problem.spec.activation}")


class GatherSum(AllReduce):
    """An exchange that adds partial sums in float32, in rank order, instead of an all-reduce in their own dtype."""

    def combine(self, step, sink, handle):
        with step.stages("combine"):
            (parts,) = self.comm.all_gather([sink.y.float()])
            return parts.view(self.comm.world, *sink.shape).sum(0).to(sink.dtype)


@pytest.fixture
def added():
    """Registered for one test, in this process."""
    _register()
    yield
    _unregister()


def _register():
    BACKENDS.register("swiglu_only", SwigluOnly)
    EXCHANGES.register("gather_sum", GatherSum)


def _unregister():
    BACKENDS.unregister("swiglu_only")
    EXCHANGES.unregister("gather_sum")


def layer_output(comm: Comm, backend: str, exchange: str, world: int):
    plan = make_plan(
        SPEC, ParallelSpec(ep=world), exchange=exchange, backend=backend, token_layout="replicated", machine=CPU
    )
    layer = MoELayer(plan, shard(random_weights(SPEC, 3), plan.placement, comm.rank), comm)
    x = torch.randn(9, SPEC.hidden, generator=torch.Generator().manual_seed(1)).bfloat16()
    return layer(x, synthetic_routing(SPEC, 9, "uniform", 5))


def on_rank(comm: Comm):
    _register()  # each rank is a process of its own
    try:
        return layer_output(comm, "swiglu_only", "gather_sum", comm.world)
    finally:
        _unregister()


def test_added_backend_and_exchange_run_by_name(pool):
    expected = layer_output(Comm.single(), "torch", "local", 1)
    for y in pool.run(3, on_rank):
        assert relative_error(y, expected) < 1e-2


def test_added_backend_is_planned_and_refuses_with_its_reason(added):
    plan = make_plan(SPEC, ParallelSpec(), exchange="local", backend="swiglu_only", machine=CPU)
    assert plan.backend == "swiglu_only"
    relu = SPEC.with_changes(activation="relu2")
    with pytest.raises(UnsupportedError, match="computes swiglu only, not relu2") as refusal:
        make_plan(relu, ParallelSpec(), exchange="local", backend="swiglu_only", machine=CPU)
    assert refusal.value.supported == ["torch"]
