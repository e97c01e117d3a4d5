"""Whole experts and the router for the check, tensor by tensor under their names. It shares neither slicing nor
dequantization with `load.py` and `layout.py`, so that what they get wrong shows."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from moe_dist.checkpoint.folder import inside
from moe_dist.checkpoint.reader import Checkpoint


class WholeExperts:
    """The experts and the router of one layer that `check_layer` has accepted."""

    def __init__(self, directory: Path | str, layer: int) -> None:
        self._checkpoint = Checkpoint(directory)
        self._mlp = f"model.layers.{layer}.mlp"

    def expert(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate [I, H], up [I, H] and down [H, I] in float32, on the CPU."""
        fused = f"{self._mlp}.experts.gate_up_proj"
        if fused not in self._checkpoint.files:
            return self._named(f"{self._mlp}.experts.{number}")
        both, down = self._matrix(fused, number), self._matrix(f"{self._mlp}.experts.down_proj", number)
        middle = both.shape[0] // 2
        return both[:middle], both[middle:], down

    def shared(self) -> tuple[Tensor, Tensor, Tensor]:
        """The shared expert, likewise."""
        return self._named(f"{self._mlp}.shared_experts")

    def router(self) -> tuple[Tensor, Tensor | None]:
        """The router's weight [E, H] and, where there is one, its correction bias [E], in float32, on the CPU."""
        bias = f"{self._mlp}.gate.e_score_correction_bias"
        gate = self._tensor(f"{self._mlp}.gate.weight", None)
        return gate, self._tensor(bias, None) if bias in self._checkpoint.files else None

    def _named(self, prefix: str) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = (self._matrix(f"{prefix}.{name}_proj.weight") for name in ("gate", "up", "down"))
        return gate, up, down

    def _matrix(self, name: str, number: int | None = None) -> Tensor:
        """One matrix, multiplied out: element (n, k) has the scale of block (n // 128, k // 128)."""
        dense = self._tensor(name, number)
        scale_name = f"{name}_scale_inv"
        if scale_name not in self._checkpoint.files:
            return dense
        scales = self._tensor(scale_name, number)
        rows, columns = (torch.arange(size, device="cpu").div(128, rounding_mode="floor") for size in dense.shape)
        return dense * scales.index_select(0, rows).index_select(1, columns)

    def _tensor(self, name: str, number: int | None) -> Tensor:
        path = inside(self._checkpoint.directory, self._checkpoint.files[name])
        with torch.device("cpu"), safe_open(path, framework="pt", device="cpu") as file:
            stored: Tensor = file.get_tensor(name) if number is None else file.get_slice(name)[number]
        return stored.to(torch.float32)
