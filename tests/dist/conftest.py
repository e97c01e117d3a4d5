"""Fixtures of the tests that start Ray."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from private_ray import private_ray


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
    with private_ray():
        yield
