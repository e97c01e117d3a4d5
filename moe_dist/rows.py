"""What travels between an exchange and a backend, and how both answer whether they can do a thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from moe_dist.quantization import Activations


@dataclass(frozen=True)
class TokenRows:
    """R token rows for one rank. `x` is [R, H] or quantized rows; `slots_RK` int32 local slots, -1 = not here;
    `weights_RK` float32. A row may come with no slot at all (padding, or a token that is only gathered here)."""

    x: Activations
    slots_RK: Tensor
    weights_RK: Tensor


class Support(NamedTuple):
    """`reason` says why not, or, if ok, what to know."""

    ok: bool
    reason: str = ""
