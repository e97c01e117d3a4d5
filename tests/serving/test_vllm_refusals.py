"""What of vLLM's layers and deployments is refused, and what is said where a version lacks something."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from experts import drawn
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm_server import PREFIX, blocks, experts_of, layer_of, load, loaded, place, run, server

from moe_dist.errors import ConfigError, InstallationError, UnsupportedError
from moe_dist.integrations.vllm import VLLM, register, served
from moe_dist.integrations.vllm.layer import MoeDistRoutedExperts

pytestmark = pytest.mark.stacks


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"swiglu_limit": 7.0}, "swiglu_limit = 7.0 is not computed here, only None"),
        ({"activation": "gelu"}, "activation gelu is not computed here"),
        ({"has_bias": True}, "has_bias = True"),
        ({"apply_router_weight_on_input": True}, "router weights are applied to inputs"),
        ({"params_dtype": torch.float16}, "in_dtype = torch.float16 is not computed here, only torch.bfloat16"),
        ({"quant_config": None}, "its format is no quantization, only vLLM's Fp8Config"),
        ({"quant_config": blocks(weight_block_size=[64, 128])}, r"weight_block_size is \[64, 128\], only \[128, 128\]"),
        ({"quant_config": blocks(weight_block_size=None)}, "weight_block_size is None"),
        ({"quant_config": Fp8Config(True, "static")}, "activation_scheme is static, only dynamic"),
        ({"quant_config": blocks(ignored_layers=[PREFIX])}, "the checkpoint leaves it unquantized"),
    ],
)
def test_what_is_not_computed_is_refused_when_the_layer_is_made(changes: dict[str, Any], said: str) -> None:
    with server(), pytest.raises(UnsupportedError, match=said) as refused:
        layer_of(**changes)
    assert str(refused.value).startswith(f"MOE_DIST_VLLM_BACKEND for layer {PREFIX} is not supported")


@pytest.mark.parametrize(
    ("parallel", "changes", "said"),
    [
        (place(ep=2, use_ep=True, dp_size=2, all2all_backend="deepep_low_latency"), {}, "deepep_low_latency is part"),
        (place(enable_eplb=True), {}, "experts are moved by EPLB"),
        (place(tp=2), {"intermediate_size": 320}, "slices of 160 cut blocks of 128"),
        (place(), {"moe_backend": "triton"}, "moe_backend = 'triton' is not computed here, only 'auto'"),
        (place(), {"is_lora_enabled": True}, "is_lora_enabled = True"),
    ],
)
def test_other_deployments_are_refused(parallel: Any, changes: dict[str, Any], said: str) -> None:
    with server(), pytest.raises(UnsupportedError, match=said):
        experts_of(parallel, **changes)


@pytest.mark.parametrize("name", ["triton", "cutlass", "flashinfer_cutlass", "deep_gemm"])
def test_without_a_hopper_gpu_the_fast_backends_say_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MoeDistRoutedExperts, "backend", name)
    with server(), pytest.raises(UnsupportedError, match=r"needs compute capability 9\.0, not None"):
        layer_of()


def test_a_model_s_own_routed_experts_are_refused() -> None:
    class OfAModel(RoutedExperts):
        pass

    with server(), pytest.raises(UnsupportedError, match="the model brings OfAModel, a RoutedExperts of its own"):
        layer_of(routed_experts_cls=OfAModel)


def test_weights_are_loaded_once() -> None:
    weights, x_TH, routing = drawn()
    with server() as config:
        layer = layer_of()
        with pytest.raises(ConfigError, match="or never were"):
            run(layer, config, x_TH, routing)
        loaded(layer, weights)
        experts = layer.routed_experts
        with pytest.raises(ConfigError, match="can't be loaded again in a running server"):
            load(experts, weights)
        with pytest.raises(ConfigError, match="can't be loaded again in a running server"):
            experts.quant_method.process_weights_after_loading(experts)
        experts.w2_weight = torch.nn.Parameter(experts.w2_weight.data.clone(), requires_grad=False)
        with pytest.raises(ConfigError, match="moved or replaced after they had been prepared"):
            run(layer, config, x_TH, routing)


def test_a_field_that_a_later_version_adds_is_refused_if_it_is_used() -> None:
    later = dataclasses.make_dataclass("FusedMoEConfig", [("new_clamp", float | None, None)], bases=(FusedMoEConfig,))
    with server():
        layer = experts_of(place())
        known = [field.name for field in dataclasses.fields(FusedMoEConfig) if field.init]
        plain = {name: getattr(layer.moe_config, name) for name in known}
        layer.moe_config = later(**plain)
        served.spec_of(layer, PREFIX, blocks())
        layer.moe_config = later(**plain, new_clamp=7.0)
        with pytest.raises(UnsupportedError, match=r"new_clamp = 7\.0 is unknown here"):
            served.spec_of(layer, PREFIX, blocks())


def test_what_can_t_be_registered_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_DIST_VLLM_BACKEND", "cutlas")
    with pytest.raises(ConfigError, match="no backend has this name; did you mean cutlass"):
        register()
    monkeypatch.setenv("MOE_DIST_VLLM_BACKEND", "torch")
    monkeypatch.setitem(op_registry_oot, "RoutedExperts", int)
    with pytest.raises(ConfigError, match=r"another plugin has put builtins\.int in the place of vLLM's RoutedExperts"):
        register()
    monkeypatch.delattr(RoutedExperts, "_get_quant_method")
    said = rf"vllm {VLLM.installed()} has no .*RoutedExperts\._get_quant_method; .* checked against vllm 0\.33\.0"
    with pytest.raises(InstallationError, match=said):
        register()
