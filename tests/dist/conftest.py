"""Fixtures of the tests that start Ray."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_ray_is_left() -> Iterator[None]:
    """A module that leaves its process connected makes another one fail, whichever comes next."""
    yield
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        sys.modules["ray"].shutdown()
        pytest.fail("this module has left a Ray connection behind")


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One private Ray with two CPUs and no GPU for a module's tests: RayGroup and the commands join what is there."""
    import ray

    ray.init(
        address="local", num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=100 << 20,
        logging_level="error", log_to_driver=False, configure_logging=False,
    )  # fmt: skip
    yield
    ray.shutdown()
