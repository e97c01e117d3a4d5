"""Our layer in vLLM's registry of out-of-tree layers."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from moe_dist.backends import BACKENDS
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.integrations.vllm import VARIABLE, VLLM

LAYERS = "vllm.model_executor.layers"
MOE = f"{LAYERS}.fused_moe"
METHOD = "FusedMoEMethodBase"
NAME = "RoutedExperts"


def check_interfaces() -> None:
    """Raises InstallationError for the first that this version of vLLM lacks of what layer and method use."""
    needed = VLLM.needed
    needed("vllm.model_executor.custom_op", "op_registry_oot")
    needed(f"{MOE}.routed_experts", f"{NAME}.register_oot")
    needed(f"{MOE}.routed_experts", f"{NAME}._get_quant_method", "prefix", "quant_config", "moe_config")
    needed(f"{MOE}.routed_experts", f"{NAME}.weight_loader")
    needed(f"{MOE}.routed_experts", "FusedMoeWeightScaleSupported.BLOCK")
    applied = ("layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input")
    needed(f"{MOE}.fused_moe_method_base", f"{METHOD}.apply", *applied)
    needed(f"{MOE}.fused_moe_method_base", f"{METHOD}.process_weights_after_loading", "layer")
    sizes = ("num_experts", "hidden_size", "intermediate_size_per_partition", "params_dtype")
    needed(f"{MOE}.fused_moe_method_base", f"{METHOD}.create_weights", "layer", *sizes, "extra_weight_attrs")
    needed(f"{MOE}.config", "FusedMoEConfig")
    needed(f"{MOE}.activation", "MoEActivation.SILU")
    needed(f"{LAYERS}.quantization.fp8", "Fp8Config")
    needed(f"{LAYERS}.quantization.utils.quant_utils", "is_layer_skipped", "prefix", "ignored_layers")
    needed("vllm.model_executor.utils", "set_weight_attrs", "weight", "weight_attrs")


def register_layer(backend: str) -> None:
    """See moe_dist.integrations.vllm.register."""
    BACKENDS.get(backend)  # raises for an unknown name
    check_interfaces()
    from vllm.logger import init_logger
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from moe_dist.integrations.vllm.layer import MoeDistRoutedExperts

    taken = op_registry_oot.get(NAME)
    if taken is MoeDistRoutedExperts:
        return
    if taken is not None:
        rule = f"another plugin has put {taken.__module__}.{taken.__name__} in the place of vLLM's {NAME}"
        raise ConfigError(VARIABLE, backend, rule, "one of the two, chosen with VLLM_PLUGINS")
    MoeDistRoutedExperts.backend = backend
    RoutedExperts.register_oot(MoeDistRoutedExperts)
    # The registry goes by the name of a class, so a model's own subclass would run by vLLM's kernels unasked.
    RoutedExperts._get_quant_method = _refused
    init_logger(f"vllm.plugins.{__name__}").info(
        "moe_dist %s: FP8 experts run by its backend %s (%s, vLLM %s)",
        version("moe_dist"), backend, VARIABLE, VLLM.installed(),
    )  # fmt: skip


def _refused(self: Any, prefix: str, quant_config: Any, moe_config: Any) -> Any:
    """Instead of RoutedExperts._get_quant_method."""
    reason = f"the model brings {type(self).__name__}, a {NAME} of its own"
    raise UnsupportedError(f"{VARIABLE} for layer {prefix}", [reason], NAME)
