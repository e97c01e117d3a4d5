"""Weights of an experts module as canonical ExpertWeights: all of them where they lie, or a copy of a rank's slices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from moe_dist.integrations.transformers.forms import BIAS, INPUT, SCALE, SECOND, Form
from moe_dist.machine.surroundings import unaffected
from moe_dist.model.placement import Placement
from moe_dist.model.spec import MoESpec
from moe_dist.model.weights import OF_HALVES, ExpertWeights, quantize_weights, slice_width


@unaffected
def as_they_lie(form: Form, tensors: Mapping[str, Tensor]) -> ExpertWeights:
    """All experts of `tensors`. The matrices are views; scales and biases are copied where their dtype or shape is
    another. Rows of gate and up that lie in turns still do (`expert_of`)."""
    one, two = tensors[form.first], tensors[SECOND]
    if form.in_turns:
        b13, b2 = (tensors[each + BIAS].float() for each in (form.first, SECOND))
        return ExpertWeights("none", True, one.transpose(1, 2), two.transpose(1, 2), b13_eF=b13, b2_eH=b2)
    gated = form.activation != "relu2"
    if form.quant == "none":
        return ExpertWeights("none", gated, one, two)
    s13, s2 = (tensors[each + SCALE].float() for each in (form.first, SECOND))
    if form.quant == "fp8_block":
        return ExpertWeights(form.quant, gated, one, two, s13.contiguous(), s2.contiguous())
    s13, s2 = s13.flatten(1), s2.flatten(1)  # one for gate, one for up; one for down
    if form.quant == "fp8_channel":
        s13, s2 = s13.repeat_interleave(form.intermediate, 1), s2.repeat_interleave(form.hidden, 1)
        return ExpertWeights(form.quant, gated, one, two, s13, s2)
    a13, a2 = (tensors[each + INPUT].float().flatten() for each in (form.first, SECOND))
    return ExpertWeights(form.quant, gated, one, two, s13, s2, a13.amax(), a2.clone())


def expert_of(form: Form, whole: ExpertWeights, expert: int) -> ExpertWeights:
    """One of them, with gate before up: views, or copies where those lie in turns."""
    one = whole.one(expert)
    if not form.in_turns:
        return one
    laid = {name: tensor.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
            for name, tensor in one.tensors().items() if name in OF_HALVES}  # fmt: skip
    return one.with_tensors(**laid)


@unaffected
def shard_of(
    form: Form, whole: ExpertWeights, spec: MoESpec, placement: Placement, rank: int, device: torch.device
) -> ExpertWeights:
    """What `rank` holds of `whole`, in the format of `spec`, as tensors of its own on `device`; it shares none with
    `whole`. Expert by expert, so that little memory is needed beside the two. A bf16 expert is quantized whole, which
    gives every placement the same numbers."""
    start, stop = placement.slice_of(rank)
    held = placement.experts_of(rank)
    shard = ExpertWeights.empty(spec, len(held), stop - start, device)
    for slot, expert in enumerate(held):
        made = expert_of(form, whole, expert)
        if whole.kind != spec.quant:
            biases = {name: bias.to(device) for name, bias in made.biases.items()}
            made = quantize_weights(made.w13_eFH.to(device), made.w2_eHi.to(device), spec).with_tensors(**biases)
        made = slice_width(made, start, stop)
        for name, target in shard.tensors().items():
            if target.ndim:
                target[slot].copy_(made.tensors()[name][0])
    if shard.a13 is not None and whole.a13 is not None:
        shard.a13.copy_(whole.a13)
    return shard


def check_values(form: Form, whole: ExpertWeights, experts: Iterable[int]) -> None:
    """Raise ConfigError for values of these experts that no layer can have. One pass over them."""
    for expert in experts:
        expert_of(form, whole, expert).check_finite([expert])
