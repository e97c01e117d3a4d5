"""What of SGLang's layers, flags and steps is refused, and what is said where a version lacks something."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from experts import TOLERANCE, drawn, error, expected
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang_server import layer_of, loaded, run, server

from moe_dist.errors import ConfigError, InstallationError, UnsupportedError
from moe_dist.integrations.package import Package
from moe_dist.integrations.sglang import SGLANG, core, register
from moe_dist.model.routing import Routing

pytestmark = pytest.mark.stacks


def test_replaced_weights_are_named() -> None:
    weights, x_TH, routing = drawn()
    with server():
        layer = loaded(layer_of(), weights)
        layer.w2_weight = torch.nn.Parameter(layer.w2_weight.data.clone(), requires_grad=False)
        with pytest.raises(ConfigError, match="replaced after they had been prepared"):
            run(layer, x_TH, routing)
        layer.quant_method.process_weights_after_loading(layer)
        assert error(run(layer, x_TH, routing), expected(weights, x_TH, routing)) < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"swiglu_limit": 7.0}, "swiglu_limit = 7.0 is not computed here, only None"),
        ({"gemm1_alpha": 1.7}, "gemm1_alpha = 1.7 is not computed here"),
        ({"gemm1_clamp_limit": 7.0}, "gemm1_clamp_limit = 7.0"),
        ({"activation": "gelu"}, "activation gelu with a gate is not computed here"),
        ({"is_gated": False}, "activation silu without a gate"),
        ({"apply_router_weight_on_input": True}, "apply_router_weight_on_input = True"),
        ({"no_combine": True}, "no_combine = True"),
        ({"params_dtype": torch.float16}, "params_dtype = torch.float16 is not computed here, only torch.bfloat16"),
        ({"with_bias": True}, "experts have biases"),
        ({"quant_config": None}, "UnquantizedFusedMoEMethod has no use for it and took triton"),
    ],
)
def test_what_is_not_computed_is_refused_when_the_layer_is_made(changes: dict[str, Any], said: str) -> None:
    with server(), pytest.raises(UnsupportedError, match=said) as refused:
        layer_of(**changes)
    assert "moe_dist_torch for layer" in str(refused.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"weight_block_size": [64, 128]}, r"weight_block_size is \[64, 128\], only \[128, 128\]"),
        ({"weight_block_size": None}, "weight_block_size is None"),
        ({"weight_block_size": None, "activation_scheme": "static"}, "activation_scheme is static, only dynamic"),
    ],
)
def test_other_formats_are_refused_when_the_layer_is_made(config: dict[str, Any], said: str) -> None:
    given = {"is_checkpoint_fp8_serialized": True, "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    with server(), pytest.raises(UnsupportedError, match=said):
        layer_of(quant_config=Fp8Config(**(given | config)))


@pytest.mark.parametrize("name", ["triton", "cutlass", "flashinfer_cutlass", "deep_gemm"])
def test_without_a_hopper_gpu_the_fast_backends_say_so(name: str) -> None:
    with server(f"moe_dist_{name}"), pytest.raises(UnsupportedError, match=r"needs compute capability 9\.0, not None"):
        layer_of()


def test_other_exchanges_are_refused() -> None:
    with server(moe_a2a_backend="deepep"), pytest.raises(UnsupportedError, match="--moe-a2a-backend deepep hands over"):
        layer_of()


def test_a_choice_that_sglang_overrides_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does under --quantization mxfp8, with a warning in the log."""
    from moe_dist.integrations.sglang import hooks

    monkeypatch.setattr(hooks, "get_server_args", lambda: SimpleNamespace(moe_runner_backend="moe_dist_cutlass"))
    with server("triton"), pytest.raises(UnsupportedError, match=r"moe_dist_cutlass .* SGLang takes triton instead"):
        layer_of()


def test_streams_at_once_are_refused() -> None:
    with server(enable_pdmux=True), pytest.raises(UnsupportedError, match="--enable-pdmux runs prefill and decode"):
        layer_of()


def test_forms_of_a_step_that_are_not_served() -> None:
    weights, x_TH, routing = drawn()
    with server():
        layer = loaded(layer_of(), weights)
        topk = StandardTopKOutput(routing.weights_TK, routing.ids_TK, torch.empty(0))
        given, runner = layer.dispatcher.dispatch(x_TH, topk), layer.runner.runner_core
        info = layer.quant_method.get_triton_quant_info(layer)
        with pytest.raises(UnsupportedError, match="LoRA"):
            runner.run_from_dispatch(given, info, runner.config, hooks=object())
        with pytest.raises(UnsupportedError, match="quantized hidden_states"):
            runner.run_from_dispatch(given._replace(hidden_states_scale=torch.ones(1)), info, runner.config)
        with pytest.raises(ConfigError, match=r"x\.dtype"):
            run(layer, x_TH.half(), routing)
        with pytest.raises(ConfigError, match=r"routing\.ids = \(7, 1\): wrong shape"):
            run(layer, x_TH, Routing(routing.ids_TK[:, :1], routing.weights_TK[:, :1]))


def test_a_field_that_a_later_version_adds_is_refused_if_it_is_used() -> None:
    later = dataclasses.make_dataclass(
        "MoeRunnerConfig", [("new_clamp", float | None, None)], bases=(type(layer_config()),)
    )
    plain = {field.name: getattr(layer_config(), field.name) for field in dataclasses.fields(layer_config())}
    with server():
        core._spec(later(**plain), "moe_dist_torch")
        with pytest.raises(UnsupportedError, match=r"new_clamp = 7\.0 is unknown here"):
            core._spec(later(**plain, new_clamp=7.0), "moe_dist_torch")


def layer_config() -> Any:
    with server():
        return layer_of().moe_runner_config


def test_a_version_without_an_interface_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.moe.moe_runner import runner

    from moe_dist.integrations.sglang import registering

    monkeypatch.setattr(registering, "_registered", [])
    monkeypatch.delattr(runner, "register_moe_runner_core")
    said = rf"sglang {SGLANG.installed()} has no .*\.register_moe_runner_core; .* checked against sglang 0\.5\.23"
    with pytest.raises(InstallationError, match=said):
        register()
    assert registering._registered == []


def test_a_changed_signature_is_named() -> None:
    with pytest.raises(InstallationError, match=r"has no .*run of \(dispatch, info\), it has one of \(self, dispatch"):
        SGLANG.needed("sglang.srt.layers.moe.moe_runner.runner", "MoeRunner.run", "dispatch", "info")
    with pytest.raises(InstallationError, match=r"has no module sglang\.srt\.nothing"):
        SGLANG.needed("sglang.srt.nothing", "Nothing")
    with pytest.raises(InstallationError, match="the package nosuchstack is not installed"):
        Package("nosuchstack", ("1",)).needed("nosuchstack.part", "Part")
