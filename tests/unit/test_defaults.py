"""Which backend and mode run where nobody named them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_dist.backends.cutlass_fused import CutlassFused
from moe_dist.backends.triton_fused import TritonFused
from moe_dist.bench.case import Experiment
from moe_dist.bench.defaults import build_quickly, default_backend, default_experiment, default_model, default_modes
from moe_dist.bench.runner import plan_cases
from moe_dist.commands import cli
from moe_dist.commands.asked import Asked, single
from moe_dist.commands.config import find_model
from moe_dist.engine.loading import plan_for
from moe_dist.errors import ResourceError
from moe_dist.exits.exit_codes import OK
from moe_dist.machine.machine import Machine
from moe_dist.messages.notices import collecting
from moe_dist.model.spec import ParallelSpec
from moe_dist.step.rows import Support

CPU = Machine("cpu", 1, "CPU")
HOPPER = Machine("cuda", 4, "NVIDIA H200", (9, 0), 140 << 30)
AMPERE = Machine("cuda", 4, "NVIDIA A100", (8, 0), 80 << 30)


@pytest.fixture
def on(monkeypatch):
    """A machine that is not here."""

    def put(machine: Machine) -> None:
        monkeypatch.setattr(Machine, "detect", classmethod(lambda cls, device="auto": machine))
        fits = machine.capability == (9, 0)
        monkeypatch.setattr(
            TritonFused, "available", classmethod(lambda cls, device: Support(fits, "" if fits else "needs SM90"))
        )

    return put


def experiment(**changes) -> Experiment:
    return Experiment(**{"models": (find_model("tiny"),), "worlds": (2,), "exchanges": ("ag_rs",)} | changes)


def asked(*arguments: str) -> Asked:
    """What `run` with these arguments would measure."""
    bound = cli.parse(["run", *arguments]).bound
    given = bound.arguments
    return single(given["overrides"], given["source"], given["grid"])


@pytest.mark.parametrize(("machine", "name"), [(CPU, "torch"), (AMPERE, "torch"), (HOPPER, "triton")])
def test_the_backend_goes_with_the_machine(on, machine, name):
    on(machine)
    chosen, why = default_backend(experiment(), machine)
    assert chosen == name
    assert "default on this machine" in why


def test_what_triton_can_not_serve_runs_in_torch_and_says_so(on):
    on(HOPPER)
    odd = find_model("tiny").with_changes(quant="none", dtype="fp32")
    name, why = default_backend(experiment(models=(find_model("tiny"), odd)), HOPPER)
    assert name == "torch"
    assert "not fp32" in why


def test_a_case_that_can_not_run_anywhere_decides_nothing(on):
    on(HOPPER)
    assert default_backend(experiment(exchanges=("ag_rs", "local")), HOPPER)[0] == "triton"


class TestOneRule:
    """A checkpoint's layer gets what `run` of it gets."""

    def planned(self, **changes):
        spec = find_model("tiny").with_changes(**changes)
        return plan_for(spec, ParallelSpec(ep=2), "ag_rs", None, "sharded", HOPPER)

    @pytest.mark.parametrize("changes", [{}, {"quant": "none", "dtype": "fp32"}])
    def test_load_layer_and_run(self, on, changes):
        on(HOPPER)
        with collecting() as said:
            found = self.planned(**changes).backend
        model = find_model("tiny").with_changes(**changes)
        assert found == default_backend(experiment(models=(model,)), HOPPER)[0]
        assert len(said) == (found == "torch")

    def test_a_refusal_of_any_kind_leaves_torch(self, on, monkeypatch):
        on(HOPPER)
        monkeypatch.setattr(TritonFused, "payloads", classmethod(lambda cls, spec: {"bf16"}))
        with collecting() as said:
            assert self.planned(quant="fp8_tensor_dynamic").backend == "torch"
        assert "belongs to the source rank" in str(said)


def test_modes(on):
    on(HOPPER)
    assert default_modes(experiment(backends=("triton",)), HOPPER) == (("eager", "graph"), "")
    modes, why = default_modes(experiment(backends=("torch",)), HOPPER)
    assert modes == ("eager",)
    assert "backend torch is not capturable" in why


class TestRun:
    def test_the_readme_s_command_runs_on_gpus(self, on):
        on(HOPPER)
        found = asked("--ep", "4", "--exchange", "all_to_all", "--tokens", "256", "model.quant=fp8_channel")
        assert (found.experiment.backends, found.experiment.modes, found.chosen_by) == (("triton",), None, "default")
        cases = list(found.experiment.cases("cuda", found.chosen_by))
        assert [(case.graph, case.chosen_by) for case in cases] == [(False, "default"), (True, "default")]
        for case in cases:
            case.plan(HOPPER)

    def test_a_named_backend_stays_and_its_mode_is_one_that_runs(self, on):
        on(HOPPER)
        for named in (["--backend", "torch"], ["backends=[torch]"]):
            found = asked(*named)
            assert (found.experiment.backends, found.experiment.modes) == (("torch",), ("eager",))
            assert (found.chosen_by, found.why) == ("name", "")
            assert "not capturable" in found.mode_why

    def test_named_modes_stay(self, on):
        on(HOPPER)
        found = asked("--backend", "torch", "modes=[graph]")
        assert found.experiment.modes == ("graph",)

    def test_an_older_gpu(self, on):
        on(AMPERE)
        found = asked()
        assert (found.experiment.backends, found.experiment.modes) == (("torch",), ("eager",))
        assert "needs SM90" in found.why

    def test_a_cpu(self, on):
        on(CPU)
        found = asked()
        assert (found.experiment.backends, found.experiment.modes, found.mode_why) == (("torch",), None, "")
        assert found.chosen_by == "default"


