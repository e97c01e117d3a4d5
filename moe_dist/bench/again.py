"""A step on changed inputs: what gives its first output for ever, or a graph whose replay computes nothing, repeats
itself without fault."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.bench.prepared import Prepared
from moe_dist.bench.sketch import sketch, sketch_error
from moe_dist.engine.layer import MoELayer
from moe_dist.model.routing import Routing

CHANGED = 1e-2  # of a token: what an input of twice the size must change its output by at the least


def again_errors(step: Prepared, first: Tensor) -> tuple[float, float]:
    """What the worst token's output on changed inputs differs by from what `first`, the sketch of the step's first
    output by its routing of now, lets expect; and the output on the step's own inputs after that from the first. The
    same on every rank; collective.

    Tokens and their routing come in reversed order, and so must the outputs. A single token has twice its weights, in
    which the output is linear, or, beside a shared expert, in a stack and where weights are experts' inputs', twice its
    size, and only must change. Another order may choose other copies of experts, and with them other dynamic scales, so
    that bits may differ.
    """
    comm, x_TH, routings = step.comm, step.x, step.routings
    if len(x_TH) != 1:
        reversed_ones = [Routing(each.ids_TK.flip(0), each.weights_TK.flip(0)) for each in routings]
        found, wanted = _sketched(step, x_TH.flip(0), reversed_ones), first.flip(0)
    elif not step.stacked and _linear_in_weights(step.layers[0]):
        (routing,) = routings
        found, wanted = _sketched(step, x_TH, [Routing(routing.ids_TK, 2 * routing.weights_TK)]), 2 * first
    else:
        found = _sketched(step, 2 * x_TH, routings)
        changed = (found - first).norm() > CHANGED * first.norm()
        wanted = found if bool(changed | (first[0, 0] == 0)) else torch.full_like(first, float("inf"))
    err_again = sketch_error(comm, found, wanted)
    return err_again, sketch_error(comm, _sketched(step, x_TH, routings), first)


def _linear_in_weights(layer: MoELayer) -> bool:
    return layer.shared is None and not layer.plan.spec.weights_on_input


def _sketched(step: Prepared, x_TH: Tensor, routings: list[Routing]) -> Tensor:
    return sketch(step.added(step.on(x_TH, routings), x_TH))
