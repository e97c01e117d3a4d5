"""vLLM's routed experts with our method for their weights. Everything else of the layer is vLLM's: its loader, its
router and what its runner does around it."""

from __future__ import annotations

from typing import Any, ClassVar

from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from moe_dist.errors import ConfigError
from moe_dist.integrations.vllm.method import MoeDistFp8Method


class MoeDistRoutedExperts(RoutedExperts):
    """Raises UnsupportedError, when the model is made, for a layer that `backend` does not compute."""

    backend: ClassVar[str]

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> MoeDistFp8Method:
        return MoeDistFp8Method(self, prefix, quant_config, self.backend)

    def weight_loader(self, *given: Any, **named: Any) -> Any:
        """vLLM's. Raises ConfigError once the weights were prepared: they may lie in another order by then."""
        if self.quant_method.prepared:
            rule = "weights are prepared once, they can't be loaded again in a running server"
            raise ConfigError("weights", self.layer_name, rule, "a new start")
        return super().weight_loader(*given, **named)

    weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]
