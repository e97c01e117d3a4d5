"""How quantized weights are stored, and what is computed with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_dist.model.spec import QuantKind

Grain = Literal["block", "channel", "tensor", "mxfp4"]


@dataclass(frozen=True)
class Scheme:
    """`grain`: what of a stored matrix [N, K] has a scale of its own: each 128×128 block ([ceil(N/128), ceil(K/128)]),
    each output row ([N, 1] or [N]) or all of it (one number). The scale multiplies, whatever its name says.
    `suffix`: what a scale's name has behind that of its weight. `kind`: what is computed. With fp8_tensor_static each
    matrix has an input_scale beside it, one number, the scale of its input rows. mxfp4.py has the grain mxfp4, of which
    bf16 weights are made."""

    kind: QuantKind
    grain: Grain
    suffix: Literal["_scale_inv", "_scale", "_scales"]

    @property
    def static(self) -> bool:
        return self.kind == "fp8_tensor_static"


FP8_BLOCKS = Scheme("fp8_block", "block", "_scale_inv")
MXFP4 = Scheme("none", "mxfp4", "_scales")
