"""The how-to of CONTRIBUTING.md, tried: backends and exchanges of one's own, whole ones and changed ones."""

import itertools

import pytest
import torch

from moe_dist.backends import BACKENDS, Backend
from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.plan import shared_placement
from moe_dist.engine.planning import make_plan
from moe_dist.errors import UnsupportedError
from moe_dist.exchange import EXCHANGES, Exchange
from moe_dist.exchange.replicated import AllReduce
from moe_dist.exchange.rows import room_for, sorting_specs
from moe_dist.kernels import slots_on, sorted_by_expert
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec, ParallelSpec, split_bounds
from moe_dist.model.weights import activate, shard, slice_width
from moe_dist.oracle.reference import relative_error
from moe_dist.step import ExpertRows, Sink, Support, TokenRows, Whole, workspace_of
from moe_dist.workloads.random_weights import random_expert, random_weights
from moe_dist.workloads.skews import synthetic_routing

SPEC = MoESpec(hidden=256, intermediate=256, num_experts=6, top_k=2)
CPU = Machine("cpu", 1, "test")


class SwigluOnly(TorchBackend):
    """A backend that takes what it can and says why not for the rest."""

    @classmethod
    def supports(cls, problem):
        ok = problem.spec.activation == "swiglu"
        return Support(ok, "" if ok else f"computes swiglu only, not {problem.spec.activation}")


