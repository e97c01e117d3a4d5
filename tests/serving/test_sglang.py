"""SGLang's own registries, hooks, config, layer, loader and dispatcher with our runner core in them, on a CPU by the
reference backend. Its CUDA kernels and the packages that it only imports are not there."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from experts import SPEC, TOLERANCE, drawn, error, expected, pieces
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner.runner import _CUSTOM_RUNNER_CORE_FACTORIES
from sglang.srt.layers.moe.token_dispatcher import standard
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import get_moe_runner_backend, initialize_moe_config
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import get_context, get_parallel
from sglang.srt.server_args import MOE_RUNNER_BACKEND_CHOICES, ServerArgs

from moe_dist.backends import BACKENDS
from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.errors import ConfigError, InstallationError, UnsupportedError
from moe_dist.integrations.package import Package
from moe_dist.integrations.sglang import SGLANG, core, register
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.spec import ParallelSpec
from moe_dist.model.weights import shard

pytestmark = pytest.mark.stacks

load_plugins()  # SGLang's own: by the entry point of this package

BLOCKS = Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="dynamic", weight_block_size=[128, 128])
PLACE = {"moe_tp_size": 1, "moe_tp_rank": 0, "moe_ep_size": 1, "moe_ep_rank": 0, "dwdp_size": 1, "tp_group": None}


@contextmanager
def server(backend: str = "moe_dist_torch", place: dict[str, Any] | None = None, **flags: Any) -> Iterator[None]:
    """A process of SGLang, configured as --moe-runner-backend says."""
    with ExitStack() as stack:
        stack.enter_context(get_context().override_server_args(moe_runner_backend=backend, **flags))
        stack.enter_context(get_parallel().override(**(PLACE | (place or {}))))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.bfloat16)
        initialize_moe_config()
        yield


def layer_of(**changes: Any) -> FusedMoE:
    """SGLang's own, as its model files make it."""
    given = {
        "num_experts": SPEC.num_experts, "hidden_size": SPEC.hidden, "intermediate_size": SPEC.intermediate,
        "layer_id": 0, "top_k": SPEC.top_k, "quant_config": BLOCKS, "prefix": "model.layers.0.mlp.experts",
    }  # fmt: skip
    return FusedMoE(**(given | changes))


def load(layer: FusedMoE, weights: Any) -> None:
    """By SGLang's own loader, from tensors as a checkpoint has them."""
    for expert, shard_id, matrix, scales in pieces(weights):
        stem = "w2" if shard_id == "w2" else "w13"
        for suffix, tensor in (("weight", matrix), ("weight_scale_inv", scales)):
            param = getattr(layer, f"{stem}_{suffix}")
            param.weight_loader(param, tensor, f"experts.{stem}_{suffix}", shard_id=shard_id, expert_id=expert)


def loaded(layer: FusedMoE, weights: Any) -> FusedMoE:
    load(layer, weights)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def run(layer: FusedMoE, x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
    with torch.inference_mode():
        return layer(x_TH, StandardTopKOutput(routing.weights_TK, routing.ids_TK, torch.empty(0)))


class UpFirst(TorchBackend):
    """The reference, for [up; gate] alone, as flashinfer_cutlass is."""

    gate_first = False

    def prepare(self, weights: Any) -> None:
        weights.turn(gate_first=False)
        super().prepare(weights)


def test_plugins_are_loaded_by_entry_point() -> None:
    names = {f"moe_dist_{name}" for name in BACKENDS.names()}
    assert "moe_dist_flashinfer_cutlass" in names
    assert names <= set(MOE_RUNNER_BACKEND_CHOICES)
    assert names <= set(_CUSTOM_RUNNER_CORE_FACTORIES)
    register()  # again: nothing is there twice
    assert len([name for name in MOE_RUNNER_BACKEND_CHOICES if name == "moe_dist_triton"]) == 1


def test_the_plugin_comes_first_in_a_process() -> None:
    """SGLang loads its plugins before it imports its layers and reads its flags."""
    code = (
        "import conftest; from sglang.srt.plugins import load_plugins; load_plugins();"
        "from sglang.srt.server_args import MOE_RUNNER_BACKEND_CHOICES as names; assert 'moe_dist_cutlass' in names;"
        "from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod; assert hasattr(Fp8MoEMethod.apply, '__wrapped__')"
    )
    folder = Path(__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, timeout=170)


def test_the_choice_is_one_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    given = ["--model-path", "dummy", "--moe-runner-backend"]
    assert (
        parser.parse_args([*given, "moe_dist_flashinfer_cutlass"]).moe_runner_backend == "moe_dist_flashinfer_cutlass"
    )
    with pytest.raises(SystemExit):
        parser.parse_args([*given, "moe_dist_nothing"])
    assert "moe_dist_cutlass" in capsys.readouterr().err


def test_a_layer_gives_what_the_oracle_says(caplog: pytest.LogCaptureFixture) -> None:
    weights, x_TH, routing = drawn()
    with server(), caplog.at_level(logging.INFO):
        layer = loaded(layer_of(), weights)
        assert layer.runner_backend.value == get_moe_runner_backend().value == "moe_dist_torch"
        found = run(layer, x_TH, routing)
        empty = run(layer, x_TH[:0], Routing(routing.ids_TK[:0], routing.weights_TK[:0]))
    assert found.dtype == torch.bfloat16
    assert error(found, expected(weights, x_TH, routing)) < TOLERANCE
    assert empty.shape == (0, SPEC.hidden)


def test_experts_without_a_gate() -> None:
    spec = SPEC.with_changes(activation="relu2")
    weights, x_TH, routing = drawn(spec)
    with server():
        layer = loaded(layer_of(activation="relu2", is_gated=False), weights)
        assert error(run(layer, x_TH, routing), expected(weights, x_TH, routing, spec)) < TOLERANCE


def test_the_log_says_which_backend_runs(caplog: pytest.LogCaptureFixture) -> None:
    from moe_dist.integrations.sglang import hooks

    hooks._say.cache_clear()
    with server(), caplog.at_level(logging.INFO):
        layer_of()
        layer_of(layer_id=1)
    said = [record.getMessage() for record in caplog.records if "moe_dist" in record.getMessage()]
    assert len([line for line in said if "run by its backend torch (--moe-runner-backend moe_dist_torch" in line]) == 1
    assert not any("using triton" in line for line in said)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["tp", "ep"])
