"""Tuning on a GPU, where forwards are timed as CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from moe_dist.backends import BACKENDS
from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.bench.case import Case
from moe_dist.bench.tune import tune_shape
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec, ParallelSpec, WorkloadSpec
from moe_dist.model.weights import activate

pytestmark = pytest.mark.gpu

SPEC = MoESpec(name="small", hidden=512, intermediate=256, num_experts=4, top_k=2, quant="none")


class Dense(TorchBackend):
    """Every expert on every row, so that nothing is read back, `repeat` times; never is wrong, None raises."""

    capturable = True

    @classmethod
    def payloads(cls, spec):
        return frozenset({"none", "bf16"})

    @classmethod
    def candidates(cls, problem, rows):
        return [{"repeat": 1}, {"repeat": 0}, {"repeat": 2}, {"repeat": None}]

    @classmethod
    def default_config(cls, problem, rows):
        return {"repeat": 8}

    def use_config(self, config):
        self.config = config

    def forward(self, step, rows, sink):
        y = torch.zeros(rows.x.shape, device=rows.x.device)
        for _ in range(self.config["repeat"]):
            y.zero_()
            for slot in range(self._weights.num_experts):
                w13, w2 = self._weights.dequantized(slot)
                weight = torch.where(rows.slots_RK == slot, rows.weights_RK, 0.0).sum(1, keepdim=True)
                y += activate(rows.x.float() @ w13.T, self.spec.activation) @ w2.T * weight
        sink.put_all(y.to(sink.dtype))


@pytest.fixture
def dense():
    BACKENDS.register("dense", Dense)
    yield
    BACKENDS.unregister("dense")


@pytest.mark.parametrize("parallel", [{}, {"ep": 2}])
def test_the_least_work_wins(dense, parallel):
    placed = ParallelSpec(**parallel)
    exchange = "ag_rs" if parallel else "local"
    case = Case(model=SPEC, parallel=placed, exchange=exchange, backend="dense", workload=WorkloadSpec(tokens=1))
    plan = case.plan(Machine.detect("cuda"))
    (part,) = plan.parts()
    tuned = tune_shape(plan, part, [1, 256], 2, 0, lambda _: None, lambda: None)
    assert tuned.table.shape.device == torch.cuda.get_device_name()
    for found in tuned.found:
        assert (found.tried, found.raised, found.wrong) == (5, 1, 1)
        assert found.entry.config == {"repeat": 1}
        assert 3 < found.entry.default_us / found.entry.us < 12
