"""Fixtures that several test folders share."""

from __future__ import annotations

from collections.abc import Iterator

import profiles
import pytest
import torch
from dist.pool import Pool

torch.set_num_threads(1)  # small tensors on few, shared cores: more threads only wait for each other
profiles.register()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Worker processes for distributed tests; they start at the first use."""
    with Pool() as workers:
        yield workers
