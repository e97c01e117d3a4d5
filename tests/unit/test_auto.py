"""What `auto` takes: by which record, by which rule, for which sizes, and what a layer with several choices runs."""

from __future__ import annotations

import json
import math
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.bench.case import Experiment
from moe_dist.comm import Comm
from moe_dist.commands.cli import main
from moe_dist.commands.config import find_model
from moe_dist.engine import choosing, records
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.plan import Choice, Plan
from moe_dist.engine.planning import make_plan
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MOST_TOKENS, MoESpec, ParallelSpec
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

ROOT = Path(__file__).parent.parent.parent
H200X4 = Machine.named("h200x4")
SPEC = MoESpec(name="of tests", hidden=256, intermediate=512, num_experts=16, top_k=2)
EP4 = ParallelSpec(ep=4)


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOE_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "shipped")


def row(tokens: int, exchange: str, backend: str, us: float, /, **changes: Any) -> dict[str, Any]:
    return {
        "hidden": 256, "intermediate": 512, "num_experts": 16, "top_k": 2, "activation": "swiglu", "quant": "fp8_block",
        "tp": 1, "ep": 4, "placement": "EP4", "token_layout": "sharded", "graph": True, "layer": "whole",
        "skew": "uniform",
        "tokens_per_rank": tokens, "exchange": exchange, "backend": backend, "payload_dtype": "fp8", "p50_us": us,
        "scatter_us": 0.1, "ok": True, "more": "keys are of no account",
    } | changes  # fmt: skip


