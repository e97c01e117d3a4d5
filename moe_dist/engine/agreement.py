"""What all ranks of a layer must have alike, in numbers that they tell each other as a step begins (Comm.meet)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor

from moe_dist.engine.plan import Plan
from moe_dist.model.routing import Routing
from moe_dist.model.weights import position_sum

MODULUS = 1 << 62  # what is told are int64


class Agreement:
    """Of one layer. The backend is each rank's own affair: their partial sums add up all the same."""

    def __init__(self, plan: Plan) -> None:
        names = ("exchange", "payload", "up_to")
        said = {f"plan.{name}": getattr(plan, name) for name in ("token_layout", "combine_dtype")}
        said |= {f"plan.{name}": repr([getattr(each, name) for each in plan.choices]) for name in names}
        said |= {"plan.spec": plan.spec.model_dump_json(exclude={"name"}), "plan.placement": repr(plan.placement)}
        self.plan = {name: _digest(text) for name, text in said.items()}
        self._alike = plan.token_layout == "replicated"
        self._every_row = plan.spec.shared_experts != "none"

    def of(self, layer: int, x_TH: Tensor, routing: Routing, values: bool) -> dict[str, int]:
        """By name. `layer`: its number among those made on the process group. Tokens that are replicated, and where
        they go, are looked at if `values`: the host waits for a GPU. Rows that no expert takes, and weights beside no
        expert, may hold anything."""
        routed = x = 0
        if self._alike and values:
            nobody_TK = routing.ids_TK < 0
            weights_TK = routing.weights_TK.masked_fill(nobody_TK, 0.0)
            routed = (position_sum(routing.ids_TK) + 3 * position_sum(weights_TK)) % MODULUS
            if not self._every_row:
                x_TH = x_TH.masked_fill(nobody_TK.all(1, keepdim=True), 0.0)
            x = position_sum(x_TH) % MODULUS
        return {**self.plan, "layer": layer, "routing": routed, "x": x}


def of_stack(agreements: Sequence[Agreement], layers: Sequence[int]) -> dict[str, int]:
    """By name, what the ranks of a stack must have alike: each field of all its layers' plans, and their numbers."""
    plans = {name: _digest(repr([each.plan[name] for each in agreements])) for name in agreements[0].plan}
    return {**plans, "layer": _digest(repr(list(layers)))}


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % MODULUS
