"""A stand-in for the package deep_gemm: its whole-layer kernel in plain torch over gloo, with the parameters that the
package's Python files declare and what its host code asserts. Its memory begins full of what would be wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import silu

from moe_dist.backends import deep_gemm_mega
from moe_dist.backends.deep_gemm_mega import DeepGemmMega
from moe_dist.exchange.fused import Fused
from moe_dist.machine.machine import HOPPER
from moe_dist.model.quantization import FP8
from moe_dist.step import Support

ALIGNMENT = 384  # tokens
made: list[SymmBuffer] = []  # in this process


class SymmBuffer:
    def __init__(self, group: Any, num_experts: int, tokens: int, top_k: int, hidden: int, intermediate: int) -> None:
        assert num_experts % group.size() == 0
        assert hidden % 128 == intermediate % 128 == 0
        self.group, self.num_experts, self.num_max_tokens_per_rank = group, num_experts, tokens
        self.x = torch.full((tokens, hidden), 7.0).to(FP8)
        self.x_sf = torch.full((tokens, hidden // 128), float("nan"))
        self.topk_idx = torch.full((tokens, top_k), num_experts, dtype=torch.int64)
        self.topk_weights = torch.full((tokens, top_k), float("nan"))
        made.append(self)


def get_symm_buffer_for_sm90_mega_moe(
    group: Any, num_experts: int, num_max_tokens_per_rank: int, num_topk: int, hidden: int, intermediate_hidden: int,
    use_fp8_dispatch: bool = True, activation: str = "swiglu",
) -> SymmBuffer:  # fmt: skip
    assert (use_fp8_dispatch, activation) == (True, "swiglu")
    aligned = -(-num_max_tokens_per_rank // ALIGNMENT) * ALIGNMENT
    return SymmBuffer(group, num_experts, aligned, num_topk, hidden, intermediate_hidden)


def transform_weights_for_mega_moe_sm90(
    l1_weights: tuple[Tensor, Tensor], l2_weights: tuple[Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Gate and up in turn, eight rows each."""
    weights, scales = l1_weights
    gate, up = (half.float().unflatten(1, (-1, 8)) for half in weights.chunk(2, dim=1))
    return (torch.stack([gate, up], dim=2).flatten(1, 3).to(FP8), scales), l2_weights


def older(
    y: Tensor, l1_weights: tuple[Tensor, Tensor], l2_weights: tuple[Tensor, Tensor], sym_buffer: SymmBuffer,
    cumulative_local_expert_recv_stats: Tensor | None = None, recipe: tuple[int, int, int] = (128, 128, 128),
    activation: str = "swiglu", activation_clamp: float | None = None, fast_math: bool = True,
) -> None:  # fmt: skip
    given = recipe, activation, activation_clamp, fast_math, cumulative_local_expert_recv_stats
    assert given == ((128, 128, 128), "swiglu", None, True, None)
    _layer(y, l1_weights, l2_weights, sym_buffer, 64, _next_power_of_2)


def newer(
    y: Tensor, l1_weights: tuple[Tensor, Tensor], l2_weights: tuple[Tensor, Tensor], sym_buffer: SymmBuffer,
    cumulative_local_expert_recv_stats: Tensor | None = None, recipe: tuple[int, int, int] = (128, 128, 128),
    activation: str = "swiglu", activation_clamp: float | None = None, fast_math: bool = True,
    num_tokens_bound: int | None = None,
) -> None:  # fmt: skip
    assert num_tokens_bound is not None, "the schedule would be that of the memory's size"
    assert num_tokens_bound == len(y), "all ranks launch for so many: with another bound the schedule is another's"
    given = recipe, activation, activation_clamp, fast_math, cumulative_local_expert_recv_stats
    assert given == ((128, 128, 128), "swiglu", None, True, None)
    _layer(y, l1_weights, l2_weights, sym_buffer, 128, lambda scale: scale)


def _next_power_of_2(scale: Tensor) -> Tensor:
    mantissa, exponent = scale.frexp()
    return torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())


def _layer(
    y: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], buffer: SymmBuffer,
    columns: int, rounded: Callable[[Tensor], Tensor],
) -> None:  # fmt: skip
    """A rounded scale for so many columns of GEMM2's input, which has its pair's weight in it already, and a sum in
    bf16 of every pair."""
    group, tokens = buffer.group, len(y)
    rank, world, local = group.rank(), group.size(), len(first[0])
    assert (y.dtype, y.is_contiguous()) == (torch.bfloat16, True)
    assert 0 < tokens <= buffer.num_max_tokens_per_rank
    assert local * world == buffer.num_experts == len(second[0]) * world
    assert all(each.is_contiguous() for each in (*first, *second))
    x = buffer.x[:tokens].float() * buffer.x_sf[:tokens].repeat_interleave(128, 1)
    mine = x, buffer.topk_idx[:tokens], buffer.topk_weights[:tokens]
    assert bool((mine[1] >= -1).all() and (mine[1] < buffer.num_experts).all()), "would write beyond its memory"
    x, ids, weights = (_gathered(each, group) for each in mine)
    assert len(x) == world * tokens, "ranks launch for different numbers of tokens"
    total = torch.zeros_like(x)
    for slot in range(local):
        row, place = (ids == rank * local + slot).nonzero(as_tuple=True)
        gate, up = first[0][slot].float().unflatten(0, (-1, 2, 8)).unbind(1)
        w13 = torch.cat([gate.flatten(0, 1), up.flatten(0, 1)]) * _spread(first[1][slot])
        a, b = (x[row] @ w13.T).chunk(2, dim=1)
        h = (silu(a) * b * weights[row, place][:, None]).unflatten(1, (-1, columns))
        scale = rounded(h.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448)
        h = ((h / scale).to(FP8).float() * scale).flatten(1)
        sums = (h @ (second[0][slot].float() * _spread(second[1][slot])).T).bfloat16().float()
        total.index_add_(0, row, sums)
    dist.all_reduce(total, group=group)
    y.copy_(total[rank * tokens : (rank + 1) * tokens])


def _spread(scale: Tensor) -> Tensor:
    return scale.repeat_interleave(128, 0).repeat_interleave(128, 1)


def _gathered(mine: Tensor, group: Any) -> Tensor:
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    return torch.cat(everyone)


@contextmanager
def installed(newest: bool = False) -> Iterator[None]:
    """As if the package were here, and ranks of a CPU the GPUs that it is for."""
    module = ModuleType("deep_gemm")
    functions = get_symm_buffer_for_sm90_mega_moe, transform_weights_for_mega_moe_sm90
    module.__dict__.update({function.__name__: function for function in functions})
    module.__dict__["fp8_mega_moe"] = newer if newest else older
    supports, served = DeepGemmMega.supports, Fused.supports

    def on_hopper(cls: Any, problem: Any) -> Support:
        return supports(replace(problem, capability=HOPPER))

    def on_gpus(cls: Any, spec: Any, placement: Any, machine: Any) -> Support:
        return served(spec, placement, replace(machine, device="cuda"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deep_gemm", module)
        patch.setattr(deep_gemm_mega, "release", lambda: deep_gemm_mega.NEWER if newest else deep_gemm_mega.OLDER)
        patch.setattr(DeepGemmMega, "available", classmethod(lambda cls, device: Support(True)))
        patch.setattr(DeepGemmMega, "supports", classmethod(on_hopper))
        patch.setattr(Fused, "supports", classmethod(on_gpus))
        yield
