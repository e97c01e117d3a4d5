"""Rows that are on their way when a backend is called: who waits for them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from unit.asked import problem

from moe_dist.backends import BACKENDS
from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.exchange.replicated import Local
from moe_dist.kernels import quantize_rows, sorted_by_expert
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.step import Arrivals, TokenRows
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

SPEC = MoESpec(name="small", hidden=128, intermediate=128, num_experts=8, top_k=2)
WORD = torch.zeros(1, dtype=torch.int32)
LATER = Arrivals(WORD, WORD, WORD, 4, 0, 1, 2)


class Late(Local):
    """Its rows come only when it is asked for them."""

    def dispatch(self, step: Any, x: Any, routing: Any) -> tuple[TokenRows, Any]:
        rows, _ = super().dispatch(step, x, routing)
        return replace(rows, x=torch.full_like(rows.x, torch.nan), arrivals=LATER), rows

    def arrived(self, step: Any, rows: TokenRows, handle: TokenRows) -> TokenRows:
        return replace(rows, x=handle.x, arrivals=None)


@pytest.mark.parametrize("form", ["token", "expert"])
def test_a_layer_waits_where_its_backend_can_not(form):
    plan = make_plan(SPEC, ParallelSpec(), exchange="local", backend="torch", form=form, machine=Machine.detect("cpu"))
    layer = MoELayer(plan, random_weights(SPEC, 0), Comm.single())
    x, routing = Stream("a test's tokens").normal(9, 128).bfloat16(), synthetic_routing(SPEC, 9, "uniform", 0)
    expected = layer(x, routing)
    own = layer.exchange
    late = Late(own.comm, own.placement, own.spec, own.payload, own.static_scale, own.form, own.sums_dtype)
    layer.paths = (layer.paths[0]._replace(exchange=late),)
    assert torch.equal(layer(x, routing), expected)
    layer.backend.awaits = lambda rows: True
    assert bool(layer(x, routing).isnan().any())


def test_only_gemm1_of_cutlass_waits_and_only_for_quantized_rows():
    values, pairs = torch.randn(4, 128).bfloat16(), torch.zeros(4, 2, dtype=torch.int32)
    plain = TokenRows(values, pairs, pairs.float(), arrivals=LATER)
    quantized = replace(plain, x=quantize_rows(values, "fp8_block"))
    for name in ("cutlass", "triton", "torch"):
        made = BACKENDS.get(name)(problem())
        assert made.awaits(replace(plain, arrivals=None))
        assert not made.awaits(plain)
        assert made.awaits(quantized) == (name == "cutlass")


def test_sorting_keeps_what_is_known_of_them():
    pairs = torch.tensor([[0, 1], [1, -1]], dtype=torch.int32)
    rows = TokenRows(torch.zeros(2, 128), pairs, pairs.float(), arrivals=LATER)
    assert sorted_by_expert(rows, 2, SimpleNamespace()).arrivals is LATER
