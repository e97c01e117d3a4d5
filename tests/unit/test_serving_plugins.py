"""What the plugins of SGLang and vLLM share, and what they do without those. The rest is in tests/serving, which has
the packages."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.backends import BACKENDS
from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.errors import ConfigError, InstallationError, UnsupportedError
from moe_dist.integrations import package, sglang, vllm
from moe_dist.integrations.local_experts import LocalExperts
from moe_dist.integrations.package import Package, unexpected
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing, route
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import ExpertWeights, shard
from moe_dist.oracle.reference import oracle_partial
from moe_dist.workloads.random_weights import random_weights

SPEC = MoESpec(hidden=256, intermediate=128, num_experts=6, top_k=3)
TOLERANCE = 1e-2  # relative, in L2: the output is rounded to bf16 once


def test_importing_them_imports_no_stack() -> None:
    code = (
        "import sys, moe_dist, moe_dist.integrations.sglang, moe_dist.integrations.vllm;"
        "assert not {'sglang', 'vllm', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("group", ["sglang.srt.plugins", "vllm.general_plugins"])
def test_the_entry_points_are_there(group: str) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"][group]["moe_dist"].partition(":")
    assert callable(getattr(import_module(module), name))


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(package, "version", nowhere)
    for name in ("sglang", "vllm"):
        monkeypatch.setitem(sys.modules, name, None)
    vllm.register()  # nothing was asked for
    monkeypatch.setenv("MOE_DIST_VLLM_BACKEND", "torch")
    with pytest.raises(InstallationError, match="the package vllm is not installed; this was checked against vllm 0"):
        vllm.register()
    with pytest.raises(InstallationError, match="the package sglang is not installed; this was checked against sglang"):
        sglang.register()


def test_a_module_that_lacks_something_else_says_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halfastack.py").write_text("import nosuchdependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nosuchdependency"):
        Package("halfastack", ("1",)).needed("halfastack", "Thing")


def test_what_takes_more_than_it_is_given_is_no_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "newstack.py").write_text("def run(x, *more, weights, scale=1, **named): ...")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(package, "version", lambda name: "2")
    stack = Package("newstack", ("1",))
    stack.needed("newstack", "run", "x", "weights")
    with pytest.raises(InstallationError, match=r"newstack 2 has no newstack\.run of \(x\), it has one of \(x, more"):
        stack.needed("newstack", "run", "x")


@dataclass
class Config:
    needed: int
    plain: float | None = None
    ignored: int = 0
    listed: list[int] = field(default_factory=list)
    tensor: torch.Tensor | None = None


def test_fields_that_nobody_knows_must_have_their_defaults() -> None:
    def found(**given: Any) -> list[str]:
        return unexpected(Config(**({"needed": 1} | given)), {"plain": None}, frozenset({"needed", "ignored"}))

    assert found(ignored=7) == []
    assert found(plain=2.0) == ["plain = 2.0 is not computed here, only None"]
    assert found(listed=[1]) == ["listed = [1] is unknown here"]
    assert len(found(tensor=torch.ones(2))) == 1
    assert unexpected(Config(1), {"plain": None}, frozenset()) == ["needed = 1 is unknown here"]


def drawn() -> tuple[ExpertWeights, torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(2)
    x_TH = torch.randn(9, SPEC.hidden, generator=generator).bfloat16()
    return random_weights(SPEC, 1), x_TH, route(torch.randn(9, SPEC.num_experts, generator=generator), SPEC)


def experts_of(weights: ExpertWeights, held: list[int] | None = None) -> LocalExperts:
    if held is None:
        return LocalExperts("torch", SPEC, weights)
    named = {name: tensor[held].contiguous() for name, tensor in weights.tensors().items()}
    return LocalExperts("torch", SPEC, weights.with_tensors(**named), held, SPEC.num_experts)


def right(weights: ExpertWeights, x_TH: torch.Tensor, routing: Routing, held: list[int] | None = None) -> torch.Tensor:
    """By the oracle, of the experts `held`."""
    owners = tuple(int(held is not None and expert not in held) for expert in range(SPEC.num_experts))
    parallel = ParallelSpec(ep=2, expert_map=owners) if held else ParallelSpec()
    placement = Placement.build(SPEC, parallel)
    groups_TK = placement.serving_groups(routing.ids_TK, torch.arange(len(x_TH)), None)
    numerics = BACKENDS.get("torch").numerics_of(SPEC)
    part = shard(weights, placement, 0)
    return oracle_partial(x_TH, routing, part, SPEC, placement, 0, [(0, len(x_TH))], groups_TK, numerics)


@pytest.mark.parametrize("held", [None, [0, 1, 2], [5, 0, 3], [4]])
def test_local_experts_add_up_those_that_they_hold(held: list[int] | None) -> None:
    weights, x_TH, routing = drawn()
    found = experts_of(weights, held)(x_TH, routing.ids_TK, routing.weights_TK)
    wanted = right(weights, x_TH, routing, held)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - wanted).norm() / wanted.norm()) < TOLERANCE


def test_ids_of_nobody_add_nothing() -> None:
    """Where the stack's padding has them, or garbage: no kernel reads beyond its tables."""
    weights, x_TH, routing = drawn()
    experts = experts_of(weights)
    ids_TK = routing.ids_TK.clone()
    ids_TK[:, 1] = torch.tensor([-1, 6, 1 << 30, -(1 << 30), -1, -2, 7, -1, 6])
    kept = Routing(ids_TK.masked_fill((ids_TK < 0) | (ids_TK >= 6), -1), routing.weights_TK)
    found = experts(x_TH, ids_TK.long(), routing.weights_TK.double())  # of any dtype
    wanted = right(weights, x_TH, kept)
    assert float((found.float() - wanted).norm() / wanted.norm()) < TOLERANCE
    assert experts(x_TH[:0], ids_TK[:0], routing.weights_TK[:0]).shape == (0, SPEC.hidden)


