"""Whatever a layer is given, it refuses by name or computes right: a property test over its inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.errors import ConfigError
from moe_dist.machine.machine import Machine
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import activate
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.streams import Stream

E, K, H = 5, 3, 128
SPEC = MoESpec(hidden=H, intermediate=32, num_experts=E, top_k=K, quant="none", dtype="fp32")
PLAN = make_plan(SPEC, ParallelSpec(), exchange="local", backend="torch", machine=Machine.detect("cpu"))
WEIGHTS = random_weights(SPEC, 0)
LAYER = MoELayer(PLAN, WEIGHTS, Comm.single())
DTYPES = [torch.float32] * 5 + [torch.bfloat16, torch.float64, torch.int32, torch.bool]

# Right far more often than wrong: else nearly every example would be refused for its first mistake.
DIMENSIONS = st.sampled_from([0, 0, 0, 0, 0, 0, 0, 1, -1])
IDS = st.one_of(st.integers(-1, E - 1), st.integers(-1, E - 1), st.sampled_from([-(2**31), -2, E, 2**31 - 1]))
NUMBERS = st.one_of(st.floats(-4, 4, width=32), st.sampled_from([0.0, 1.0, float("nan"), float("inf"), -3e38]))


@st.composite
def inputs(draw: Any) -> tuple[torch.Tensor, Routing, int | None, bool]:
    tokens = draw(st.integers(0, 5))
    x = Stream("property", draw(st.integers(0, 99))).normal(tokens, H + draw(DIMENSIONS))
    if tokens and draw(st.booleans()):
        x[draw(st.integers(0, tokens - 1)), 0] = draw(NUMBERS)
    strange = draw(st.booleans())
    ids, weights = (
        torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=dtype).view(rows, places)
        for values, dtype in ((IDS if strange else st.integers(-1, E - 1), torch.int64), (NUMBERS, torch.float32))
        for rows, places in [(max(0, tokens + draw(DIMENSIONS)), K + draw(DIMENSIONS))]
        for size in [rows * places]
    )
    if draw(st.booleans()):  # a column slice
        x = torch.cat([x.new_zeros(tokens, 1), x, x.new_zeros(tokens, 3)], 1)[:, 1:-3]
    ids = ids.to(draw(st.sampled_from([torch.int32] * 7 + [torch.int64])))
    weights = weights.to(draw(st.sampled_from([torch.float32] * 7 + [torch.float64])))
    x = x.to(draw(st.sampled_from(DTYPES)))
    bucket = draw(st.one_of(st.none(), st.none(), st.integers(-1, 8)))
    return x, Routing(ids, weights), bucket, draw(st.booleans()) and x.is_floating_point()


def expected(x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """One pair after another, in float64."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token, (ids, values) in enumerate(zip(routing.ids_TK.tolist(), routing.weights_TK.tolist(), strict=True)):
        for expert, value in zip(ids, values, strict=True):
            if expert >= 0:
                w13, w2 = WEIGHTS.dequantized(expert)
                y[token] += value * (w2.double() @ activate(x[token].double() @ w13.double().T, "swiglu"))
    return y


def legal(x: torch.Tensor, routing: Routing, bucket: int | None) -> bool:
    ids, weights = routing.ids_TK, routing.weights_TK
    shapes = x.shape[1] == H and ids.shape == weights.shape == (len(x), K)
    dtypes = (x.dtype, ids.dtype, weights.dtype) == (torch.float32, torch.int32, torch.float32)
    if not (shapes and dtypes and (bucket is None or bucket >= len(x))):
        return False
    return bool(((ids >= -1) & (ids < E)).all()) and bool(weights[ids >= 0].isfinite().all())


@settings(deadline=None)
@given(inputs())
def test_a_layer_refuses_or_computes_right(given_inputs):
    x, routing, bucket, gradient = given_inputs
    if gradient:
        x.requires_grad_()
    if gradient or not legal(x, routing, bucket):
        with pytest.raises(ConfigError):
            LAYER(x, routing, max_tokens_per_rank=bucket)
        return
    y, right = LAYER(x, routing, max_tokens_per_rank=bucket), expected(x, routing)
    # Where a product leaves float32, a weight of 0 makes NaN of it; other tokens must not notice.
    finite = right.isfinite().all(1) & (right.abs() < 1e30).all(1) & (x.abs() < 1e15).all(1)
    assert torch.allclose(y[finite].double(), right[finite], rtol=1e-4, atol=1e-4)
    spoilt = right.isnan().any(1)  # what is not a number comes out as none
    assert not bool(y[spoilt].isfinite().all(1).any())
