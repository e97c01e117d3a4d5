"""Random numbers for everything that is drawn here: one stream for each purpose and key, and no two share a key."""

from __future__ import annotations

import hashlib
import math
import operator

import numpy as np
import torch
from torch import Tensor

Key = int | str


class Stream:
    """Numbers drawn for one purpose, such as `Stream("expert weights", seed, layer, expert)`.

    The stream follows from a hash of the purpose and its key, so that streams of neighbouring seeds, layers or experts
    have nothing in common: sums and products of such numbers meet each other sooner or later. On a CPU it is numpy's
    Philox with a key of 128 bits (torch's own generator there takes 32 bits of a seed), on a GPU torch's Philox with
    one of 63 bits. Both devices give the same distribution, not the same numbers. Every tensor is on `device`, and
    float32 where it is not said otherwise, whatever torch's defaults are.
    """

    def __init__(self, purpose: str, *key: Key, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        plain = tuple(part if isinstance(part, str) else operator.index(part) for part in key)  # numpy's 3 is 3
        digest = hashlib.sha256(repr((purpose, *plain)).encode()).digest()
        if self.device.type == "cpu":
            self._numpy = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        else:
            self._torch = torch.Generator(self.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def normal(self, *shape: int) -> Tensor:
        """Standard Gaussian."""
        if self.device.type == "cpu":
            return torch.from_numpy(self._numpy.standard_normal(shape, dtype=np.float32))
        return torch.randn(shape, generator=self._torch, device=self.device, dtype=torch.float32)

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1)."""
        if self.device.type == "cpu":
            return torch.from_numpy(self._numpy.random(shape, dtype=np.float32))
        return torch.rand(shape, generator=self._torch, device=self.device, dtype=torch.float32)

    def gumbel(self, *shape: int) -> Tensor:
        """Standard Gumbel: the k largest of log-odds plus these are k draws without replacement by those odds."""
        tiny = torch.finfo(torch.float32).tiny
        return -(-self.uniform(*shape).clamp_min(tiny).log()).clamp_min(tiny).log()

    def permutation(self, count: int) -> Tensor:
        """0 to count - 1 in random order, int64."""
        if self.device.type == "cpu":
            return torch.from_numpy(self._numpy.permutation(count).astype(np.int64, copy=False))
        return torch.randperm(count, generator=self._torch, device=self.device)

    def integers(self, stop: int, *shape: int) -> Tensor:
        """Each of 0 to stop - 1 equally often, int64."""
        if self.device.type == "cpu":
            return torch.from_numpy(self._numpy.integers(stop, size=math.prod(shape)).reshape(shape))
        return torch.randint(stop, shape, generator=self._torch, device=self.device)
