"""Rows of stacks: measured and checked on ranks, wrong layers seen wherever they stand, checkpoints layer by layer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit, layer_in_bf16, section
from dist.pool import Pool
from sinks import Scaled

from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.bench.case import Case
from moe_dist.bench.findings import merge
from moe_dist.bench.measure import measure
from moe_dist.bench.results import make_row
from moe_dist.bench.rounds import Turn
from moe_dist.bench.row import Row
from moe_dist.bench.runner import plan_cases
from moe_dist.bench.source_spec import SourceSpec
from moe_dist.checkpoint import layer_spec, make_checkpoint
from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.router import Router
from moe_dist.engine.stack import MoEStack
from moe_dist.errors import ConfigError
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec, ParallelSpec, WorkloadSpec
from moe_dist.runtime.context import RankContext

SPEC = MoESpec(name="small", hidden=256, intermediate=256, num_experts=8, top_k=2)
SHARED = SPEC.with_changes(shared_experts="replicated", shared_intermediate=128)
MACHINE = Machine("cpu", 1, "a test's CPU")


def case(layers: int = 3, tokens: int = 20, layout: str = "sharded", skew: str = "uniform", **changes: Any) -> Case:
    grid = ParallelSpec(**changes.pop("grid", {"ep": 2}))
    workload = WorkloadSpec(tokens=tokens, seed=3, token_layout=layout, skew=skew)
    defaults = {"model": SPEC, "exchange": "ag_rs", "backend": "torch", "iters": 2, "warmup": 0, "layers": layers}
    return Case(parallel=grid, workload=workload, **(defaults | changes))


def measured(comm: Comm, chosen: Case, turns: int = 1, wrong: Any = None) -> Any:
    context = RankContext(comm, "torchrun")
    undo = wrong() if wrong else None
    try:
        for number in range(turns + 1):
            result = measure(context, chosen, chosen.plan(MACHINE), Turn(number, turns, 0))
    finally:
        if undo:
            undo()
    return result


def row_of(pool: Pool, chosen: Case, *arguments: Any) -> Row:
    results = pool.run(chosen.parallel.world, measured, chosen, *arguments)
    return make_row(chosen, chosen.plan(MACHINE), merge(results), "torchrun")


@pytest.mark.parametrize(
    "chosen",
    [
        case(),
        case(8, tokens=1),
        case(exchange="all_to_all", grid={"tp": 2}),
        case(exchange="all_reduce", layout="replicated", skew="zipf:1.2"),
        case(exchange="ag_rs", layout="replicated", model=SHARED),
        case(model=SPEC.with_changes(quant="fp8_tensor_dynamic"), exchange="all_to_all", grid={"ep": 3}),
        case(model=SPEC.with_changes(quant="none", dtype="fp32"), combine_dtype="fp32"),
        case(grid={"ep": 2, "replicas": {0: [1], 7: [0]}}, exchange="all_reduce"),
        case(2, tokens=3, grid={"ep": 4}),
    ],
    ids=lambda chosen: chosen.label,
)
def test_right_stacks_pass(pool: Pool, chosen: Case) -> None:
    row = row_of(pool, chosen, 2)
    assert row.ok is True
    assert row.layer == f"stack:{chosen.layers}"
    assert row.per_layer_us == pytest.approx(row.p50_us / chosen.layers)
    assert row.err_repeat == 0.0
    assert row.err_again < 5e-2
    assert len(row.round_p50_us) == 2
    assert row.pairs == chosen.workload.tokens * SPEC.top_k


def test_a_stack_of_one_layer_is_that_layer(pool: Pool) -> None:
    row = row_of(pool, case(1))
    assert (row.layer, row.per_layer_us) == ("whole", row.p50_us)
    three = row_of(pool, case(3))
    assert three.bytes_sent == 3 * row.bytes_sent
    assert sum(three.rows_per_rank) == 3 * sum(row.rows_per_rank)
    assert three.pairs == row.pairs


# What goes wrong, on every rank; each gives back how to undo it


def third_layer_is_off() -> Any:
    """By a tenth, beside a residual that is larger by far."""
    forward, made = MoELayer.forward, MoEStack.__init__

    def noted(self: Any, layers: Any) -> None:
        made(self, layers)
        self.layers[2].is_off = True

    def off(self: Any, x: Any, *rest: Any, **options: Any) -> Any:
        y = forward(self, x, *rest, **options)
        return 1.1 * y if getattr(self, "is_off", False) else y

    MoELayer.forward, MoEStack.__init__ = off, noted
    return lambda: (setattr(MoELayer, "forward", forward), setattr(MoEStack, "__init__", made))


def no_residual() -> Any:
    chained = MoEStack._chained

    def without(self: Any, x: Any, routings: Any, captured: bool, run: Any) -> Any:
        for layer, routing in zip(self.layers, routings, strict=True):
            x = run(layer, x, routing)
        return x

    MoEStack._chained = without
    return lambda: setattr(MoEStack, "_chained", chained)


def first_layer_thrice() -> Any:
    made = MoEStack.__init__

    def wrong(self: Any, layers: Any) -> None:
        made(self, [layers[0]] * len(layers))

    MoEStack.__init__ = wrong
    return lambda: setattr(MoEStack, "__init__", made)


def a_layer_remembers() -> Any:
    forward = MoELayer.forward

    def remembered(self: Any, x: Any, *rest: Any, **options: Any) -> Any:
        if not hasattr(self, "first"):
            self.first = forward(self, x, *rest, **options)
        return self.first.clone()

    MoELayer.forward = remembered
    return lambda: setattr(MoELayer, "forward", forward)


def a_token_is_lost_in_the_second_layer() -> Any:
    made, forward = MoEStack.__init__, TorchBackend.forward

    def noted(self: Any, layers: Any) -> None:
        made(self, layers)
        self.layers[1].backend.loses = True

    def losing(self: Any, step: Any, rows: Any, sink: Any) -> None:
        kept = torch.ones(len(rows), 1)
        kept[2] = not hasattr(self, "loses")
        forward(self, step, rows, Scaled(sink, kept))

    MoEStack.__init__, TorchBackend.forward = noted, losing
    return lambda: (setattr(MoEStack, "__init__", made), setattr(TorchBackend, "forward", forward))


@pytest.mark.parametrize(
    ("wrong", "field"),
    [(third_layer_is_off, "err_oracle"), (no_residual, "err_oracle"), (first_layer_thrice, "err_token"),
     (a_layer_remembers, "err_again"), (a_token_is_lost_in_the_second_layer, "err_token")],
)  # fmt: skip
def test_wrong_stacks_do_not_pass(pool: Pool, wrong: Any, field: str) -> None:
    row = row_of(pool, case(3, 40), 1, wrong)
    assert getattr(row, field) > 0.09
    assert row.ok is False


# Checkpoints


def of(directory: Path, layers: int, first: int = 1, **changes: Any) -> Case:
    source = SourceSpec(checkpoint=str(directory), layer=first)
    return case(layers, model=layer_spec(directory, first), source=source, skew="router", **changes)


def routers_seen(comm: Comm, chosen: Case) -> tuple[Any, list[Any]]:
    """What each router was given, by a sum."""
    seen, forward = [], Router.forward

    def watched(self: Any, x: Any) -> Any:
        seen.append((float(self.gate_EH.sum()), float(x.float().sum())))
        return forward(self, x)

    Router.forward = watched
    try:
        return measured(comm, chosen), seen
    finally:
        Router.forward = forward


def test_a_checkpoint_s_layers_with_their_own_routers(pool: Pool, tmp_path: Path) -> None:
    sizes = {"hidden": 256, "intermediate": 256, "num_experts": 8, "top_k": 2, "shards": 1, "layers": 4}
    made = make_checkpoint(tmp_path / "model", **sizes)
    chosen = of(made, 3)
    plan_cases([chosen], MACHINE)
    found = pool.run(2, routers_seen, chosen)
    row = make_row(chosen, chosen.plan(MACHINE), merge([result for result, _ in found]), "torchrun")
    assert (row.ok, row.layer, row.source) == (True, "stack:3", "checkpoint:model layer 1")
    for _, seen in found:
        assert len({gate for gate, _ in seen}) == 3
        assert len({tokens for _, tokens in seen}) == 1  # the step's own


def test_layers_that_are_no_stack_are_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden": 256, "intermediate": 256, "num_experts": 8, "top_k": 2, "shards": 1, "layers": 3}
    made = make_checkpoint(tmp_path / "model", **sizes)
    with pytest.raises(ConfigError, match=r"checkpoint\.layer = 3: the model has 3 layers"):
        plan_cases([of(made, 3)], MACHINE)
    with pytest.raises(ConfigError, match=r"checkpoint\.layer = 2: this layer is dense"):
        plan_cases([of(edit(made, {"mlp_only_layers": [2]}), 2)], MACHINE)


def test_layers_of_two_formats_are_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden": 256, "intermediate": 256, "num_experts": 8, "top_k": 2, "shards": 1, "layers": 3}
    made = make_checkpoint(tmp_path / "model", **sizes)
    edit(made, section(made, modules_to_not_convert=["model.layers.2.mlp.experts"]), partial(layer_in_bf16, layer=2))
    plan_cases([of(made, 2, 0)], MACHINE)
    plan_cases([of(made, 1, 2)], MACHINE)
    with pytest.raises(ConfigError) as found:
        plan_cases([of(made, 3, 0)], MACHINE)
    assert (found.value.field, found.value.value) == ("experiment.layers", 3)
    assert "layer 2 has quant 'none', and the first one of the stack 'fp8_block'" in found.value.rule
    assert found.value.legal == "1 to 2 from that one on"