def test_ranks_hold_what_sglang_gives_them(kind: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standard, "get_device", lambda: "cpu")  # the dispatcher asks for an accelerator
    weights, x_TH, routing = drawn()
    parallel = ParallelSpec(tp=2) if kind == "tp" else ParallelSpec(ep=2)
    with server(place={"tp_size": 2, "attn_tp_size": 2, f"moe_{kind}_size": 2, f"moe_{kind}_rank": rank}):
        layer = loaded(layer_of(), weights)
        found = run(layer, x_TH, routing)
    held = shard(weights, Placement.build(SPEC, parallel), rank)
    assert layer.w13_weight.shape == held.w13_eFH.shape
    assert error(found, expected(held, x_TH, routing, SPEC, parallel, rank)) < TOLERANCE


def test_the_routed_scaling_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x_TH, routing = drawn()
    with server():
        found = run(loaded(layer_of(routed_scaling_factor=2.5), weights), x_TH, routing)
        in_topk = loaded(layer_of(routed_scaling_factor=2.5), weights)
        in_topk.should_fuse_routed_scaling_factor_in_topk = True  # then SGLang's router has multiplied already
        plain = run(in_topk, x_TH, routing)
    right = expected(weights, x_TH, routing)
    assert error(found, 2.5 * right) < TOLERANCE
    assert error(plain, right) < TOLERANCE


def test_fused_shared_experts_are_experts() -> None:
    """SGLang gives them the last slots, and each token's router the ids of those."""
    weights, x_TH, routing = drawn()
    with server():
        layer = loaded(layer_of(num_fused_shared_experts=1), weights)
        found = run(layer, x_TH, routing)
    assert error(found, expected(weights, x_TH, routing)) < TOLERANCE


def test_up_first_backends_get_weights_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded so, by SGLang's own switch: an update of weights in a running server comes in that order too."""
    weights, x_TH, routing = drawn()
    monkeypatch.setitem(BACKENDS._targets, "torch", UpFirst)
    with server():
        layer = loaded(layer_of(), weights)
        i = SPEC.intermediate
        assert torch.equal(layer.w13_weight[:, :i].view(torch.uint8), weights.w13_eFH[:, i:].view(torch.uint8))
        assert error(run(layer, x_TH, routing), expected(weights, x_TH, routing)) < TOLERANCE
        again = loaded(layer, weights)
        assert error(run(again, x_TH, routing), expected(weights, x_TH, routing)) < TOLERANCE
        with pytest.raises(UnsupportedError, match="loader of fused experts does not write"):
            layer_of(use_weight_loader_fused=True)
        wrapped = Fp8MoEMethod(BLOCKS)
        layer.weight_load_method = object()
        with pytest.raises(UnsupportedError, match=r"wants \[up; gate\], and object loads the weights"):
            wrapped.create_moe_runner(layer, layer.moe_runner_config)


def test_an_update_of_weights_is_seen() -> None:
    weights, x_TH, routing = drawn()
    with server():
        layer = loaded(layer_of(), weights)
        run(layer, x_TH, routing)
        weights.w2_eHi.view(torch.uint8).bitwise_xor_(0x80)  # every sign
        found = run(loaded(layer, weights), x_TH, routing)
    assert error(found, expected(weights, x_TH, routing)) < TOLERANCE


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


def test_every_other_runner_is_sglang_s_own() -> None:
    """The hooks let them through, one of FlashInfer that becomes Triton in this version among them."""
    with server("triton"):
        layer = layer_of()
        assert layer.runner_backend.value == "triton"
        assert not getattr(layer.quant_method, "load_up_proj_weight_first", False)
    with server("flashinfer_cutlass"):
        assert layer_of().runner_backend.value == "triton"


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
