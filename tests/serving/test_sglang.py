"""SGLang's own registries, hooks, config, layer, loader and dispatcher with our runner core in them, on a CPU by the
reference backend. Its CUDA kernels and the packages that it only imports are not there."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from experts import SPEC, TOLERANCE, drawn, error, expected
from sglang.srt.layers.moe.moe_runner.runner import _CUSTOM_RUNNER_CORE_FACTORIES
from sglang.srt.layers.moe.token_dispatcher import standard
from sglang.srt.layers.moe.utils import get_moe_runner_backend
from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
from sglang.srt.server_args import MOE_RUNNER_BACKEND_CHOICES, ServerArgs
from sglang_server import BLOCKS, UpFirst, layer_of, loaded, run, server

from moe_dist.backends import BACKENDS
from moe_dist.errors import UnsupportedError
from moe_dist.integrations.sglang import register
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.spec import ParallelSpec
from moe_dist.model.weights import shard

pytestmark = pytest.mark.stacks


def test_plugins_are_loaded_by_entry_point() -> None:
    names = {f"moe_dist_{name}" for name, each in BACKENDS.usable() if "token" in each.takes}
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


def test_every_other_runner_is_sglang_s_own() -> None:
    """The hooks let them through, one of FlashInfer that becomes Triton in this version among them."""
    with server("triton"):
        layer = layer_of()
        assert layer.runner_backend.value == "triton"
        assert not getattr(layer.quant_method, "load_up_proj_weight_first", False)
    with server("flashinfer_cutlass"):
        assert layer_of().runner_backend.value == "triton"
