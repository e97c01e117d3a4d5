"""Layers on weights that stay in the model: made at the first call, and anew where the model's tensors are others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.plan import Plan
from moe_dist.errors import UnsupportedError
from moe_dist.integrations.transformers.forms import Form, form_of
from moe_dist.integrations.transformers.settings import Settings
from moe_dist.integrations.transformers.steps import Steps, plan_of
from moe_dist.integrations.transformers.weights import as_they_lie
from moe_dist.model.spec import ParallelSpec, TokenLayout


class Kept:
    """Those of one experts module, by top-k. The weights are views of the model's, so nothing is held twice."""

    def __init__(self, parallel: ParallelSpec, token_layout: TokenLayout, settings: Settings) -> None:
        self.parallel, self.token_layout, self.settings = parallel, token_layout, settings
        self._steps: dict[tuple[Any, ...], Steps] = {}
        self._plans: dict[tuple[Form, int, Comm], Plan] = {}  # a plan is for one kind of device

    def steps(
        self, module: nn.Module, tensors: Mapping[str, Tensor], top_k: int, comm: Comm, *, keep: bool = True
    ) -> Steps:
        """For a call with these tensors of `module`. `keep` False: for this call only, because the tensors are gone
        after it. Raises UnsupportedError for what can't be computed."""
        where = tuple((name, each.data_ptr(), each.shape, each.dtype) for name, each in tensors.items())
        key = (top_k, where, comm)
        if key in self._steps:
            return self._steps[key]
        if any(found[1:] != key[1:] for found in self._steps):
            self._steps.clear()  # the model was moved or loaded anew
        form = form_of(module, tensors)
        plan = self._plan(form, top_k, comm)
        weights = as_they_lie(form, tensors)
        made = Steps(MoELayer(plan, weights, comm), self.settings.graph_buckets)
        if not weights.gate_first:  # a backend has re-laid them in place, and save_pretrained would write them so
            weights.turn(gate_first=True)
            reason = "it re-lays weights in place, and these are the model's own"
            raise UnsupportedError(f"backend {plan.backend} without replace_experts", [reason], "replace_experts")
        if keep:
            self._steps[key] = made
        return made

    def _plan(self, form: Form, top_k: int, comm: Comm) -> Plan:
        key = (form, top_k, comm)
        if key not in self._plans:
            if form.quant == "fp8_tensor_static" and comm.world > 1:
                reason = "the scale of a layer's input is the largest of all experts, and a rank has its own only"
                raise UnsupportedError("static scales under ep_implementation", [reason], "replace_experts")
            spec = form.spec("transformers", top_k, form.num_experts * self.parallel.ep)
            self._plans[key] = plan_of(spec, self.parallel, self.token_layout, self.settings, comm)
        return self._plans[key]
