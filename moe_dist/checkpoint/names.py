"""What the tensors of an MoE layer are called on disk, family by family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Matrix = Literal["gate", "up", "down"]
Part = Literal["gate", "up", "both", "down"]  # of an expert, as one tensor may hold it


@dataclass(frozen=True)
class Names:
    """The layer is the module `root`.layers.N.`block`; all other names are below it. Its experts are experts.E, each
    with the matrices `gate` (None where experts have none) and `up` [I, H] and `down` [H, I].

    `fused`: how all experts of a layer may lie in one tensor, experts.gate_up_proj and experts.down_proj. `rows` is
    [E, 2I, H] and [E, H, I]; `transposed` is [E, H, 2I] and [E, I, H], as in Llama 4, and `either` one of both. Gate
    comes before up.
    `interleaved` is always transposed and fused: even columns are gate's and odd ones up's, as in gpt-oss.
    `bias` is the router's correction bias and `logit_bias` that of its logits, where the model has them.
    `shared_gate` is the weight [1, H] of a sigmoid that multiplies the shared expert's output.
    `beside`: the first part of the names of other models in the same files, whose numbered layers are none of these.
    """

    root: str = "model"
    block: str = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "gate.weight"
    bias: str = "gate.e_score_correction_bias"
    logit_bias: str = "router.bias"
    shared: str = "shared_experts"
    shared_gate: str | None = None
    fused: Literal["rows", "transposed", "either", "interleaved"] | None = "rows"
    beside: tuple[str, ...] = ()

    def module(self, layer: int) -> str:
        return f"{self.root}.layers.{layer}.{self.block}"

    def experts(self, layer: int) -> str:
        return f"{self.module(layer)}.experts"

    @property
    def matrices(self) -> dict[Matrix, str]:
        """Each matrix of an expert and its module, in the order in which they are computed."""
        gate: dict[Matrix, str] = {"gate": self.gate} if self.gate else {}
        return gate | {"up": self.up, "down": self.down}


FUSED: dict[Matrix, str] = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}
