"""What of SGLang is used, each with the parameters that it is called with: looked up before anything is registered."""

from __future__ import annotations

from types import SimpleNamespace

from moe_dist.integrations.sglang import SGLANG

MOE = "sglang.srt.layers.moe"
RUNNER, BASE, UTILS = f"{MOE}.moe_runner.runner", f"{MOE}.moe_runner.base", f"{MOE}.utils"
FP8, LAYER = "sglang.srt.layers.quantization.fp8", f"{MOE}.fused_moe_triton.layer"
HOOKS = "sglang.srt.plugins.hook_registry"
# Methods that get hooks.
CREATE, APPLY = f"{FP8}.Fp8MoEMethod.create_moe_runner", f"{FP8}.Fp8MoEMethod.apply"
LOADED, INIT = f"{FP8}.Fp8MoEMethod.process_weights_after_loading", f"{LAYER}.FusedMoE.__init__"


def interfaces() -> SimpleNamespace:
    """What `register` calls. Raises InstallationError for the first that this version of SGLang lacks, of these and of
    what hooks and runner core use."""
    needed = SGLANG.needed
    needed(HOOKS, "HookRegistry.register", "target", "hook", "hook_type")
    needed(RUNNER, "MoeRunner.run", "dispatch_output", "quant_info")
    dispatched = ("dispatch_output", "quant_info", "runner_config", "hooks")
    needed(BASE, "DispatchMoeRunnerCore.run_from_dispatch", *dispatched)
    needed(f"{MOE}.token_dispatcher.standard", "StandardCombineInput", "hidden_states")
    needed(f"{MOE}.topk", "TopKOutputChecker.format_is_standard")
    needed(UTILS, "RegisteredMoeRunnerBackend", "value")
    for name in ("get_moe_runner_backend", "get_moe_a2a_backend"):
        needed(UTILS, name)
    for name in ("get_disagg", "get_exec", "get_server_args"):
        needed("sglang.srt.runtime_context", name)
    needed(FP8, "Fp8MoEMethod.create_moe_runner", "layer", "moe_runner_config")
    needed(FP8, "Fp8MoEMethod.apply", "layer", "dispatch_output")
    needed(FP8, "Fp8MoEMethod.process_weights_after_loading", "layer")
    needed(FP8, "Fp8MoEMethod.get_triton_quant_info", "layer")
    needed(LAYER, "FusedMoE.__init__")
    return SimpleNamespace(
        hook=needed(HOOKS, "HookRegistry.register"),
        around=needed(HOOKS, "HookType.AROUND"),
        after=needed(HOOKS, "HookType.AFTER"),
        register_core=needed(RUNNER, "register_moe_runner_core", "backend_name", "factory"),
        add_choices=needed("sglang.srt.server_args", "add_moe_runner_backend_choices"),
    )