def test_plan_says_who_chose(capsys):
    assert cli.main(["plan"]) == OK
    assert "backend torch (default on this machine)" in capsys.readouterr().out
    assert cli.main(["plan", "--backend", "torch"]) == OK
    assert "backend torch, rows" in capsys.readouterr().out


class TestModel:
    """One rule for all commands that measure, plan or tune."""

    @pytest.mark.parametrize(("ranks", "memory", "layers", "model"), [
        (1, 80, 1, "DeepSeek-V3"), (1, 24, 1, "Qwen3-30B-A3B"), (2, 24, 1, "Qwen3-30B-A3B"), (4, 24, 1, "DeepSeek-V3"),
        (4, 24, 8, "Qwen3-30B-A3B"), (1, 2, 1, "Qwen3-30B-A3B"),
    ])  # fmt: skip
    def test_the_largest_of_two_that_fits(self, ranks, memory, layers, model):
        machine = Machine("cuda", 4, "NVIDIA H200", (9, 0), memory << 30)
        assert default_model(machine, find_model, ranks, layers) == model

    def test_what_run_takes(self, on):
        for machine, arguments, model in (
            (CPU, [], "tiny"),
            (HOPPER, ["--ep", "2"], "DeepSeek-V3"),
            (replace(HOPPER, memory=24 << 30), ["--ep", "2"], "Qwen3-30B-A3B"),
            (HOPPER, ["layers=40"], "Qwen3-30B-A3B"),
        ):
            on(machine)
            found = asked(*arguments)
            assert [spec.name for spec in found.experiment.models] == [model]
            assert found.model_why == "default on this machine"
        assert asked("--model", "tiny").model_why == asked("models=[tiny]").model_why == ""

    def test_plan_goes_by_the_machine_that_it_is_for(self, capsys):
        assert cli.main(["plan", "--machine", "h200x4", "--ep", "4"]) == OK
        assert capsys.readouterr().out.startswith("model DeepSeek-V3 (default on such a machine)\nDeepSeek-V3")


class TestCompareWithoutAFile:
    def test_a_real_models_shape_decode_and_prefill_by_our_kernels(self, on, monkeypatch):
        on(HOPPER)
        monkeypatch.setattr(CutlassFused, "available", classmethod(lambda cls, device: Support(True)))
        made = Experiment(models=(find_model("DeepSeek-V3"),), **default_experiment(HOPPER, router=False))
        assert made.tokens == (64, 8192)
        assert made.worlds == (4,)
        planned, refused = plan_cases(made.cases("cuda"), HOPPER)
        assert len(refused) == 8  # the whole-layer kernel, which is not here: once for each placement, size, routing
        assert all("fused" in each.case and "deep_gemm_mega" in each.case for each in refused)
        assert len(planned) == 48  # 2 placements, 3 exchanges, 2 backends, 2 sizes, 2 routings
        assert {case.backend for case, _ in planned} == {"triton", "cutlass"}
        assert all(case.graph for case, _ in planned)

    def test_other_gpus_and_cpus_take_the_reference(self):
        assert default_experiment(AMPERE, router=False)["backends"] == ["torch"]
        assert default_experiment(CPU, router=True)["skews"] == ["router", "uniform", "zipf:1.2"]

    def test_what_is_built_within_a_minute_is_built(self, monkeypatch):
        built, said, there = [], [], Support(False, "not built yet")
        for backend in (CutlassFused, TritonFused):
            monkeypatch.setattr(backend, "available", classmethod(lambda cls, device: there))
            monkeypatch.setattr(backend, "build", classmethod(lambda cls: built.append(cls)))
        build_quickly(["triton", "cutlass"], HOPPER, said.append)
        assert (built, said) == ([CutlassFused], [])
        there = Support(True)
        build_quickly(["cutlass"], HOPPER, said.append)
        assert built == [CutlassFused]

    def test_what_can_not_be_built_is_left_out_and_told(self, monkeypatch):
        def fails(cls):
            raise ResourceError("nvcc", "12.4 or newer", "none", "Install CUDA.")

        said = []
        monkeypatch.setattr(CutlassFused, "available", classmethod(lambda cls, device: Support(False, "not built")))
        monkeypatch.setattr(CutlassFused, "build", classmethod(fails))
        build_quickly(["cutlass"], HOPPER, said.append)
        assert ["goes on without backend cutlass" in text and "nvcc" in text for text in said] == [True]