class OneByOne(Backend):
    """A whole backend: unquantized layers, one expert after the other, as many columns at a time as are wanted."""

    capturable = False
    deterministic = True
    takes = ("expert", "token")

    @classmethod
    def payloads(cls, spec):
        return frozenset({"none", spec.dtype})

    @classmethod
    def supports(cls, problem):
        return Support(not problem.spec.quantized, "computes unquantized layers only" if problem.spec.quantized else "")

    def prepare(self, weights):
        self.weights = weights

    def forward(self, step, rows, sink):
        if not isinstance(rows, ExpertRows):
            rows = sorted_by_expert(rows, self.problem.num_local, step.workspace.take)
        y_RH = step.workspace.take(sink.shape, torch.float32).zero_()
        weights_N, top_k = rows.weights_RK.flatten(), rows.slots_RK.shape[1]
        with step.stages("gemm1"):
            for expert, (start, stop) in enumerate(zip(rows.starts_e.tolist(), rows.stops_e.tolist(), strict=True)):
                pairs = rows.order_N[start:stop].long()
                w13, w2 = self.weights.dequantized(expert)
                hidden = activate(rows.x[pairs // top_k].float() @ w13.T, self.spec.activation)
                y_RH.index_add_(0, pairs // top_k, hidden @ w2.T * weights_N[pairs, None])
        for start, stop in sink.columns():
            sink.put(start, stop, sink.target(start, stop).copy_(y_RH[:, start:stop]))


class GatherSum(Exchange[int, Whole]):
    """A whole exchange: tokens lie on every rank; partial sums are added in float32, in rank order, instead of by an
    all-reduce in their own dtype. The handle is the number of rows."""

    token_layout = "replicated"
    capturable = True
    needs_bucket = False
    every_token = True
    makes = ("token", "expert")

    @classmethod
    def wire_bytes(cls, spec, placement, tokens, payload, combine_itemsize):
        return tokens * spec.hidden * 4 * (placement.world - 1)

    @classmethod
    def scratch(cls, spec, placement, payload, dtype, bucket):
        summed = ((bucket, spec.hidden), torch.float32)
        gathered = ((placement.world * bucket, spec.hidden), torch.float32)
        slots = ((bucket, spec.top_k), torch.int32)
        return [slots, *sorting_specs(spec, placement, bucket), summed, summed, gathered]

    def dispatch(self, step, x, routing):
        with step.stages("dispatch"):
            take = step.workspace.take
            slots_TK = slots_on(self.placement, self.comm.rank, routing.ids_TK, step.bucket, take)
            return TokenRows(x, slots_TK, routing.weights_TK), routing.tokens

    def sink(self, step, rows, handle, dtype):
        return Whole(step, (handle, self.spec.hidden), dtype, self.comm.device)

    def combine(self, step, sink, handle):
        with step.stages("combine"):
            mine = step.workspace.take(sink.shape, torch.float32).copy_(sink.y)
            (parts,) = self.comm.all_gather([mine], into=room_for(step, [mine], self.comm.world * handle))
            return parts.view(self.comm.world, *sink.shape).sum(0).to(sink.dtype)  # a new tensor, no scratch


class RangesReduced(Sink):
    """Adds up each range over the ranks as it comes, into memory that is the caller's."""

    def __init__(self, comm, shape, dtype):
        super().__init__(shape, dtype)
        self.comm, self.y = comm, torch.empty(shape, dtype=dtype, device=comm.device)

    def columns(self):
        return [(start, min(start + 128, self.shape[1])) for start in range(0, self.shape[1], 128)]

    def target(self, start, stop):
        return torch.empty(self.shape[0], stop - start, dtype=self.dtype, device=self.comm.device)

    def take(self, start, stop, y_RC):
        self.y[:, start:stop] = self.comm.all_reduce(y_RC)


class InRanges(AllReduce):
    """An exchange that sends one range of columns while the next is computed."""

    def sink(self, step, rows, handle, dtype):
        return RangesReduced(self.comm, (len(rows), self.spec.hidden), dtype)

    def combine(self, step, sink, handle):
        return sink.y


@pytest.fixture
def added():
    """Registered for one test, in this process."""
    _register()
    yield
    _unregister()


def _register():
    for name, backend in NEW_BACKENDS.items():
        BACKENDS.register(name, backend)
    for name, exchange in NEW_EXCHANGES.items():
        EXCHANGES.register(name, exchange)


def _unregister():
    for name in NEW_BACKENDS:
        BACKENDS.unregister(name)
    for name in NEW_EXCHANGES:
        EXCHANGES.unregister(name)


NEW_BACKENDS = {"swiglu_only": SwigluOnly, "one_by_one": OneByOne}
NEW_EXCHANGES = {"gather_sum": GatherSum, "in_ranges": InRanges}


def layer_output(comm: Comm, spec: MoESpec, grid: dict[str, int], backend: str, exchange: str, layout: str):
    """Of the same nine tokens, wherever they lie."""
    plan = make_plan(spec, ParallelSpec(**grid), exchange=exchange, backend=backend, token_layout=layout, machine=CPU)
    shared = None
    if spec.shared_experts == "tp":
        start, stop = shared_placement(spec, plan.parallel).slice_of(comm.rank)
        shared = slice_width(random_expert(spec.shared_spec(), spec.num_experts, 3), start, stop)
    layer = MoELayer(plan, shard(random_weights(spec, 3), plan.placement, comm.rank), comm, shared=shared)
    x = torch.randn(9, spec.hidden, generator=torch.Generator().manual_seed(1)).bfloat16()
    routing = synthetic_routing(spec, 9, "uniform", 5)
    start, stop = (0, 9) if layout == "replicated" else split_bounds(9, comm.world)[comm.rank]
    workspace = workspace_of(comm.device)
    workspace.high_water = 0
    y = layer(x[start:stop], routing.rows(start, stop))
    assert workspace.high_water <= plan.scratch_bytes(9)
    return start, y


def on_rank(comm: Comm, spec: MoESpec, cases):
    _register()  # each rank is a process of its own
    try:
        return [layer_output(comm, spec, *case) for case in cases]
    finally:
        _unregister()


@pytest.mark.parametrize("shared", ["none", "tp"])
@pytest.mark.parametrize("quant", ["fp8_block", "none"])
def test_added_backends_and_exchanges_run_by_name(pool, quant, shared):
    """With each other and with what was there, in both layouts."""
    spec = SPEC.with_changes(quant=quant)
    if shared == "tp":
        spec = spec.with_changes(shared_experts="tp", shared_intermediate=768)
    _, expected = layer_output(Comm.single(), spec, {}, "torch", "local", "replicated")
    backends = ["torch", "swiglu_only", *(["one_by_one"] if quant == "none" else [])]
    grids = [{"ep": 3}] if quant == "fp8_block" else [{"ep": 3}, {"tp": 3}]
    cases = list(itertools.product(grids, backends, [*NEW_EXCHANGES, "all_reduce"], ["replicated", "sharded"]))
    for of_rank in pool.run(3, on_rank, spec, cases):
        for case, (start, y) in zip(cases, of_rank, strict=True):
            assert relative_error(y, expected[start : start + len(y)]) < 1.5e-2, case


def test_what_is_not_whole_is_refused_when_it_is_registered():
    class Half(AllReduce):
        makes = ("experts",)

    class Sums(TorchBackend):
        sums = frozenset({"bfloat16"})

    with pytest.raises(TypeError, match=r"lacks token_layout, capturable, .*combine, dispatch"):
        EXCHANGES.register("nothing", type("Nothing", (Exchange,), {}))
    with pytest.raises(TypeError, match="makes 'experts'; there are token, expert"):
        EXCHANGES.register("half", Half)
    with pytest.raises(TypeError, match="sums 'bfloat16'; there are bf16, fp32"):
        BACKENDS.register("sums", Sums)
    with pytest.raises(TypeError, match="no subclass of Backend"):
        BACKENDS.register("none", AllReduce)


@pytest.mark.parametrize(("ranges", "said"), [
    ([(0, 128)], "nothing is wrong yet"), ([(128, 256)], "columns 128 to 256 were put where"),
    ([(0, 256)], "columns 0 to 256 were put where"), ([(0, 128), (0, 128)], "columns 0 to 128 were put where"),
])  # fmt: skip
def test_ranges_come_as_they_are_wanted(ranges, said):
    sink = RangesReduced(Comm.single(), (2, 256), torch.float32)
    try:
        for start, stop in ranges:
            sink.put(start, stop, torch.zeros(2, stop - start))
        found = "nothing is wrong yet"
    except RuntimeError as error:
        found = str(error)
    assert found.startswith(said)


def test_added_backend_is_planned_and_refuses_with_its_reason(added):
    plan = make_plan(SPEC, ParallelSpec(), exchange="local", backend="swiglu_only", machine=CPU)
    assert plan.backend == "swiglu_only"
    relu = SPEC.with_changes(activation="relu2")
    with pytest.raises(UnsupportedError, match="computes swiglu only, not relu2") as refusal:
        make_plan(relu, ParallelSpec(), exchange="local", backend="swiglu_only", machine=CPU)
    assert {"swiglu_only", "one_by_one"}.isdisjoint(refusal.value.supported)
