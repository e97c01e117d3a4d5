"""Hooks of SGLang by which its FP8 experts reach a registered runner core. Without them SGLang 0.5.23 makes no runner
for a name that it does not know itself, and a layer that is not FP8 runs by its own Triton kernels unasked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
from sglang.srt.layers.moe.utils import get_moe_runner_backend
from sglang.srt.runtime_context import get_exec, get_server_args

from moe_dist.backends import BACKENDS
from moe_dist.errors import UnsupportedError
from moe_dist.integrations.sglang import PREFIX, SGLANG
from moe_dist.integrations.sglang.core import loads_by
from moe_dist.model.spec import BLOCK

logger = logging.getLogger(__name__)


def ours(backend: Any) -> bool:
    """Whether one of SGLang's runner backends, or None, is one of those that we have registered."""
    return backend is not None and str(backend.value).startswith(PREFIX)


def create_moe_runner(original: Callable[..., None], method: Any, layer: Any, moe_runner_config: Any) -> None:
    """Around Fp8MoEMethod.create_moe_runner, which comes behind create_weights and before any weight is loaded. Raises
    UnsupportedError for formats that are not served."""
    original(method, layer, moe_runner_config)
    backend = get_moe_runner_backend()
    if not ours(backend):
        return
    name = backend.value.removeprefix(PREFIX)
    up_first = BACKENDS.get(name).gate_first is False
    if reasons := _against(method, layer, up_first):
        raise UnsupportedError(f"--moe-runner-backend {backend.value} for {_place(layer)}", reasons)
    if method.runner is None:
        method.runner = MoeRunner(backend, moe_runner_config)
    method.load_up_proj_weight_first = up_first  # SGLang's loader heeds it, in later updates of weights too
    _say(name, backend.value)


def apply(original: Callable[..., Any], method: Any, layer: Any, dispatch_output: Any) -> Any:
    """Around Fp8MoEMethod.apply."""
    if method.runner is None or not ours(method.runner.runner_backend):
        return original(method, layer, dispatch_output)
    return method.runner.run(dispatch_output, method.get_triton_quant_info(layer))


def weights_were_loaded(result: None, method: Any, layer: Any) -> None:
    """After Fp8MoEMethod.process_weights_after_loading: what can't run is refused now, and what must be built is."""
    if method.runner is not None and ours(method.runner.runner_backend):
        method.runner.runner_core.prepare(method.get_triton_quant_info(layer))


def layer_was_made(result: None, layer: Any, *arguments: Any, **named: Any) -> None:
    """After FusedMoE.__init__. Raises UnsupportedError where another runner than the one asked for has the layer."""
    given, resolved = str(get_server_args().moe_runner_backend), get_exec().moe.moe_runner_backend
    if given.startswith(PREFIX) and given != resolved:  # as for some quantizations, with a warning
        reason = f"SGLang takes {resolved} instead, for this model and these flags"
        raise UnsupportedError(f"--moe-runner-backend {given} for {_place(layer)}", [reason])
    asked = get_moe_runner_backend()
    if ours(asked) and not ours(layer.runner_backend):
        method = type(layer.quant_method).__name__
        reason = f"{method} has no use for it and took {getattr(layer.runner_backend, 'value', 'its own kernels')}"
        served = "FP8 in blocks by Fp8MoEMethod; --speculative-moe-runner-backend is for draft models"
        raise UnsupportedError(f"--moe-runner-backend {asked.value} for {_place(layer)}", [reason], served)


def _against(method: Any, layer: Any, up_first: bool) -> list[str]:
    config, block = method.quant_config, list(method.weight_block_size or ())
    loader = getattr(getattr(layer, "w13_weight", None), "weight_loader", None)
    reasons = {
        f"weight_block_size is {block or None}, only [{BLOCK}, {BLOCK}] is served": block != [BLOCK, BLOCK],
        f"activation_scheme is {config.activation_scheme}, only dynamic is served": (
            config.activation_scheme != "dynamic"
        ),
        "experts are MXFP8": method.use_mxfp8,
        "experts are FP4": method.is_fp4_expert,
        f"its kernel wants [up; gate], and {type(loads_by(layer)).__name__} loads the weights": (
            up_first and loads_by(layer) is not method
        ),
        "experts have biases": getattr(layer, "with_bias", False),
        "weights are not FP8 in the checkpoint": not config.is_checkpoint_fp8_serialized,
        "its kernel wants [up; gate], which SGLang's loader of fused experts does not write": (
            up_first and getattr(loader, "__name__", "") == "weight_loader_fused"
        ),
    }
    return [reason for reason, holds in reasons.items() if holds]


def _place(layer: Any) -> str:
    return f"layer {getattr(layer, 'layer_name', '') or getattr(layer, 'layer_id', '')}"


@cache
def _say(name: str, asked: str) -> None:
    """Once a process."""
    logger.info(
        "moe_dist %s: FP8 experts run by its backend %s (--moe-runner-backend %s, SGLang %s)",
        version("moe_dist"), name, asked, SGLANG.installed(),
    )  # fmt: skip