def test_the_output_is_the_caller_s() -> None:
    weights, x_TH, routing = drawn()
    experts = experts_of(weights)
    first = experts(x_TH, routing.ids_TK, routing.weights_TK)
    kept = first.clone()
    experts(-x_TH, routing.ids_TK, routing.weights_TK)
    assert torch.equal(first, kept)


def test_rows_cut_out_of_a_wider_tensor() -> None:
    weights, x_TH, routing = drawn()
    experts = experts_of(weights)
    wide = torch.zeros(9, SPEC.hidden + 8).bfloat16()
    wide[:, 3:-5] = x_TH
    found = experts(wide[:, 3:-5], routing.ids_TK, routing.weights_TK)
    assert torch.equal(found, experts(x_TH, routing.ids_TK, routing.weights_TK))


def test_a_compiler_goes_around_them() -> None:
    weights, x_TH, routing = drawn()
    experts = experts_of(weights)
    compiled = torch.compile(lambda x: experts(2 * x, routing.ids_TK, routing.weights_TK) + 1, backend="eager")
    assert torch.equal(compiled(x_TH), experts(2 * x_TH, routing.ids_TK, routing.weights_TK) + 1)


def test_wrong_inputs_are_named() -> None:
    weights, x_TH, routing = drawn()
    experts = experts_of(weights)
    for x, ids, said in (
        (x_TH.half(), routing.ids_TK, r"x\.dtype"),
        (x_TH[:, 1:], routing.ids_TK, r"x = \(9, 255\): wrong shape"),
        (x_TH[:4], routing.ids_TK, r"routing\.ids = \(9, 3\): wrong shape"),
    ):
        with pytest.raises(ConfigError, match=said):
            experts(x, ids, routing.weights_TK)
    with pytest.raises(ConfigError, match=r"weights\.s13\.dtype"):
        LocalExperts("torch", SPEC, weights.with_tensors(s13=weights.s13.half()))
    with pytest.raises(ConfigError, match=r"weights\.w2\.stride"):
        LocalExperts("torch", SPEC, weights.with_tensors(w2_eHi=weights.w2_eHi.mT.contiguous().mT))
    with pytest.raises(ConfigError, match="no backend has this name"):
        LocalExperts("torhc", SPEC, weights)
    with pytest.raises(UnsupportedError, match="backend cutlass for 6 experts of fp8_block, swiglu, 256 × 128"):
        LocalExperts("cutlass", SPEC, weights)


class Turning(TorchBackend):
    def prepare(self, weights: ExpertWeights) -> None:
        weights.turn(gate_first=False)
        super().prepare(weights)


class Declared(Turning):
    gate_first = False
    capturable = True


def test_a_backend_that_turns_weights_must_declare_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x_TH, routing = drawn()
    wanted = right(weights, x_TH, routing)
    codes = weights.w13_eFH.view(torch.uint8).clone()
    monkeypatch.setitem(BACKENDS._targets, "torch", Turning)
    with pytest.raises(UnsupportedError, match="does not declare so"):
        experts_of(weights)
    assert torch.equal(codes, weights.w13_eFH.view(torch.uint8))  # turned back: they are the stack's
    monkeypatch.setitem(BACKENDS._targets, "torch", Declared)
    found = experts_of(weights)(x_TH, routing.ids_TK, routing.weights_TK)
    assert float((found.float() - wanted).norm() / wanted.norm()) < TOLERANCE
    assert BACKENDS.get("flashinfer_cutlass").gate_first is False
    assert all(BACKENDS.get(name).gate_first is None for name in ("triton", "cutlass", "deep_gemm"))


def test_a_graph_s_scratch_outlives_a_larger_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workspace replaces its arena when it grows, and the graph that has the old one is the stack's."""
    weights, _, _ = drawn()
    first, second = torch.empty(1), torch.empty(2)
    with pytest.raises(UnsupportedError, match="a CUDA graph is not supported: backend torch can't be captured"):
        experts_of(weights)._keep(first)
    monkeypatch.setitem(BACKENDS._targets, "torch", Declared)
    experts = experts_of(weights)
    for arena in (first, first, second, first):
        experts._keep(arena)
    assert [id(arena) for arena in experts._arenas] == [id(first), id(second)]


def test_where_weights_lie() -> None:
    weights, _, _ = drawn()
    experts = experts_of(weights)
    tensors = [weights.w13_eFH, weights.w2_eHi, weights.s13, weights.s2]
    assert experts.reads(*(tensor.detach() for tensor in tensors))
    assert not experts.reads(*tensors[:3], tensors[3].clone())
