"""The router: which experts a token goes to, from its own weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moe_dist.engine.plan import Plan
from moe_dist.errors import ConfigError
from moe_dist.machine.surroundings import settled
from moe_dist.model.routing import Routing, check_bias, check_floats, route


class Router(nn.Module):
    """Logits in float32 from the router's weight [E, H] and, where the model's router has one, their bias [E]; then the
    spec's top-k rule, with its correction bias `bias_E`. All of them stay float32 whatever dtype a model around it is
    moved to."""

    def __init__(
        self, plan: Plan, gate_EH: Tensor, bias_E: Tensor | None = None, logit_bias_E: Tensor | None = None
    ) -> None:
        """Copies in float32 are kept. Raises ConfigError for what is no dense tensor of floats, for wrong
        shapes, and for a weight or bias that is NaN or infinite in float32: every token or none would go to such an
        expert."""
        super().__init__()
        if not isinstance(plan, Plan):
            raise ConfigError("plan", type(plan).__name__, "is no Plan", "what make_plan gives")
        spec = plan.spec
        if spec.correction_bias != (bias_E is not None):
            given = None if bias_E is None else "given"
            raise ConfigError("router.bias", given, f"correction_bias of the model is {spec.correction_bias}")
        if spec.router_bias != (logit_bias_E is not None):
            given = None if logit_bias_E is None else "given"
            raise ConfigError("router.logit_bias", given, f"router_bias of the model is {spec.router_bias}")
        self.spec = spec
        self.register_buffer("gate_EH", self._checked("gate_EH", gate_EH).clone())
        for name, given_E in (("bias_E", bias_E), ("logit_bias_E", logit_bias_E)):
            self.register_buffer(name, None if given_E is None else self._checked(name, given_E).clone())
        self.gate_EH: Tensor
        self.bias_E: Tensor | None
        self.logit_bias_E: Tensor | None

    def _checked(self, name: str, given: Tensor) -> Tensor:
        """What becomes the weight or a bias, in float32."""
        if name != "gate_EH":
            field = f"router.{name.removesuffix('_E')}"
            check_bias(given, self.spec, values=True, masks=False, field=field)
            return given.detach().float()
        check_floats("router.weight", given)
        expected = (self.spec.num_experts, self.spec.hidden)
        if tuple(given.shape) != expected:
            raise ConfigError("router.weight", tuple(given.shape), "wrong shape", expected)
        gate_EH = given.detach().float()
        if not bool(gate_EH.isfinite().all()):
            rule = "decides where tokens go, in float32"
            raise ConfigError("router.weight", "NaN or infinite", rule, "finite values")
        return gate_EH

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """What is loaded is checked as what is given, and is float32 on this router's device, with `assign` as well."""
        loaded = {
            prefix + name: self._checked(name, state_dict[prefix + name]).to(before.device)
            for name, before in self.named_buffers()
            if prefix + name in state_dict
        }
        super()._load_from_state_dict(state_dict | loaded, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves to another device, but `half()` and the like change nothing: in bf16 tokens would go elsewhere."""
        for name, before in list(self.named_buffers()):
            self.register_buffer(name, before.to(fn(before[:0]).device))
        return self

    def forward(self, x_TH: Tensor) -> Routing:
        """Of tokens [T, H] of floats on the router's device. Raises ConfigError for others."""
        check_floats("x", x_TH, self.gate_EH.device)
        if x_TH.ndim != 2 or x_TH.shape[1] != self.spec.hidden:
            raise ConfigError("x", tuple(x_TH.shape), "wrong shape", f"[tokens, {self.spec.hidden}]")
        with settled(x_TH.device):
            logits_TE = x_TH.float() @ self.gate_EH.T
            if self.logit_bias_E is not None:
                logits_TE = logits_TE + self.logit_bias_E
            return route(logits_TE, self.spec, self.bias_E)
