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
        self._names = self._checkpoint.config.names
        self._module = self._names.module(layer)

    def expert(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate [I, H], or [0, H] where experts have none, up [I, H] and down [H, I] in float32, on the CPU."""
        fused = f"{self._module}.experts.gate_up_proj"
        if fused not in self._files:
            return self._named(f"{self._module}.experts.{number}")
        both, down = self._matrix(fused, number), self._matrix(f"{self._module}.experts.down_proj", number)
        width = self._checkpoint.config.spec.intermediate
        if (both.shape[1], down.shape[0]) == (2 * width, width):  # transposed
            both, down = both.T, down.T
        middle = both.shape[0] // 2
        return both[:middle], both[middle:], down

    def shared(self) -> tuple[Tensor, Tensor, Tensor]:
        """The shared expert, likewise."""
        return self._named(f"{self._module}.{self._names.shared}")

    def token_gate(self) -> Tensor | None:
        """The weight [H] of the shared expert's gate in float32, on the CPU; None where it isn't gated."""
        name = f"{self._module}.{self._names.shared_gate}"
        return self._tensor(name, None).flatten() if name in self._files else None

    def router(self) -> tuple[Tensor, Tensor | None]:
        """The router's weight [E, H] and, where there is one, its correction bias [E], in float32, on the CPU."""
        bias = f"{self._module}.{self._names.bias}"
        gate = self._tensor(f"{self._module}.{self._names.router}", None)
        return gate, self._tensor(bias, None).flatten() if bias in self._files else None

    def _named(self, prefix: str) -> tuple[Tensor, Tensor, Tensor]:
        up, down = (self._matrix(f"{prefix}.{name}.weight") for name in (self._names.up, self._names.down))
        if self._names.gate is None:
            return up[:0], up, down
        return self._matrix(f"{prefix}.{self._names.gate}.weight"), up, down

    def _matrix(self, name: str, number: int | None = None) -> Tensor:
        """One matrix, multiplied out. A scale may be one for all, one for each row, or that of block (n // 128,
        k // 128) for element (n, k)."""
        dense = self._tensor(name, number)
        scale_name = next((f"{name}{end}" for end in ("_scale_inv", "_scale") if f"{name}{end}" in self._files), None)
        if scale_name is None:
            return dense
        scales = self._tensor(scale_name, number)
        if scale_name.endswith("_inv") or scales.shape == tuple(-(-size // 128) for size in dense.shape):
            rows, columns = (torch.arange(size, device="cpu").div(128, rounding_mode="floor") for size in dense.shape)
            return dense * scales.index_select(0, rows).index_select(1, columns)
        return dense * (scales if scales.numel() == 1 else scales.reshape(-1, 1))

    @property
    def _files(self) -> dict[str, str]:
        return self._checkpoint.files

    def _tensor(self, name: str, number: int | None) -> Tensor:
        path = inside(self._checkpoint.directory, self._files[name])
        with torch.device("cpu"), safe_open(path, framework="pt", device="cpu") as file:
            stored: Tensor = file.get_tensor(name) if number is None else file.get_slice(name)[number]
        return stored.to(torch.float32)
