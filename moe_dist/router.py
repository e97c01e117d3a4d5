"""The router: which experts a token goes to, from its own weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moe_dist.errors import ConfigError
from moe_dist.plan import Plan
from moe_dist.routing import Routing, check_bias, route
from moe_dist.surroundings import settled


class Router(nn.Module):
    """Logits in float32 from the router's weight [E, H], and the spec's top-k rule. Weight and bias stay float32
    whatever dtype a model around it is moved to."""

    def __init__(self, plan: Plan, gate_EH: Tensor, bias_E: Tensor | None = None) -> None:
        """Raises ConfigError for wrong shapes, for a weight that is NaN or infinite, and for a bias that is not finite:
        every token or none would go to such an expert."""
        super().__init__()
        spec = plan.spec
        expected = (spec.num_experts, spec.hidden)
        if tuple(gate_EH.shape) != expected:
            raise ConfigError("router.weight", tuple(gate_EH.shape), "wrong shape", expected)
        if not bool(gate_EH.isfinite().all()):
            raise ConfigError("router.weight", "NaN or infinite", "decides where tokens go", "finite values")
        if spec.correction_bias != (bias_E is not None):
            given = None if bias_E is None else "given"
            raise ConfigError("router.bias", given, f"correction_bias of the model is {spec.correction_bias}")
        if bias_E is not None:
            check_bias(bias_E, spec, values=True, masks=False)
        self.spec = spec
        self.register_buffer("gate_EH", gate_EH.detach().float())
        self.register_buffer("bias_E", None if bias_E is None else bias_E.detach().float())
        self.gate_EH: Tensor
        self.bias_E: Tensor | None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """What is loaded is float32 too, with `assign` as well."""
        names = {prefix + name for name, _ in self.named_buffers()} & state_dict.keys()
        super()._load_from_state_dict(state_dict | {name: state_dict[name].float() for name in names}, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves to another device, but `half()` and the like change nothing: in bf16 tokens would go elsewhere."""
        for name, before in list(self.named_buffers()):
            self.register_buffer(name, before.to(fn(before[:0]).device))
        return self

    def forward(self, x_TH: Tensor) -> Routing:
        with settled(x_TH.device):
            return route(x_TH.float() @ self.gate_EH.T, self.spec, self.bias_E)
