"""Arithmetic on sizes, in plain integers: it runs between launches, where Triton's own costs some 2 us a call."""

from __future__ import annotations

import math

from torch import Tensor


def cdiv(count: int, size: int) -> int:
    """How many pieces of `size` hold `count`."""
    return -(-count // size)


def power_of_2(count: int) -> int:
    """The least that is not below `count`, and at least 1."""
    return 1 << max(0, count - 1).bit_length()


def row_bytes(rows: Tensor) -> int:
    """Of one row [1, ...]; there need not be any."""
    return math.prod(rows.shape[1:]) * rows.itemsize
