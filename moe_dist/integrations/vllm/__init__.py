"""Our backends under vLLM's FP8 experts: an out-of-tree RoutedExperts layer. `register` is what the entry-point group
`vllm.general_plugins` calls in each of vLLM's processes. docs/integration.md says what is served."""

from __future__ import annotations

import os

from moe_dist.integrations.package import Package

VLLM = Package("vllm", ("0.33.0",))
VARIABLE = "MOE_DIST_VLLM_BACKEND"


def register() -> None:
    """Put our layer in the place of vLLM's RoutedExperts, if MOE_DIST_VLLM_BACKEND names a backend; without that
    nothing changes. Again in the same process it does nothing.

    Raises ConfigError for a name that no backend has, and where another plugin has taken that place; InstallationError
    where vLLM lacks an interface. vLLM does not start then.
    """
    backend = os.environ.get(VARIABLE, "")
    if not backend:
        return
    from moe_dist.integrations.vllm.registering import register_layer

    register_layer(backend)
