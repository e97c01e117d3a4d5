"""Random experts, the same for every placement."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from moe_dist.machine.surroundings import settled, unaffected
from moe_dist.model.quantization import FP8_MAX
from moe_dist.model.spec import MoESpec
from moe_dist.model.weights import ExpertWeights, activate, quantize_weights, stack
from moe_dist.workloads.streams import Stream

CALIBRATED = 1 << 14  # values that a static scale follows from, at the least
BIAS = 0.25


@unaffected
def random_expert(
    spec: MoESpec,
    expert: int,
    seed: int,
    device: torch.device | str = "cpu",
    up_scale: float = 0.25,
    layer: int = 0,
) -> ExpertWeights:
    """One whole expert, dense Gaussian, drawn from (seed, layer, expert) alone: the same for every placement. The
    shared expert of a layer goes by the number behind the last routed one.

    `up` is made `up_scale` times the size of `gate`, so that swapped halves can't go unseen. Numbers drawn on a GPU
    differ from those drawn on a CPU. Static scales are calibrated on 64 Gaussian rows, or more where an expert is
    narrow and rows hold few values, with a margin of 2.5: outliers must not saturate, and a floating-point format loses
    next to nothing by it. Biases are a quarter of what they are added to, and rounded to bf16, as they are stored.
    """
    H, I = spec.hidden, spec.intermediate
    stream = Stream("expert weights", seed, layer, expert, device=device)
    w13 = stream.normal(1, spec.w13_rows(I), H) / H**0.5
    if spec.gated:
        w13[:, I:] *= up_scale
    weights = quantize_weights(w13, stream.normal(1, H, I) / I**0.5, spec)
    if spec.token_gate:
        gate = Stream("gate of the shared expert", seed, layer, device=device).normal(1, H) / H**0.5
        weights = weights.with_tensors(token_gate_eH=gate.bfloat16().float())  # as it is stored
    if spec.expert_bias:
        biases = Stream("biases of an expert", seed, layer, expert, device=device)
        b13_1F = BIAS * biases.normal(1, spec.w13_rows(I))
        if spec.gated:
            b13_1F[:, I:] *= up_scale
        b13_1F, b2_1H = (bias.bfloat16().float() for bias in (b13_1F, BIAS * biases.normal(1, H)))
        weights = weights.with_tensors(b13_eF=b13_1F, b2_eH=b2_1H)
    if spec.quant != "fp8_tensor_static":
        return weights
    rows = Stream("calibration rows", seed, layer, expert, device=device).normal(max(64, CALIBRATED // I), H)
    with settled(rows.device):
        inner = rows @ w13[0].T
        bias_F = weights.first_bias(0)
        amax2 = activate(inner if bias_F is None else inner + bias_F, spec.activation).abs().amax()
    a13 = torch.tensor(5.5 / FP8_MAX, dtype=torch.float32, device=device)
    return weights.with_tensors(a13=a13, a2=(2.5 * amax2 / FP8_MAX).reshape(1))


@unaffected
def random_weights(
    spec: MoESpec, seed: int, device: torch.device | str = "cpu", experts: Iterable[int] | None = None
) -> ExpertWeights:
    """A whole layer of random experts (or those of `experts`)."""
    chosen = range(spec.num_experts) if experts is None else experts
    return stack([random_expert(spec, expert, seed, device) for expert in chosen])
