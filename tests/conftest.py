"""Fixtures that several test folders share."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

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


@pytest.fixture
def stand_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A "graph" whose replay runs the step again; what can't be captured on a CPU is."""
    from moe_dist.engine import graph
    from moe_dist.engine.layer import MoELayer
    from moe_dist.step import Support

    def capture(call: Any, warm_up: Any) -> Any:
        warm_up()
        result = call()
        return SimpleNamespace(replay=lambda: result.copy_(call())), result

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(MoELayer, "capturable", Support(True))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Worker processes for distributed tests; they start at the first use."""
    with Pool() as workers:
        yield workers
