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
        if f"{fused}_blocks" in self._files:  # rows of gate and up in turns
            both = self._of_four_bits(fused, number)
            return both[0::2], both[1::2], self._of_four_bits(f"{self._module}.experts.down_proj", number)
        if fused not in self._files:
            return self._named(f"{self._module}.experts.{number}")
        both, down = self._matrix(fused, number), self._matrix(f"{self._module}.experts.down_proj", number)
        if self._names.fused == "interleaved":  # [H, 2I] with gate and up in turns, and [I, H]
            return both.T[0::2], both.T[1::2], down.T
        width = self._checkpoint.config.spec.intermediate
        if (both.shape[1], down.shape[0]) == (2 * width, width):  # transposed
            both, down = both.T, down.T
        middle = both.shape[0] // 2
        return both[:middle], both[middle:], down

    def biases(self, number: int) -> tuple[Tensor, Tensor] | None:
        """Of an expert: gate's and up's [2I] one behind the other, and down's [H], in float32, on the CPU; None where
        experts have none."""
        first, second = (f"{self._module}.experts.{name}_bias" for name in ("gate_up_proj", "down_proj"))
        if first not in self._files:
            return None
        both = self._tensor(first, number)
        return torch.cat([both[0::2], both[1::2]]), self._tensor(second, number)

    def shared(self) -> tuple[Tensor, Tensor, Tensor]:
        """The shared expert, likewise."""
        return self._named(f"{self._module}.{self._names.shared}")

    def token_gate(self) -> Tensor | None:
        """The weight [H] of the shared expert's gate in float32, on the CPU; None where it isn't gated."""
        name = f"{self._module}.{self._names.shared_gate}"
        return self._tensor(name, None).flatten() if name in self._files else None

    def router(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The router's weight [E, H] and, where there are such, its correction bias [E] and that of its logits [E], in
        float32, on the CPU."""
        gate = self._tensor(f"{self._module}.{self._names.router}", None)
        biases = [f"{self._module}.{name}" for name in (self._names.bias, self._names.logit_bias)]
        of_scores, of_logits = (self._tensor(name, None).flatten() if name in self._files else None for name in biases)
        return gate, of_scores, of_logits

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

    def _of_four_bits(self, name: str, number: int) -> Tensor:
        """A matrix [N, K] in MXFP4: sign, two bits of exponent and one of mantissa; 32 have one power of two."""
        pairs, powers = (self._tensor(f"{name}{end}", number) for end in ("_blocks", "_scales"))
        high = pairs.div(16, rounding_mode="floor")
        codes = torch.stack([pairs - 16 * high, high], -1).flatten(1)  # the lower half of a byte comes first
        size = codes % 8
        exponent, half = size.div(2, rounding_mode="floor"), size % 2 / 2
        values = torch.where(exponent == 0, half, (1 + half) * 2.0 ** (exponent - 1))
        return torch.where(codes < 8, values, -values) * (2.0 ** (powers - 127)).repeat_interleave(32, 1)

    @property
    def _files(self) -> dict[str, str]:
        return self._checkpoint.files

    def _tensor(self, name: str, number: int | None) -> Tensor:
        path = inside(self._checkpoint.directory, self._files[name])
        with torch.device("cpu"), safe_open(path, framework="pt", device="cpu") as file:
            stored: Tensor = file.get_tensor(name) if number is None else file.get_slice(name)[number]
        return stored.to(torch.float32)
