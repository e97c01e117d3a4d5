"""Backend flashinfer_cutlass without a GPU: what it refuses, how it folds scales, how it builds."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from unit.asked import HOPPER, problem

from moe_dist.backends import BACKENDS, Problem, flashinfer_build
from moe_dist.backends.flashinfer_cutlass import FlashInferCutlass
from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.bench.row import Refused
from moe_dist.commands import cli, measuring
from moe_dist.engine.planning import make_plan
from moe_dist.errors import UnsupportedError
from moe_dist.exits.exit_codes import BAD_INPUT, TOO_SMALL
from moe_dist.machine.machine import Machine
from moe_dist.model.quantization import FP8_MAX, cast
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import activate
from moe_dist.oracle.reference import relative_error
from moe_dist.step.rows import Support
from moe_dist.workloads.random_weights import random_weights


@pytest.mark.parametrize(
    "asked",
    [
        problem(),
        problem(quant="none"),
        problem(quant="fp8_tensor_static", payload="fp8", width=464),
        problem(activation="relu2"),
        problem(width=0),  # an empty shard is skipped, not computed
    ],
)
def test_supports(asked):
    assert FlashInferCutlass.supports(asked).ok


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (problem(activation="geglu"), "computes swiglu, relu2, not geglu"),
        (problem(quant="fp8_channel"), "not fp8_channel"),
        (problem(quant="fp8_tensor_dynamic"), "not fp8_tensor_dynamic"),
        (problem(quant="none", dtype="fp32"), "not fp32"),
        (problem(capability=(10, 0)), "needs compute capability 9.0"),
        (problem(capability=None), "needs compute capability 9.0"),
        (problem(width=192), r"slices \(192\) in whole blocks of 128"),
        (problem(hidden=2880), r"hidden \(2880\)"),
        (problem(quant="fp8_tensor_static", width=100), "multiples of 16"),
        (problem(quant="none", width=100), "multiples of 8"),
    ],
)
def test_refuses_with_the_reason(asked, reason):
    support = FlashInferCutlass.supports(asked)
    assert not support.ok
    assert re.search(reason, support.reason), support.reason


def test_it_says_why_it_is_not_available_here():
    state = FlashInferCutlass.available("cpu")
    assert not state.ok
    assert "Hopper" in state.reason


def test_takes_fp8_rows_only_with_one_static_scale():
    takes = {kind: FlashInferCutlass.payloads(problem(quant=kind).spec) for kind in ("fp8_block", "fp8_tensor_static")}
    assert "fp8" not in takes["fp8_block"]
    assert "fp8" in takes["fp8_tensor_static"]


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_folded_scales_compute_the_same(activation):
    """The library's arithmetic with one scale per expert for gate and up, against the weights' own two scales."""
    spec = MoESpec(
        hidden=128, intermediate=256, num_experts=3, top_k=1, activation=activation, quant="fp8_tensor_static"
    )
    weights = random_weights(spec, seed=5)
    dense = [weights.dequantized(slot) for slot in range(3)]
    backend = FlashInferCutlass(Problem(spec, 256, 3, "cuda", (9, 0), "none"))
    weights.turn(gate_first=False)
    scale1, quant2, scale2, scale_in = backend._quant_scales(weights)
    x = torch.randn(40, 128)
    codes = cast(x, scale_in).float()
    for slot in range(3):
        out1 = codes @ weights.w13_eFH[slot].float().T * scale1[slot]
        turned = torch.cat(out1.chunk(2, 1)[::-1], 1) if spec.gated else out1  # it reads [up; gate]
        hidden = (activate(turned, activation) * quant2[slot]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        found = hidden.float() @ weights.w2_eHi[slot].float().T * scale2[slot]
        w13, w2 = dense[slot]
        inner = activate(codes * scale_in @ w13.T, activation)
        expected = cast(inner, weights.a2[slot]).float() * weights.a2[slot] @ w2.T
        assert relative_error(found, expected) < 5e-3  # a code on a tie may fall to the other side


def test_building_says_so_and_shows_how_far_it_is(monkeypatch, tmp_path, capfd):
    objects = [tmp_path / f"{index}.o" for index in range(4)]

    def build_and_load():
        for index in range(3):
            objects[index].touch()
        flashinfer_build.time.sleep(0.2)

    spec = SimpleNamespace(get_object_paths=lambda: objects, build_and_load=build_and_load)
    module = SimpleNamespace(gen_cutlass_fused_moe_sm90_module=lambda: spec)
    for name in ("flashinfer", "flashinfer.jit"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flashinfer.jit.fused_moe", module)
    monkeypatch.setattr(flashinfer_build, "find_spec", lambda name: True)
    monkeypatch.setattr(flashinfer_build, "_built", lambda: False)
    monkeypatch.setattr(flashinfer_build, "SAY_EVERY_S", 0.05)
    flashinfer_build.ensure_built()
    said = capfd.readouterr().err
    assert "compiling 4 sources now, 23 minutes on 64 cores" in said
    assert "3 of 4 objects" in said
    assert said.rstrip().endswith("is built.")


def test_building_without_the_package_says_so(monkeypatch, capsys):
    monkeypatch.setattr(flashinfer_build, "find_spec", lambda name: None)
    assert cli.main(["build", "flashinfer_cutlass"]) == TOO_SMALL
    assert "flashinfer-python needed, none available. pip install 'moe_dist[gpu]'" in capsys.readouterr().err


def test_what_cannot_run_here_is_not_built(monkeypatch):
    monkeypatch.setattr(FlashInferCutlass, "build", classmethod(lambda cls: pytest.fail("built")))
    assert cli.main(["run", "--backend", "flashinfer_cutlass", "--device", "cpu", "--build"]) == BAD_INPUT


def test_nothing_is_built_unless_asked_for(monkeypatch):
    built = []
    monkeypatch.setattr(TorchBackend, "build", classmethod(lambda cls: built.append(cls)))
    monkeypatch.setattr(measuring, "plan_cases", lambda *_: ([], [Refused(case="c", reason="stop here")]))
    assert cli.main(["run"]) == BAD_INPUT
    assert built == []
    assert cli.main(["run", "--build"]) == BAD_INPUT
    assert built == [TorchBackend]


class TestPartialSums:
    """The library writes them in bf16, whatever they are turned into afterwards."""

    SPEC = problem(num_experts=4).spec
    H200 = Machine("cuda", 4, "NVIDIA H200", HOPPER, 141 << 30)

    @pytest.fixture(autouse=True)
    def on_hopper(self, monkeypatch):
        for name in ("flashinfer_cutlass", "triton", "cutlass", "deep_gemm"):
            monkeypatch.setattr(BACKENDS.get(name), "available", classmethod(lambda cls, device: Support(True)))

    def plan(self, backend: str, combine: str | None):
        return make_plan(
            self.SPEC, ParallelSpec(ep=2), exchange="ag_rs", backend=backend, combine_dtype=combine, machine=self.H200
        )

    def test_are_not_called_fp32(self):
        with pytest.raises(UnsupportedError, match="gives partial sums in bf16, not fp32") as refused:
            self.plan("flashinfer_cutlass", "fp32")
        assert refused.value.supported == ["torch", "triton", "cutlass", "deep_gemm"]

    @pytest.mark.parametrize("combine", [None, "bf16"])
    def test_are_taken_as_they_are(self, combine):
        assert self.plan("flashinfer_cutlass", combine).combine_dtype == "bf16"

    @pytest.mark.parametrize("backend", ["torch", "triton", "cutlass", "deep_gemm"])
    def test_of_the_others_are_float32_until_the_last_step(self, backend):
        assert self.plan(backend, "fp32").out_dtype == torch.float32


def test_it_is_listed():
    assert BACKENDS.get("flashinfer_cutlass") is FlashInferCutlass
