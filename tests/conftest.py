"""Fixtures that several test folders share."""

from __future__ import annotations

from collections.abc import Iterator

import profiles
import pytest
import torch
from dist.pool import Pool

torch.set_num_threads(1)  # small tensors on few, shared cores: more threads only wait for each other
profiles.register()

# Files that take minutes, the longest first: a process that begins one of them last keeps the others waiting.
LONGEST = ("test_kernels", "test_torchrun", "test_cli", "test_ray_job", "test_layer_against_oracle", "test_ray_group")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Worker processes for distributed tests; they start at the first use."""
    with Pool() as workers:
        yield workers
