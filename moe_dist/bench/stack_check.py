"""The check of a stack: every layer on the input that the layers before it really gave, and what they give together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from moe_dist.bench.case import Case
from moe_dist.bench.check import Errors, errors_of, group_error, worse, worst_token
from moe_dist.bench.gathered import joined
from moe_dist.bench.inputs import Inputs
from moe_dist.bench.loading import Weights
from moe_dist.bench.prepared import Prepared
from moe_dist.runtime.context import RankContext


def step_errors(
    context: RankContext,
    case: Case,
    step: Prepared,
    inputs: Sequence[Inputs],
    weights: Sequence[Weights],
    groups: Sequence[Tensor],
    y_TH: Tensor,
) -> Errors:
    """Of a step that gave `y_TH`; collective. `inputs`, `weights` and `groups`, who serves each pair, are those of its
    layers.

    A stack's layers run once more, eagerly and one by one, and each is checked as a single layer is; the worst counts.
    What they give together is compared with the stack's own output: as a whole (err_oracle) and, without the residual,
    token by token (err_token).
    """
    if not step.stacked:
        shard, shared, _ = weights[0]
        alone = case, step.layers[0], step.numerics, inputs[0], shard, shared, groups[0], y_TH
        return errors_of(context, *alone)
    found, x_TH, tokens_TH = [], step.x, inputs[0].x_TH
    for number, (layer, (shard, shared, _)) in enumerate(zip(step.layers, weights, strict=True)):
        context.progress(f"{case.label}: checking layer {number}")
        everyone = joined(step.comm, x_TH, inputs[number].bounds) if inputs[number].sharded else x_TH
        here, alone_TH = replace(inputs[number], x_TH=everyone), step.alone(number, x_TH)
        of_layer = case.at(number), layer, step.numerics, here, shard, shared, groups[number], alone_TH, tokens_TH
        found.append(errors_of(context, *of_layer))
        x_TH = x_TH + alone_TH
    whole = group_error(step.comm, y_TH, x_TH)
    token = worst_token(step.comm, step.added(y_TH, step.x), step.added(x_TH, step.x))
    together = Errors(err_oracle=whole, err_exact=0.0, err_whole=0.0, err_token=token)
    return worse(*found, together)
