"""SGLang's runner core: its dispatch output and weights to one of our backends."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.moe_runner.base import DispatchMoeRunnerCore
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.layers.moe.utils import RegisteredMoeRunnerBackend, get_moe_a2a_backend
from sglang.srt.runtime_context import get_disagg
from torch import Tensor

from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.integrations.local_experts import LocalExperts, backend_for, problem_of
from moe_dist.integrations.package import unexpected
from moe_dist.integrations.sglang import PREFIX
from moe_dist.model.spec import BLOCK, MoESpec
from moe_dist.model.weights import ExpertWeights

ACTIVATIONS = {("silu", True): "swiglu", ("relu2", False): "relu2"}  # by name and whether there is a gate
# Fields of MoeRunnerConfig that must have this value, and those that say nothing about what is computed.
PLAIN = {
    "apply_router_weight_on_input": False,
    "no_combine": False,
    "no_combine_keep_router_weight": False,
    "gemm1_alpha": None,
    "gemm1_beta": None,
    "gemm1_clamp_limit": None,
    "swiglu_limit": None,
    "silu_mul_keep_fp32": False,
    "use_tp_all_gather_activation": False,
    "params_dtype": torch.bfloat16,
}
OF_NO_ACCOUNT = frozenset(
    {
        *("num_experts", "num_local_experts", "hidden_size", "intermediate_size_per_partition", "layer_id", "top_k"),
        *("num_fused_shared_experts", "routing_method_type", "runner_backend", "activation", "is_gated", "inplace"),
        *("routed_scaling_factor", "gate_up_interleaved", "layer"),  # interleaved: of clamped activations alone
    }
)
# The same of TritonMoeQuantInfo.
PLAIN_INFO = {"use_fp8_w8a8": True, "block_shape": [BLOCK, BLOCK]}
WEIGHTS = frozenset({"w13_weight", "w2_weight", "w13_scale", "w2_scale"})


class MoeDistRunnerCore(DispatchMoeRunnerCore):
    """Takes tokens as SGLang's standard dispatcher leaves them: local slots, -1 for a pair of another rank. Gives this
    rank's weighted sums, the routed scaling included, as SGLang's own cores do; SGLang adds them up over the ranks.

    Raises UnsupportedError for a layer that the backend does not compute, as soon as SGLang makes it.
    """

    def __init__(self, config: Any, backend: str) -> None:
        super().__init__(config)
        self.backend = backend
        self.spec = _spec(config, PREFIX + backend)
        self._experts: LocalExperts | None = None
        device = config.layer.w13_weight.device  # weights come before runners
        backend_for(backend, problem_of(self.spec, config.num_local_experts, device))

    @property
    def runner_backend(self) -> Any:
        return RegisteredMoeRunnerBackend(PREFIX + self.backend)

    def prepare(self, quant_info: Any) -> None:
        """After weights were loaded, and whenever they were loaded again. Raises UnsupportedError or ConfigError for
        weights of another form."""
        if reasons := unexpected(quant_info, PLAIN_INFO, WEIGHTS):
            raise UnsupportedError(f"the weights of {type(quant_info).__name__}", reasons)
        up_first = getattr(loads_by(self.config.layer), "load_up_proj_weight_first", False)
        w13, w2, s13, s2 = (tensor.detach() for tensor in _tensors(quant_info))
        weights = ExpertWeights("fp8_block", self.spec.gated, w13, w2, s13, s2, gate_first=not up_first)
        self._experts = LocalExperts(self.backend, self.spec, weights)

    def run_from_dispatch(
        self, dispatch_output: Any, quant_info: Any, runner_config: Any, hooks: Any = None
    ) -> StandardCombineInput:
        """hidden_states [T, H] bf16 with their top-k [T, K] to [T, H] bf16."""
        if hooks is not None:
            raise UnsupportedError(f"LoRA of experts with {PREFIX}{self.backend}", ["it has no hooks for it"])
        topk = dispatch_output.topk_output
        if not dispatch_output.format.is_standard() or not TopKOutputChecker.format_is_standard(topk):
            what = f"dispatch {dispatch_output.format.value} with {type(topk).__name__}"
            raise UnsupportedError(what, [f"{PREFIX}{self.backend} takes the standard form of both"], "standard")
        if dispatch_output.hidden_states_scale is not None:
            raise UnsupportedError("quantized hidden_states", [f"{PREFIX}{self.backend} quantizes them itself"])
        if self._experts is None or not self._experts.reads(*_tensors(quant_info)):
            rule = "the weights were replaced after they had been prepared, or never were"
            raise ConfigError("quant_info", type(quant_info).__name__, rule, "process_weights_after_loading")
        weights_TK, scaling = topk.topk_weights, self._scaling()
        if scaling != 1.0:
            weights_TK = weights_TK.float() * scaling
        return StandardCombineInput(
            hidden_states=self._experts(dispatch_output.hidden_states, topk.topk_ids, weights_TK)
        )

    def _scaling(self) -> float:
        """What the weights still lack: some of SGLang's routers have it in already."""
        factor = self.config.routed_scaling_factor
        if factor is None or getattr(self.config.layer, "should_fuse_routed_scaling_factor_in_topk", False):
            return 1.0
        return float(factor)


def _spec(config: Any, name: str) -> MoESpec:
    reasons = unexpected(config, PLAIN, OF_NO_ACCOUNT)
    activation = ACTIVATIONS.get((config.activation, config.is_gated))
    if activation is None:
        gate = "with" if config.is_gated else "without"
        reasons.append(f"activation {config.activation} {gate} a gate is not computed here")
    if not get_moe_a2a_backend().is_none():
        reasons.append(f"--moe-a2a-backend {get_moe_a2a_backend().value} hands over other forms of rows, only none")
    if get_disagg().enable_pdmux:
        reasons.append("--enable-pdmux runs prefill and decode at once, and they would share one scratch")
    if config.layer is None:
        reasons.append("the config names no layer")
    if reasons or activation is None:
        raise UnsupportedError(f"--moe-runner-backend {name} for layer {config.layer_id}", reasons)
    return MoESpec(
        name="sglang",
        hidden=config.hidden_size,
        intermediate=config.intermediate_size_per_partition,
        num_experts=config.num_experts,
        top_k=config.top_k,
        activation=activation,
        quant="fp8_block",
    )


def loads_by(layer: Any) -> Any:
    """The method whose order of gate and up SGLang's loader follows."""
    return getattr(layer, "weight_load_method", None) or layer.quant_method


def _tensors(quant_info: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return quant_info.w13_weight, quant_info.w2_weight, quant_info.w13_scale, quant_info.w2_scale
