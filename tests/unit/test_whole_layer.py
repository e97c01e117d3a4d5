"""The pair of exchange `fused` and backend `deep_gemm_mega` without ranks: which names go together, what plans, cases
and commands say of it, and what is said of a package that is not there or does not fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_dist.backends import deep_gemm_mega
from moe_dist.backends.deep_gemm_mega import DeepGemmMega, installed, release
from moe_dist.bench.case import Experiment
from moe_dist.bench.runner import plan_cases
from moe_dist.commands import examined
from moe_dist.engine import records
from moe_dist.engine.plan import Plan
from moe_dist.engine.planning import make_plan
from moe_dist.engine.together import pairs_of
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.exchange.fused import Fused
from moe_dist.integrations.local_experts import backend_for, problem_of
from moe_dist.kernels import put_pairs
from moe_dist.machine.machine import Machine
from moe_dist.machine.nodes import Nodes
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import ExpertWeights
from moe_dist.runtime.metrics import _Watched
from moe_dist.simulate.predict import _planned, sent_bytes
from moe_dist.step import LayerRows, TokenRows

SPEC = MoESpec(hidden=512, intermediate=256, num_experts=16, top_k=2)
H200X4 = Machine.named("h200x4")
PAIR = {"exchange": "fused", "backend": "deep_gemm_mega"}


def planned(**changes: Any) -> Plan:
    given = {"spec": SPEC, "parallel": ParallelSpec(ep=4), "machine": H200X4, "graph": True} | PAIR | changes
    return make_plan(**given)


class TestPlan:
    def test_it_says_what_runs(self) -> None:
        plan = planned()
        assert (plan.exchange, plan.backend, plan.form, plan.payload) == ("fused", "deep_gemm_mega", "layer", "fp8")
        assert plan.capturable.ok
        options = {(option.kind, option.name): option for option in plan.options}
        assert "computes whole layers, and goes with exchange fused alone" in options["exchange", "nvlink"].reason
        assert "whole layers alone (deep_gemm_mega)" in options["backend", "cutlass"].reason
        other = {(option.kind, option.name): option for option in planned(exchange="nvlink", backend="triton").options}
        assert not other["exchange", "fused"].possible
        assert not other["backend", "deep_gemm_mega"].possible

    def test_tokens_that_are_replicated_are_cut_before_and_gathered_after(self) -> None:
        plan = planned(token_layout="replicated")
        assert plan.converts_layout
        assert plan.window_bytes(64) == planned().window_bytes(16)

    @pytest.mark.parametrize("form", ["token", "expert"])
    def test_another_form_is_refused(self, form: str) -> None:
        with pytest.raises(ConfigError, match="Fused makes layer, DeepGemmMega takes layer"):
            planned(form=form)
        with pytest.raises(ConfigError, match="takes token, expert"):
            planned(exchange="ag_rs", backend="triton", form="layer")

    def test_several_nodes_are_refused(self) -> None:
        cluster = Machine("cuda", 8, "NVIDIA H200", (9, 0), 141 << 30, elsewhere=True, nodes=Nodes((2, 2)))
        with pytest.raises(UnsupportedError, match=r"reaches GPUs of one node, and these ranks are on 2 nodes"):
            planned(machine=cluster)

    def test_bytes(self) -> None:
        """By hand: w13 is there twice. 300 tokens have the room of 512, in whole 384s, of which top-2 on four ranks are
        6,144 rows, 384 more for each of four experts, with inputs of both GEMMs, scales and origins. What steps of 256
        had stays beside it."""
        plan, other = planned(), planned(exchange="nvlink", backend="triton")
        assert plan.weight_bytes(0) - other.weight_bytes(0) == 4 * 2 * 256 * 512
        rows = 4 * 768 * 2 + 4 * 384
        pooled = rows * (512 + 256 + 16 * 4 * (4 + 4) + 32)
        own = 768 * (512 + 4 * 4 + 2 * 12 + 2 * 2 * 512)
        assert plan.window_bytes(300) - plan.window_bytes(256) == pooled + own + 4 * 4 * 4 * 4 * 768
        assert plan.window_bytes(1) == plan.window_bytes(256)
        assert plan.window_bytes(300) == plan.window_bytes(512) < plan.window_bytes(513)
        assert plan.window_bytes(0) == plan.scratch_bytes(300) == 0

    def test_wire_bytes(self) -> None:
        """Both pairs of a token leave, and two sums of each of three others' tokens go back."""
        assert planned().wire_bytes(32) == 8 * (2 * (512 + 4 * 4 + 8) + 3 * 2 * 512 * 2)


