"""A Ray of a test's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def private_ray(num_cpus: int = 2, num_gpus: int = 0) -> Iterator[None]:
    import ray

    ray.init(
        address="local", num_cpus=num_cpus, num_gpus=num_gpus, include_dashboard=False,
        object_store_memory=100 << 20, logging_level="error", log_to_driver=False, configure_logging=False,
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()
