"""The oracle: what the layer must compute, written to be read. It shares no arithmetic with any backend, nor with
quantization.py: it quantizes, slices and activates in its own words.

`oracle_partial` is one rank's weighted partial sum; the layer's output is their sum over ranks, so a distributed check
lets every rank compute its own and add them up.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moe_dist.machine.surroundings import unaffected
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec
from moe_dist.model.weights import ExpertWeights
from moe_dist.oracle.numerics import Numerics

# Which rows a dynamic per-tensor scale is made from: all of its run of tokens, those that go to some expert, or those
# that the rank at hand computes itself.
ScaledBy = Literal["all", "routed", "computed"]


@unaffected
def oracle_partial(
    x_TH: Tensor,
    routing: Routing,
    shard: ExpertWeights,
    spec: MoESpec,
    placement: Placement,
    rank: int,
    sources: list[tuple[int, int]],
    groups_TK: Tensor,
    numerics: Numerics | None,
    scaled_by: ScaledBy = "routed",
) -> Tensor:
    """Rank `rank`'s share of the output for all global tokens, float32 [T, H].

    `sources`: the runs of tokens that were quantized together (a dynamic per-tensor scale belongs to one of them, and
    is made from the rows that `scaled_by` names). Ids that are no expert's add nothing, whatever their weights hold.
    `groups_TK`: which expert group serves each pair. `numerics` None means exact: dequantized weights, float32
    everywhere, no activation is quantized, and a token times its weight, where that is an expert's input, is not
    rounded to the layer's dtype.
    """
    y_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    exact = numerics is None or spec.quant == "none"
    x, weights_TK = x_TH.float(), routing.weights_TK
    if spec.weights_on_input:  # one expert a token: w2 · act(w13 · (weight x)), and nothing is left to weigh
        x = x * weights_TK[:, 0].float().reshape(-1, 1)
        x = x if numerics is None else x.to(spec.torch_dtype).float()
        weights_TK = weights_TK.new_full(weights_TK.shape, 1.0)
    if not exact:
        turned = numerics is not None and numerics.reciprocal
        legal = (routing.ids_TK >= 0) & (routing.ids_TK < spec.num_experts)
        choices = {"all": torch.ones_like(legal), "routed": legal, "computed": groups_TK == rank // placement.tp}
        counted = choices[scaled_by].any(dim=1)
        pieces = []
        for start, stop in sources:
            rows = x[start:stop]
            of_scale = rows[counted[start:stop]]
            most = float(of_scale.abs().max()) if of_scale.numel() else 0.0
            pieces.append(_fake_quantize(rows, spec.quant, shard.a13, most, turned))
        x = torch.cat(pieces)

    work = []
    for slot, expert in enumerate(placement.experts_of(rank)):
        here = (routing.ids_TK == expert) & (groups_TK == rank // placement.tp)
        token, place = here.nonzero(as_tuple=True)
        if len(token):
            work.append((slot, token, weights_TK[token, place]))

    hidden = [_hidden(x[token], shard, slot, spec, numerics) for slot, token, _ in work]
    weighted = not exact and numerics is not None and numerics.gemm2_weighted
    if weighted:
        hidden = [h * weight[:, None] for (_, _, weight), h in zip(work, hidden, strict=True)]
    if not exact and numerics is not None:
        whole_amax = max((float(h.abs().max()) for h in hidden if h.numel()), default=0.0)
        for index, (slot, _, _) in enumerate(work):
            static = None if shard.a2 is None else shard.a2[slot]
            form = turned, numerics.gemm2_group, numerics.gemm2_power_of_2
            hidden[index] = _fake_quantize(hidden[index], spec.quant, static, whole_amax, *form)
    for (slot, token, weight), h in zip(work, hidden, strict=True):
        w2 = _weight(shard.w2_eHi[slot], None if shard.s2 is None else shard.s2[slot], spec.quant)
        y = h @ w2.T
        if shard.b2_eH is not None:  # no backend that weighs before GEMM2 takes biases
            y = y + shard.b2_eH[slot]
        y_TH.index_add_(0, token, y if weighted else weight[:, None] * y)
    return y_TH


def _hidden(x: Tensor, shard: ExpertWeights, slot: int, spec: MoESpec, numerics: Numerics | None) -> Tensor:
    """act(x · w13ᵀ + b13) for one expert."""
    i = shard.w2_eHi.shape[2]
    rounded = numerics is not None and numerics.bf16_gemm1
    if not spec.gated:
        s13 = None if shard.s13 is None else shard.s13[slot]
        a = x @ _weight(shard.w13_eFH[slot], s13, spec.quant).T
        a = _round(a if shard.b13_eF is None else a + shard.b13_eF[slot], rounded)
        h = torch.where(a > 0, a * a, torch.zeros_like(a))
    else:
        halves = []
        for half in (0, 1) if shard.gate_first else (1, 0):
            codes = shard.w13_eFH[slot, half * i : (half + 1) * i]
            scale = None
            if shard.s13 is not None:
                rows = shard.s13.shape[1] // 2
                scale = shard.s13[slot, half * rows : (half + 1) * rows]
            product = x @ _weight(codes, scale, spec.quant).T
            if shard.b13_eF is not None:
                product = product + shard.b13_eF[slot, half * i : (half + 1) * i]
            halves.append(_round(product, rounded))
        gate, up = halves
        if spec.activation == "swiglu":
            h = gate / (1 + torch.exp(-gate)) * up
        elif spec.activation == "swigluoai":  # g σ(1.702 g) (u + 1), g cut off above 7 and u beyond ±7
            gate, up = torch.minimum(gate, gate.new_tensor(7.0)), torch.clip(up, -7.0, 7.0)
            h = gate / (1 + torch.exp(-1.702 * gate)) * (1 + up)
        else:  # geglu: 0.5 g (1 + tanh(sqrt(2/pi) (g + 0.044715 g³)))
            h = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    return _round(h, numerics is not None and numerics.bf16_activation)


def _round(values: Tensor, to_bf16: bool) -> Tensor:
    return values.bfloat16().float() if to_bf16 else values


def _weight(codes: Tensor, scale: Tensor | None, kind: str) -> Tensor:
    """A weight matrix [N, K] in float32."""
    dense = codes.float()
    if scale is None:
        return dense
    if kind == "fp8_block":
        whole_blocks = torch.kron(scale, torch.ones(128, 128, dtype=torch.float32, device=scale.device))
        return dense * whole_blocks[: dense.shape[0], : dense.shape[1]]
    if kind == "fp8_channel":
        return dense * scale.reshape(-1, 1)
    return dense * scale.reshape(())


def _fake_quantize(
    x: Tensor,
    kind: str,
    static: Tensor | None,
    whole_amax: float | None = None,
    reciprocal: bool = False,
    group: int = 128,
    power_of_2: bool = False,
) -> Tensor:
    """x rounded to what FP8 can hold under `kind`, as float32. `whole_amax`: the largest magnitude of the whole tensor
    that `x` is a part of, for a dynamic per-tensor scale (default: of x itself). `group`: columns that share a scale
    under fp8_block. `power_of_2`: a scale becomes the next power of two."""
    if x.numel() == 0:
        return x
    if kind == "fp8_block":
        parts = torch.split(x, group, dim=1)
        form = None, None, reciprocal, group, power_of_2
        return torch.cat([_fake_quantize(part, "fp8_channel", *form) for part in parts], dim=1)
    most = torch.full(
        (1,), 448.0, dtype=torch.float32, device=x.device
    )  # a tensor, or a GPU would multiply by a rounded 1 / 448
    if kind == "fp8_channel":
        scale = x.abs().amax(dim=1, keepdim=True) / most
    elif static is not None:
        scale = static
    else:
        amax = float(x.abs().max()) if whole_amax is None else whole_amax
        scale = torch.tensor(amax, dtype=torch.float32, device=x.device) / most
    scale = torch.where(scale > 1e-12, scale, torch.full_like(scale, 1e-12))
    if power_of_2:
        scale = torch.exp2(torch.ceil(torch.log2(scale.double()))).float()
    if reciprocal:
        factor = 1 / x.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) * 448
        return torch.clamp(x * factor, -448, 448).to(torch.float8_e4m3fn).float() / factor
    return torch.clamp(x / scale, -448, 448).to(torch.float8_e4m3fn).float() * scale


def oracle_layer(
    x_TH: Tensor,
    routing: Routing,
    shards: list[ExpertWeights],
    spec: MoESpec,
    placement: Placement,
    sources: list[tuple[int, int]],
    groups_TK: Tensor,
    numerics: Numerics | None,
    scaled_by: ScaledBy = "routed",
) -> Tensor:
    """The whole layer on one device, float32 [T, H]: the sum of every rank's partial."""
    y_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    for rank in range(placement.world):
        y_TH += oracle_partial(
            x_TH, routing, shards[rank], spec, placement, rank, sources, groups_TK, numerics, scaled_by
        )
    return y_TH


def relative_error(measured: Tensor, expected: Tensor) -> float:
    """||measured - expected|| / ||expected|| in float64; NaN counts as infinite, 0 / 0 as 0."""
    difference = float((measured.double() - expected.double()).norm())
    size = float(expected.double().norm())
    if measured.shape != expected.shape:
        raise ValueError(f"shapes {tuple(measured.shape)} and {tuple(expected.shape)} can't be compared")
    if not (difference < float("inf") and size < float("inf")):
        return float("inf")
    return difference / size if size else (0.0 if difference == 0 else float("inf"))