def test_what_a_prediction_lets_it_send() -> None:
    """By hand: three of four pairs leave, each with its row in FP8, scales and origin, and each has a sum come back."""
    assert sent_bytes(planned(), 32) == 2 * 32 * 3 / 4 * (512 + 4 * 4 + 8 + 2 * 512)


def test_nothing_is_predicted_for_it_on_several_nodes() -> None:
    cluster: Any = SimpleNamespace(nodes=2)
    with pytest.raises(UnsupportedError, match=r"exchange fused .*GPUs of one host"):
        _planned(None, cluster, SPEC, ParallelSpec(ep=4), "fused", "deep_gemm_mega")  # type: ignore[arg-type]


class TestAuto:
    def test_it_is_taken_where_it_was_measured_and_not_by_rule(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(records, "user_folder", lambda: tmp_path)
        monkeypatch.setattr(records, "SHIPPED", tmp_path / "none")
        auto = {"exchange": "auto", "backend": "auto"}
        assert planned(**auto).exchange == "nvlink"
        pair = planned(exchange="auto")
        assert (pair.exchange, pair.backend) == ("fused", "deep_gemm_mega")
        assert planned(backend="auto").backend == "deep_gemm_mega"
        rows = [
            {
                "hidden": 512, "intermediate": 256, "num_experts": 16, "top_k": 2, "activation": "swiglu", "ep": 4,
                "quant": "fp8_block", "tp": 1, "placement": "EP4", "token_layout": "sharded", "graph": True,
                "layer": "whole", "skew": "uniform", "tokens_per_rank": 8, "payload_dtype": "fp8", "p50_us": us,
                "scatter_us": 0.1, "ok": True, "exchange": exchange, "backend": backend,
            }
            for exchange, backend, us in (("nvlink", "cutlass", 90.0), ("fused", "deep_gemm_mega", 80.0))
        ]  # fmt: skip
        document = {"date": "2026-11-28T00:00:00Z", "machine": {"gpu": "NVIDIA H200"}, "rows": rows}
        (tmp_path / "mine.json").write_text(json.dumps(document))
        found = planned(**auto)
        assert (found.exchange, found.backend) == ("fused", "deep_gemm_mega")
        assert "nvlink with cutlass 12% more" in found.choices[0].why
        shared = SPEC.with_changes(shared_experts="replicated", shared_intermediate=256)
        assert planned(**auto, spec=shared).exchange == "nvlink"

    def test_names_that_never_go_together_are_no_reason_of_their_own(self) -> None:
        with pytest.raises(UnsupportedError) as error:
            planned(exchange="auto", backend="deep_gemm", spec=SPEC.with_changes(quant="fp8_channel"))
        assert "computes fp8_block" in str(error.value)
        assert "whole layers" not in str(error.value)
        with pytest.raises(UnsupportedError, match="computes fp8_block, not fp8_channel"):
            planned(exchange="auto", spec=SPEC.with_changes(quant="fp8_channel"))


def test_pairs_of() -> None:
    """A name without a partner stays, so that its reason is told; so does one that nobody has."""
    assert pairs_of(["ag_rs", "fused"], ["triton", "deep_gemm_mega"], "sharded") == [
        ("ag_rs", "triton"), ("fused", "deep_gemm_mega"),
    ]  # fmt: skip
    assert pairs_of(["ag_rs", "fused"], ["triton"], "sharded") == [("ag_rs", "triton"), ("fused", "triton")]
    assert pairs_of(["ag_rs"], ["triton", "deep_gemm_mega"], "sharded") == [
        ("ag_rs", "triton"), ("ag_rs", "deep_gemm_mega"),
    ]  # fmt: skip
    assert pairs_of(["auto", "fused"], ["nobody's"], "replicated") == [("auto", "nobody's"), ("fused", "nobody's")]


def test_an_experiment_lists_the_pair_and_not_its_halves() -> None:
    made = Experiment(
        models=(SPEC,), worlds=(2,), placements=("ep", "tp"), tokens=(32,), token_layouts=("sharded",),
        exchanges=("ag_rs", "fused"), backends=("cutlass", "deep_gemm_mega"), modes=("graph",),
    )  # fmt: skip
    planned, refused = plan_cases(made.cases("cuda"), H200X4)
    assert [(case.parallel.label, case.exchange) for case, _ in planned] == [
        ("EP2", "ag_rs"), ("EP2", "fused"), ("TP2", "ag_rs"),
    ]  # fmt: skip
    (reason,) = [each.reason for each in refused]
    assert "exchange fused under TP2 is not supported: serves EP over two ranks or more" in reason


def test_doctor_names_its_partner(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examined._exchange(Fused, "cpu") == (False, "needs GPUs that reach each other through NVLink")
    monkeypatch.setattr(Machine, "detect", classmethod(lambda cls, device="auto": H200X4))
    assert examined._exchange(Fused, "cuda") == (True, "for sharded tokens; with backend deep_gemm_mega")


def test_one_rank_of_another_stack_can_not_run_it() -> None:
    problem = problem_of(SPEC, 4, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="computes whole layers, exchange included"):
        backend_for("deep_gemm_mega", problem)


def test_token_rows_are_refused() -> None:
    backend = DeepGemmMega(planned().problem(0))
    rows = TokenRows(torch.zeros(1, 512).bfloat16(), torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="from the rows that exchange fused hands over"):
        backend.forward_alone(rows, torch.bfloat16)


def test_a_watched_step_counts_no_rows_of_it() -> None:
    """Its slots are global ids, and what came to this rank nobody has seen."""
    watched = _Watched.__new__(_Watched)
    watched._counts = None
    rows = LayerRows(torch.zeros(1, 8), torch.full((1, 2), 15, dtype=torch.int32), torch.zeros(1, 2), 1, None)  # type: ignore[arg-type]
    watched.saw("path", rows)
    assert (watched.path, watched.counts()) == ("path", None)


def test_put_pairs() -> None:
    ids, weights = torch.tensor([[0, 7], [-1, 3], [8, -5]], dtype=torch.int32), torch.rand(3, 2)
    weights[1, 0] = weights[2, 0] = float("nan")
    found, into = torch.full((5, 2), 9), torch.full((5, 2), 9.0)
    put_pairs(ids, weights, 8, found[:4], into[:4])
    assert found.tolist() == [[0, 7], [-1, 3], [-1, -1], [-1, -1], [9, 9]]
    assert into[1].tolist() == [0.0, float(weights[1, 1])]
    assert into[2:].tolist() == [[0.0, 0.0], [0.0, 0.0], [9.0, 9.0]]


KERNEL = "def fp8_mega_moe(y, l1, l2, buffer, recipe=(), activation='', activation_clamp=None, fast_math=True): pass\n"
OTHERS = "get_symm_buffer_for_sm90_mega_moe = transform_weights_for_mega_moe_sm90 = len\n"


class TestPackage:
    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Writes a package deep_gemm with this text, of this release."""
        monkeypatch.syspath_prepend(str(tmp_path))

        def write(found: str, text: str) -> tuple[bool, str]:
            (tmp_path / "deep_gemm.py").write_text(text)
            monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
            monkeypatch.setattr(deep_gemm_mega, "release", lambda: found)
            installed.cache_clear()
            return installed()

        yield write
        monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
        installed.cache_clear()

    @pytest.mark.parametrize(
        ("version", "fitting"), [("2.11.0+cu130", "0.1.4.post1"), ("2.13.0", "0.2.5"), ("2.14.1", "0.2.5")]
    )
    def test_a_missing_one_is_named_with_the_release_that_loads(
        self, monkeypatch: pytest.MonkeyPatch, version: str, fitting: str
    ) -> None:
        monkeypatch.setattr(deep_gemm_mega, "find_spec", lambda name: None)
        monkeypatch.setattr(torch, "__version__", version)
        release.cache_clear()
        installed.cache_clear()
        found = installed()
        release.cache_clear()
        installed.cache_clear()
        assert found == (False, f"sgl-deep-gemm is not installed (pip install sgl-deep-gemm=={fitting})")

    @pytest.mark.parametrize("found", ["0.1.4", "0.1.4.post1", "0.2.5"])
    def test_known_ones(self, package: Any, found: str) -> None:
        assert package(found, KERNEL + OTHERS) == (True, f"sgl-deep-gemm {found}")

    @pytest.mark.parametrize("found", ["0.1.5", "0.1.40", "0.3.0", "1.0"])
    def test_unknown_ones_are_refused(self, package: Any, found: str) -> None:
        ok, reason = package(found, KERNEL + OTHERS)
        assert not ok
        assert f"sgl-deep-gemm {found} is installed" in reason
        assert "known of 0.1.4 and 0.2.5 only" in reason

    def test_what_does_not_load_is_explained(self, package: Any) -> None:
        ok, reason = package("0.2.5", "raise OSError('undefined symbol: _ZN3c104cuda')")
        assert not ok
        assert f"sgl-deep-gemm 0.2.5 does not load with torch {torch.__version__} (pip install" in reason
        assert reason.endswith("OSError: undefined symbol: _ZN3c104cuda")

    def test_another_interface_is_named(self, package: Any) -> None:
        assert (
            "has no transform_weights_for_mega_moe_sm90"
            in package("0.2.5", KERNEL + "get_symm_buffer_for_sm90_mega_moe = len").reason
        )
        changed = KERNEL.replace("fast_math=True", "quick=True") + OTHERS
        assert package("0.2.5", changed).reason.endswith("0.2.5 takes no fast_math")

    def test_the_newer_one_takes_fewer_shapes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def asked(**sizes: int) -> str:
            return DeepGemmMega.supports(planned(spec=SPEC.with_changes(**sizes)).problem(0)).reason

        monkeypatch.setattr(deep_gemm_mega, "release", lambda: "0.1.4.post1")
        narrow = planned(spec=SPEC.with_changes(hidden=256)), planned(spec=SPEC.with_changes(intermediate=384))
        monkeypatch.setattr(deep_gemm_mega, "release", lambda: "0.2.5")
        for plan in narrow:
            assert "0.2.5 needs hidden" in DeepGemmMega.supports(plan.problem(0)).reason
        assert asked() == ""

    def test_weights_are_those_of_the_shard_in_either_order(self, package: Any) -> None:
        """And a copy, which later turns of the shard leave alone."""
        package("0.2.5", KERNEL + OTHERS.replace(" = len", " = lambda first, second: (first, second)"))
        shard = ExpertWeights.empty(SPEC, 2, 256, "cpu")
        shard.w13_eFH.view(torch.uint8).copy_(torch.randint(0, 100, shard.w13_eFH.shape))
        shard.s13.copy_(torch.rand(shard.s13.shape))
        expected = shard.w13_eFH.float().clone(), shard.s13.clone()
        for gate_first in (True, False):
            shard.turn(gate_first=gate_first)
            backend = DeepGemmMega(planned().problem(0))
            backend.prepare(shard)
            w13, s13 = backend._first
            assert torch.equal(w13.float(), expected[0])
            assert torch.equal(s13, expected[1])
            assert s13.data_ptr() != shard.s13.data_ptr()
            assert not backend._bounded