def write(folder: Path, name: str, rows: list[dict[str, Any]], **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    document = {"date": "2026-11-28T00:00:00Z", "machine": {"gpu": "NVIDIA H200"}, "rows": rows} | changes
    (folder / name).write_text(json.dumps(document))


def auto(exchange: str = "auto", backend: str = "auto", graph: bool = True, **given: Any) -> Plan:
    given = {"spec": SPEC, "parallel": EP4, "machine": H200X4} | given
    return make_plan(exchange=exchange, backend=backend, graph=graph, **given)


def taken(plan: Plan) -> list[tuple[str, str, int | None]]:
    return [(each.exchange, each.backend, each.up_to) for each in plan.choices]


THREE = [
    row(8, "all_to_all", "triton", 90.0), row(8, "ag_rs", "triton", 100.0),
    row(128, "ag_rs", "cutlass", 200.0), row(128, "all_to_all", "triton", 230.0),
    row(8192, "ag_rs", "cutlass", 900.0), row(8192, "all_to_all", "triton", 1000.0),
]  # fmt: skip


def test_the_fastest_pair_for_each_size_with_its_reason() -> None:
    write(records.user_folder(), "mine.json", THREE)
    plan = auto()
    assert taken(plan) == [("all_to_all", "triton", math.isqrt(8 * 128)), ("ag_rs", "cutlass", None)]
    assert plan.choices[0].why == (
        "90 µs at 8 tokens a rank, even routing, ag_rs with triton 11% more; user record mine.json"
    )
    assert {(o.kind, o.name) for o in plan.options if o.chosen} == {
        ("exchange", "all_to_all"), ("exchange", "ag_rs"), ("backend", "triton"), ("backend", "cutlass"),
    }  # fmt: skip
    assert taken(auto(tokens_per_rank=32)) == [("all_to_all", "triton", None)]
    assert taken(auto(tokens_per_rank=33)) == [("ag_rs", "cutlass", None)]


def test_a_name_that_is_given_stays() -> None:
    write(records.user_folder(), "mine.json", THREE)
    assert taken(auto(backend="triton")) == [("all_to_all", "triton", None)]
    assert taken(auto(exchange="ag_rs")) == [("ag_rs", "triton", math.isqrt(8 * 128)), ("ag_rs", "cutlass", None)]
    with pytest.raises(UnsupportedError, match="backend torch"):
        auto(backend="torch")  # can't be captured


@pytest.mark.parametrize(
    "changes",
    [{"ok": False}, {"ok": None}, {"p50_us": None}, {"layer": "stack:4"}, {"skew": "zipf:1.2"}, {"peer": "somebody's"},
     {"hidden": 512}, {"ep": 2}, {"token_layout": "replicated"}, {"payload_dtype": "bf16"}, {"token_split": "ragged"},
     {"placement": "EP4+8"}, {"placement": "EP4@1a2b3c"},
     {"exchange": "local"}, {"backend": "torch"}, {"backend": "somebody's"}],
)  # fmt: skip
def test_rows_of_something_else_do_not_count(changes: dict[str, Any]) -> None:
    write(
        records.user_folder(),
        "mine.json",
        [row(8, "ag_rs", "triton", 90.0), row(8, "all_to_all", "triton", 1.0, **changes)],
    )
    (only,) = auto().choices
    assert (only.exchange, only.backend) == ("ag_rs", "triton")


def test_a_layer_with_shared_experts_goes_by_rows_that_have_them_where_there_are_any() -> None:
    spec = SPEC.with_changes(shared_experts="replicated", shared_intermediate=256)
    write(records.user_folder(), "mine.json", THREE)
    (first, *_) = auto(spec=spec).choices
    assert (first.exchange, first.backend) == ("all_to_all", "triton")
    assert first.why.endswith("user record mine.json, whose rows are without shared experts")
    write(records.user_folder(), "mine.json", [*THREE, row(8, "ag_rs", "cutlass", 500.0, shared_experts="replicated")])
    (only,) = auto(spec=spec).choices
    assert (only.backend, only.why.endswith("user record mine.json")) == ("cutlass", True)
    assert auto().choices[0].backend == "triton"  # and others do not go by those


def test_a_tie_changes_nothing() -> None:
    """The second size's fastest pair is 1 % ahead, the third one's 5 %."""
    rows = [row(8, "ag_rs", "triton", 90.0), row(64, "ag_rs", "triton", 101.0), row(64, "ag_rs", "cutlass", 100.0),
            row(512, "ag_rs", "triton", 105.0), row(512, "ag_rs", "cutlass", 100.0)]  # fmt: skip
    write(records.user_folder(), "mine.json", rows)
    plan = auto()
    assert taken(plan) == [("ag_rs", "triton", math.isqrt(64 * 512)), ("ag_rs", "cutlass", None)]
    rows[2]["scatter_us"] = rows[4]["scatter_us"] = 4.0  # three standard errors of both
    write(records.user_folder(), "mine.json", rows)
    assert taken(auto()) == [("ag_rs", "triton", None)]


def test_the_users_latest_record_goes_first_then_the_shipped_one_then_the_other_mode_then_the_rule() -> None:
    (by_rule,) = auto().choices
    assert (by_rule.exchange, by_rule.backend) == ("nvlink", "cutlass")
    assert by_rule.why.startswith("by rule")
    write(records.SHIPPED, "h200x4.json", [row(8, "ag_rs", "triton", 90.0, graph=False)])
    assert taken(auto()) == [("ag_rs", "triton", None)]
    write(records.SHIPPED, "h200x4-later.json", [row(8, "all_to_all", "triton", 90.0)], date="2026-11-29T00:00:00Z")
    assert taken(auto()) == [("all_to_all", "triton", None)]
    assert "shipped record h200x4-later.json" in auto().choices[0].why
    write(records.user_folder(), "mine.json", [row(8, "ag_rs", "cutlass", 90.0)], date="2026-01-01T00:00:00Z")
    assert taken(auto()) == [("ag_rs", "cutlass", None)]
    write(
        records.user_folder(), "h100.json", [row(8, "ag_rs", "triton", 9.0)], machine={"gpu": "NVIDIA H100 80GB HBM3"}
    )
    assert taken(auto()) == [("ag_rs", "cutlass", None)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"token_layout": "replicated"}, ("nvlink", "cutlass")),
        ({"parallel": ParallelSpec()}, ("local", "cutlass")),
        ({"parallel": ParallelSpec(ep=8)}, ("ag_rs", "cutlass")),  # of two hosts
        ({"parallel": ParallelSpec(ep=8), "token_layout": "replicated"}, ("all_reduce", "cutlass")),
        ({"spec": SPEC.with_changes(quant="none")}, ("nvlink", "triton")),
        ({"machine": Machine("cpu", 1, "a CPU"), "graph": False}, ("ag_rs", "torch")),
    ],
)
def test_the_rule(given: dict[str, Any], expected: tuple[str, str]) -> None:
    (only,) = auto(**given).choices
    assert (only.exchange, only.backend) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no date, machine and rows"),
        ('{"rows": []}', "holds no date, machine and rows"),
        (
            '{"rows": [{"hidden": "x"}], "machine": {"gpu": "NVIDIA H200"}, "date": "d"}',
            r"broken.json: rows\.0\.hidden = 'x': is no whole number",
        ),
    ],
)
def test_a_broken_record_is_an_error_that_names_it(content: str, said: str) -> None:
    records.user_folder().mkdir(parents=True)
    (records.user_folder() / "broken.json").write_text(content)
    with pytest.raises(ConfigError, match=said):
        auto()


def test_a_plan_of_several_choices_needs_what_its_steps_need() -> None:
    write(records.user_folder(), "mine.json", THREE)
    plan = auto()
    small, large = (one for one, _ in plan.parted(MOST_TOKENS))
    assert [size for _, size in plan.parted(MOST_TOKENS)] == [32, MOST_TOKENS]
    assert [size for _, size in plan.parted(20)] == [20]
    assert plan.parted(20)[0][0] == small
    assert plan.scratch_bytes(20) == small.scratch_bytes(20)
    assert plan.scratch_bytes(500) == max(small.scratch_bytes(32), large.scratch_bytes(500))
    assert plan.wire_bytes(80) == small.wire_bytes(80)
    assert plan.wire_bytes(800) == large.wire_bytes(800)
    assert plan.capturable.ok
    assert set(plan.tables()) == set(small.tables()) | set(large.tables())


