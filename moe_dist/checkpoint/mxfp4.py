"""MXFP4, as gpt-oss is published: two numbers of four bits (E2M1) in a byte, the lower one first, and one power of two
(E8M0) for each 32 of a row. Open Compute Project, Microscaling Formats (MX) 1.0, section 5; which half comes first is
as in integrations/mxfp4.py of transformers. bf16 holds every such number below 2^128 exactly, so a layer is read as
bf16; larger ones, which no layer can have, become infinite."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP, BYTES = 32, 16  # numbers that share a scale, and their bytes
BLOCKS, SCALES = "_blocks", "_scales"  # behind the name of a matrix
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by its lower three bits; the fourth is the sign
BIAS = 127  # of the exponents


def unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """bf16 [..., 32 G] of bytes [..., G, 16] and exponents [..., G]. An exponent of 255 is no number and makes none."""
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.bfloat16, device="cpu")
    byte = torch.arange(256, device="cpu")
    # Both numbers of a byte at once, as one word: several times as fast as number by number.
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], -1).view(torch.int32).flatten()
    dense = pairs.index_select(0, blocks.flatten().int()).view(torch.bfloat16).view(*scales.shape, GROUP)
    powers = torch.exp2(scales.float() - BIAS).masked_fill(scales == 255, torch.nan).bfloat16()
    return dense.mul_(powers[..., None]).flatten(-2)
