"""Launches of large steps: grids stay within what CUDA takes, and which kernel is launched is told apart by every
option's name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_dist.backends import Problem
from moe_dist.backends.triton_fused import TritonFused
from moe_dist.errors import UnsupportedError
from moe_dist.exchange.all_to_all import list_kernels, row_kernels
from moe_dist.kernels.triton import launch as launching
from moe_dist.kernels.triton import padded, pipeline, quantize, slots
from moe_dist.kernels.triton.fused_moe import Config, fused_moe
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import FP8, QuantizedRows, scale_columns
from moe_dist.model.routing import Routing
from moe_dist.model.spec import QUANT_KINDS, MoESpec, ParallelSpec
from moe_dist.model.weights import ExpertWeights
from moe_dist.step import Step, TokenRows, Whole, Workspace, fresh

LIMITS = (2**31 - 1, 65535, 65535)  # CUDA C++ Programming Guide, "Technical specifications per compute capability"
TOKENS = (65_536, 131_072, 1_048_576)
SPEC = MoESpec(hidden=7168, intermediate=2048, num_experts=256, top_k=8)
META = torch.device("meta")
WEIGHTS = ExpertWeights.empty(SPEC, 256, 2048, META)


def shaped(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


@pytest.fixture
def grids(monkeypatch):
    """(kernel's name, grid) of every launch; nothing runs, so tensors need no memory."""
    found: list[tuple[str, tuple[int, int, int]]] = []

    def record(kernel: Any, grid: tuple[int, int, int], *_: Any, **__: Any) -> None:
        found.append((kernel.fn.__name__, grid))

    for module in (padded, quantize, row_kernels, list_kernels, slots, pipeline):
        monkeypatch.setattr(module, "launch", record)
    return found


def exchange(tokens: int, bucket: int, placement: Placement, top_k: int, hidden: int) -> None:
    """All that all_to_all and ag_rs launch around the collectives, on this rank."""
    world = placement.world
    routing = Routing(shaped(tokens, top_k), shaped(tokens, top_k, dtype=torch.float32))
    take = fresh(META)
    order, token, pairs, counts = list_kernels.send_lists(placement, routing, 1, bucket, take)
    list_kernels.even_lists(placement, routing, 1, bucket, take)
    list_kernels.unpack_pairs(pairs, world * bucket, 1, take)
    slots.slots_on(placement, 1, shaped(world * bucket, top_k), take)
    for one in (shaped(tokens, hidden, dtype=FP8), shaped(tokens, hidden // 128, dtype=torch.float32)):
        row_kernels.take_sends(one, token, counts, 1, take)
        row_kernels.take_sends(one, token, None, 1, take)
    back, own = (shaped(count * bucket, hidden, dtype=torch.bfloat16) for count in (world - 1, 1))
    row_kernels.sum_rows(back, own, order, counts, bucket, 1)
    parts = [shaped(tokens, hidden, dtype=FP8), shaped(tokens, hidden // 128, dtype=torch.float32)]
    send, _, _ = list_kernels.packed_sends(placement, routing, parts, 1, bucket, take)
    list_kernels.unpack_rows(send, parts, top_k, take)


def check(found: list[tuple[str, tuple[int, int, int]]]) -> None:
    for name, grid in found:
        for size, limit in zip(grid, LIMITS, strict=True):
            assert 1 <= size <= limit, (name, grid)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("mine", [1, None], ids=["one token here", "as many here"])
def test_exchanges(grids, tokens, mine):
    """One rank may have a single token while all step at the largest rank's number."""
    placement = Placement.build(SPEC, ParallelSpec(ep=8))
    exchange(mine or tokens, tokens, placement, SPEC.top_k, SPEC.hidden)
    names = {name for name, _ in grids}
    assert names == {
        "_send_lists", "_unpack_pairs", "_slots_on", "_take_sends", "_sum_rows", "_packed_sends", "_unpack_rows",
    }  # fmt: skip
    check(grids)


def test_a_large_top_k(grids):
    """Then few rows fit into one program."""
    spec = SPEC.with_changes(num_experts=512, top_k=512)
    exchange(TOKENS[-1], TOKENS[-1], Placement.build(spec, ParallelSpec(ep=8)), 512, 7168)
    check(grids)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("quant", QUANT_KINDS)
def test_the_fused_moe_with_every_config(grids, quant, tokens):
    spec = SPEC.with_changes(quant=quant)
    weights = ExpertWeights.empty(spec, 256, 2048, META)
    slots, routed = shaped(tokens, 8), shaped(tokens, 8, dtype=torch.float32)
    x = shaped(tokens, 7168, dtype=torch.bfloat16)
    columns = scale_columns(quant, 7168)
    scales = shaped(tokens, columns, dtype=torch.float32) if columns else None
    problem = Problem(spec, 2048, 256, "cuda", (9, 0), "bf16")
    for rows_then in (1, tokens):  # a table's entry for few rows may serve many
        for config in TritonFused.candidates(problem, rows_then):
            for given in (x, x if quant == "none" else QuantizedRows(shaped(tokens, 7168, dtype=FP8), scales)):
                fused_moe(given, slots, routed, weights, "swiglu", Config(**config), torch.bfloat16)
    assert {"_gemm1", "_gemm2", "_weighted_sum"} <= {name for name, _ in grids}
    check(grids)


@pytest.mark.parametrize("tokens", TOKENS)
def test_padded_rows(grids, tokens):
    step = Step(Workspace(META))
    x, routed = shaped(tokens, 7168, dtype=torch.bfloat16), shaped(tokens, 8, dtype=torch.float32)
    rows = TokenRows(x, shaped(tokens, 8), routed)
    made = padded.PaddedPipeline(step, rows, WEIGHTS, lambda *_: None, lambda *_: None)
    sink = Whole(step, (tokens, 7168), torch.bfloat16, META)
    made.run("swiglu", sink)
    assert {"_pad_rows", "_activate_rows"} <= {name for name, _ in grids}
    check(grids)


def test_more_pairs_than_their_numbers_reach_are_refused():
    made, step = object.__new__(padded.PaddedPipeline), Step(Workspace(META))
    slots, routed = shaped(1 << 28, 8), shaped(1 << 28, 8, dtype=torch.float32)
    rows = TokenRows(shaped(1 << 28, 128, dtype=torch.bfloat16), slots, routed)
    with pytest.raises(UnsupportedError, match=r"2147483648 \(token, expert\) pairs.*1073741824"):
        pipeline.Pipeline.__init__(made, step, rows, WEIGHTS, 128, False)


def _kernel() -> None:
    pass


class Kernel:
    """Stands for a compiled kernel; notes what it was asked for."""

    def __init__(self) -> None:
        self.fn = _kernel
        self.compiled: list[dict[str, Any]] = []
        self.ran: list[dict[str, Any]] = []

    def __getitem__(self, grid: Any) -> Any:
        def compile_and_run(*_: Any, **options: Any) -> Any:
            self.compiled.append(options)
            return {grid: lambda *_: self.ran.append(options)}

        return compile_and_run


class TestLaunch:
    @pytest.fixture(autouse=True)
    def empty(self, monkeypatch):
        monkeypatch.setattr(launching, "_compiled", {})

    def test_options_are_told_apart_by_their_names(self):
        kernel, tensor = Kernel(), torch.zeros(1)
        wanted = [{"num_warps": 4, "num_stages": 8}, {"num_stages": 4, "num_warps": 8}]
        for options in wanted * 2:
            launching.launch(kernel, (1, 1, 1), (tensor,), (), (), **options)
        assert kernel.compiled == wanted  # each once
        assert kernel.ran == wanted

    def test_one_option_is_not_another(self):
        kernel, tensor = Kernel(), torch.zeros(1)
        for options in ({"num_warps": 4}, {"num_stages": 4}, {}):
            launching.launch(kernel, (1, 1, 1), (tensor,), (), (), **options)
        assert len(kernel.compiled) == 3

    @pytest.mark.parametrize("grid", [(1, 65536, 1), (1, 1, 65536), (2**31, 1, 1)])
    def test_a_grid_that_no_gpu_takes_is_refused_by_name(self, grid):
        kernel = Kernel()
        with pytest.raises(UnsupportedError, match=r"_kernel.*2147483647 x 65535 x 65535"):
            launching.launch(kernel, grid, (torch.zeros(1),), ())
        assert kernel.compiled == []

    def test_the_largest_that_one_takes_is_not(self):
        kernel = Kernel()
        launching.launch(kernel, LIMITS, (torch.zeros(1),), ())
        assert len(kernel.compiled) == 1