def test_a_layer_runs_what_its_plan_has_for_the_size_of_the_step() -> None:
    plan = make_plan(SPEC, ParallelSpec(), exchange="local", backend="torch", machine=Machine.detect("cpu"))
    (one,) = plan.choices
    choices = (
        Choice(one.exchange, one.backend, "token", one.payload, 4),
        Choice(one.exchange, one.backend, "expert", one.payload),
    )
    several = Plan(**{**vars(plan), "choices": choices})
    layer = MoELayer(several, random_weights(SPEC, 0), Comm.single())
    alone = MoELayer(plan, random_weights(SPEC, 0), Comm.single())
    assert [path.exchange.form for path in layer.paths] == ["token", "expert"]
    assert layer.path(4) is layer.paths[0]
    assert layer.path(5) is layer.paths[1]
    ran = []
    for path in layer.paths:
        forward = path.backend.forward
        path.backend.forward = lambda *given, forward=forward, path=path: (
            ran.append(path.exchange.form),
            forward(*given),
        )
    for tokens, bucket, form in ((4, None, "token"), (5, None, "expert"), (2, 8, "expert"), (0, 3, "token")):
        x = Stream("a test's tokens", tokens).normal(tokens, 256).bfloat16()
        routing = synthetic_routing(SPEC, tokens, "uniform", 0)
        y = layer(x, routing, max_tokens_per_rank=bucket)
        assert torch.equal(y, alone(x, routing, max_tokens_per_rank=bucket))
        assert ran.pop() == form
    assert "up to 4 tokens a rank" in repr(layer)
    assert choosing.AUTO not in repr(layer)


def test_what_is_shipped_is_what_was_recorded() -> None:
    spec = spec_from_file_location("make_records", ROOT / "benchmarks" / "make_records.py")
    assert spec is not None
    assert spec.loader is not None
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    shipped = ROOT / "moe_dist" / "records_shipped"
    assert {path.stem for path in shipped.glob("*.json")} == set(made.NAMES)
    for name in made.NAMES:
        assert (shipped / f"{name}.json").read_text() == made.shipped(name)


def test_shipped_rows_decide_for_the_model_that_they_are_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "SHIPPED", ROOT / "moe_dist" / "records_shipped")
    spec = find_model("DeepSeek-V3")
    for parallel in (EP4, ParallelSpec(tp=4), ParallelSpec(ep=2)):
        assert all("shipped record" in choice.why for choice in auto(spec=spec, parallel=parallel).choices)
    assert auto().choices[0].why.startswith("by rule")


def test_a_case_is_for_its_own_size_and_says_who_chose() -> None:
    write(records.user_folder(), "mine.json", THREE)
    given = {"models": (SPEC,), "worlds": (4,), "placements": ("ep",), "tokens": (16, 4096), "modes": ("graph",)}
    experiment = Experiment(exchanges=("auto", "ag_rs"), backends=("auto", "triton"), **given)
    found = {}
    for case in experiment.cases("cuda"):
        plan = case.plan(H200X4)
        found[case.workload.tokens, case.exchange, case.backend] = (*taken(plan), case.chosen_by)
    assert found[16, "auto", "auto"] == (("all_to_all", "triton", None), "auto")
    assert found[4096, "auto", "auto"] == (("ag_rs", "cutlass", None), "auto")
    assert found[4096, "ag_rs", "triton"] == (("ag_rs", "triton", None), "name")


def test_plan_says_what_it_takes_and_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write(records.user_folder(), "mine.json", THREE)
    model = tmp_path / "small.yaml"
    model.write_text("hidden: 256\nintermediate: 512\nnum_experts: 16\ntop_k: 2\n")
    words = [
        "plan",
        "--model",
        str(model),
        "--machine",
        "h200x4",
        "--ep",
        "4",
        "--exchange",
        "auto",
        "--backend",
        "auto",
    ]
    assert main([*words, "--tokens", "16"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "exchange all_to_all, backend triton" in said
    assert "auto, all sizes: all_to_all with triton: 90 µs at 8 tokens a rank" in said
    assert main([*words, "--tokens", "16", "--json"]) == 0
    (choice,) = json.loads(capsys.readouterr().out)["choices"]
    assert choice["why"].endswith("user record mine.json, whose rows are in a graph")


def test_results_that_are_remembered_decide_from_then_on() -> None:
    document = {"date": "2026-11-28T01:02:03Z", "machine": {"gpu": "NVIDIA H200"}, "rows": THREE}
    assert auto().choices[0].why.startswith("by rule")
    record = records.remember(document)
    assert record.name == "2026-11-28T010203Z-NVIDIAH200.json"
    assert [path.name for path in records.user_folder().iterdir()] == [record.name]
    assert taken(auto())[0][:2] == ("all_to_all", "triton")
    assert len(list(record.rows)) == 1


def test_times_of_a_cpu_are_not_remembered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--remember", "--device", "cpu"]) == 2
    assert "--remember = True: is of times on GPUs" in capsys.readouterr().err
