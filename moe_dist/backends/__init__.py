"""How a rank computes the weighted partial sum of the experts it holds."""

from moe_dist.backends.base import Backend, Problem
from moe_dist.registry import Registry

BACKENDS: Registry[Backend] = Registry("backend", {"torch": "moe_dist.backends.torch_reference:TorchBackend"})

__all__ = ["BACKENDS", "Backend", "Problem"]
