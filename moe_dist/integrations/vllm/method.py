"""vLLM's method of a quantized layer: what weights it has, and how they are applied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs

from moe_dist.errors import ConfigError
from moe_dist.integrations.local_experts import LocalExperts, backend_for, problem_of
from moe_dist.integrations.vllm.served import spec_of
from moe_dist.model.weights import ExpertWeights

# Our names of tensors, and those that vLLM's loader makes of a checkpoint's.
NAMES = {
    "w13_eFH": "w13_weight",
    "w2_eHi": "w2_weight",
    "s13": "w13_weight_scale_inv",
    "s2": "w2_weight_scale_inv",
}


class MoeDistFp8Method(FusedMoEMethodBase):
    """FP8 in blocks of 128×128 with dynamic scales of tokens. Takes the tokens that vLLM's exchange has brought to this
    rank and gives their weighted sums over its experts; vLLM adds them up over the ranks."""

    def __init__(self, layer: Any, prefix: str, quant_config: Any, backend: str) -> None:
        super().__init__(layer.moe_config)
        self.prefix, self.backend = prefix, backend
        self.spec = spec_of(layer, prefix, quant_config)
        self._experts: LocalExperts | None = None
        device = torch.device(self.moe.device)
        backend_for(backend, problem_of(self.spec, self.moe.num_local_experts, device))

    @property
    def prepared(self) -> bool:
        """Whether the weights were taken over."""
        return self._experts is not None

    @property
    def topk_indices_dtype(self) -> torch.dtype:
        return torch.int32

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, act_dtype: Any, moe_parallel_config: Any
    ) -> tuple[int, int]:
        """As they are."""
        return hidden_size, intermediate_size_per_partition

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """The parameters of ExpertWeights under vLLM's names, on the device that is set around."""
        from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported

        blocks = {"quant_method": FusedMoeWeightScaleSupported.BLOCK.value}
        forms = ExpertWeights.forms(self.spec, num_experts, intermediate_size_per_partition)
        for name, (shape, dtype) in forms.items():
            parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            layer.register_parameter(NAMES[name], parameter)
            set_weight_attrs(parameter, extra_weight_attrs | (blocks if name.startswith("s") else {}))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take them over, turned where they lie if the backend wants that. Raises ConfigError for a second time."""
        if self.prepared:
            rule = "weights are prepared once, they can't be loaded again in a running server"
            raise ConfigError("weights", self.prefix, rule, "a new start")
        w13, w2, s13, s2 = (tensor.detach() for tensor in _tensors(layer))
        weights = ExpertWeights("fp8_block", self.spec.gated, w13, w2, s13, s2)
        held = None if layer._expert_map is None else _held(layer._expert_map)
        self._experts = LocalExperts(self.backend, self.spec, weights, held, self.moe.num_experts)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """vLLM's own kernels have one."""
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """x [T, H] bf16, topk_ids [T, K] of all ranks' experts, to [T, H] bf16. The shared expert is the runner's."""
        if self._experts is None or not self._experts.reads(*_tensors(layer)):
            rule = "the weights were moved or replaced after they had been prepared, or never were"
            raise ConfigError("weights", self.prefix, rule, "process_weights_after_loading, and no offloading")
        return self._experts(x, topk_ids, topk_weights)


def _tensors(layer: Any) -> tuple[Tensor, ...]:
    return tuple(getattr(layer, name) for name in NAMES.values())


def _held(expert_map_E: Tensor) -> list[int]:
    """Which experts this rank has, in the order of their slots."""
    slots: list[int] = expert_map_E.tolist()
    return sorted((expert for expert, slot in enumerate(slots) if slot >= 0), key=slots.__getitem__)
