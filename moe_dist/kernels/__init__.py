"""Row operations around the experts: plain torch on a CPU, Triton on a GPU, equal results on both."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.model.placement import Placement
from moe_dist.model.quantization import QuantizedRows
from moe_dist.model.quantization import quantize_rows as quantize_rows_torch
from moe_dist.model.spec import QuantKind
from moe_dist.step import ExpertRows, Take, TokenRows, fresh


def quantize_rows(
    x_RH: Tensor,
    kind: QuantKind,
    static_scale: Tensor | None = None,
    used_R: Tensor | None = None,
    take: Take | None = None,
) -> QuantizedRows:
    """See quantization.quantize_rows; one launch on a GPU (a few more for fp8_tensor_dynamic). `take` says where the
    results lie there."""
    if x_RH.is_cuda and x_RH.numel():
        from moe_dist.kernels.triton.quantize import quantize_rows as kernel

        return kernel(x_RH, kind, static_scale, used_R, take or fresh(x_RH.device))
    return quantize_rows_torch(x_RH, kind, static_scale, used_R)


def slots_on(placement: Placement, rank: int, ids_RK: Tensor, sharded: int | None, take: Take) -> Tensor:
    """See Placement.slots_on; one launch on a GPU where every expert has one copy."""
    if ids_RK.is_cuda and ids_RK.numel() and not placement.replicated:
        from moe_dist.kernels.triton.slots import slots_on as kernel

        return kernel(placement, rank, ids_RK, take)
    return placement.slots_on(rank, ids_RK, sharded)


def token_gate(x_RH: Tensor, gate_1H: Tensor, take: Take) -> Tensor:
    """float32 [R, 1], the sigmoid of each row's product with the gate, in float32; one launch on a GPU. The weight of a
    gated shared expert (modeling_qwen2_moe.py of transformers, which rounds it to bf16)."""
    if x_RH.is_cuda and x_RH.numel():
        from moe_dist.kernels.triton.token_gate import token_gate as kernel

        return kernel(x_RH, gate_1H, take)
    return (x_RH.float() @ gate_1H.float().T).sigmoid()


def put_pairs(ids_TK: Tensor, weights_TK: Tensor, num_experts: int, ids_BK: Tensor, weights_BK: Tensor) -> None:
    """The global ids and weights of T tokens into contiguous tensors of B >= T; what is no expert's id becomes -1 with
    weight 0, as the rows behind the tokens. One launch on a GPU."""
    if ids_BK.is_cuda:
        from moe_dist.kernels.triton.pairs import put_pairs as kernel

        kernel(ids_TK, weights_TK, num_experts, ids_BK, weights_BK)
        return
    tokens = len(ids_TK)
    known = (ids_TK >= 0) & (ids_TK < num_experts)
    ids_BK[:tokens].copy_(ids_TK.masked_fill(~known, -1))
    weights_BK[:tokens].copy_(weights_TK.masked_fill(~known, 0.0))
    ids_BK[tokens:].fill_(-1)
    weights_BK[tokens:].zero_()


def sorted_by_expert(rows: TokenRows, experts: int, take: Take) -> ExpertRows:
    """`rows` with their pairs sorted by local expert, stably, whose number is `experts`; one launch on a GPU, two for
    many pairs."""
    if rows.slots_RK.is_cuda and rows.slots_RK.numel():
        from moe_dist.kernels.triton.permute import sorted_by_expert as kernel

        return kernel(rows, experts, take)
    flat = rows.slots_RK.flatten()
    order_N = torch.where(flat < 0, experts, flat).argsort(stable=True).to(torch.int32)
    counts_e = torch.bincount(flat[flat >= 0], minlength=experts)
    stops_e = counts_e.cumsum(0)
    starts_e = (stops_e - counts_e).to(torch.int32)
    stops_e = stops_e.to(torch.int32)
    return ExpertRows(rows.x, rows.slots_RK, rows.weights_RK, starts_e, stops_e, order_N, arrivals=rows.arrivals)
