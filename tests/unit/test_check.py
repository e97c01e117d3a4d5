"""What a row's errors are made of: every row of an output counts, and a step that does not compute is seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sinks import Scaled
from unit.test_bench import CPU, SPEC, case

from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.bench import gathered
from moe_dist.bench.again import again_errors
from moe_dist.bench.check import worst_token
from moe_dist.bench.findings import merge
from moe_dist.bench.measure import measure
from moe_dist.bench.results import make_row
from moe_dist.bench.rounds import Turn
from moe_dist.bench.sketch import sketch, sketch_error
from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.runtime.context import RankContext

SHARED = SPEC.with_changes(shared_experts="replicated", shared_intermediate=128)
ON_INPUT = SPEC.with_changes(top_k=1, weights_on_input=True)
BIASED = SPEC.with_changes(quant="none", activation="swigluoai", expert_bias=True)


def alone(tokens: int = 20, **changes):
    return case(
        **{"parallel": {}, "exchange": "local", "workload": {"tokens": tokens}, "iters": 2, "warmup": 0} | changes
    )


def row_of(chosen, of: int = 1):
    context = RankContext(Comm.single(), "test")
    for number in range(of):
        result = measure(context, chosen, chosen.plan(CPU), Turn(number, of, 0))
    return make_row(chosen, chosen.plan(CPU), merge([result]), "test")


class TestSketch:
    def test_every_row_s_change_is_seen(self):
        y = torch.randn(3000, 64)
        first = sketch(y)
        assert first.shape == (3000, 9)
        assert sketch_error(Comm.single(), sketch(y), first) == 0.0
        for row in (0, 1, 1234, 2999):
            lost = y.clone()
            lost[row] = 0
            assert 0.5 < sketch_error(Comm.single(), sketch(lost), first) < 2
        assert sketch_error(Comm.single(), sketch(y[:-1]), first) == float("inf")
        assert sketch_error(Comm.single(), sketch(y * float("nan")), first) == float("inf")

    def test_a_change_s_size_is_about_its_own(self):
        y, change = torch.randn(500, 256), torch.randn(500, 256)
        error = sketch_error(Comm.single(), sketch(y + 0.01 * change), sketch(y))
        assert 0.01 < error < 0.03

    def test_a_row_may_be_huge(self):
        y = 1e30 * torch.randn(50, 64)
        assert sketch_error(Comm.single(), sketch(y), sketch(y)) == 0.0
        assert 0.005 < sketch_error(Comm.single(), sketch(1.01 * y), sketch(y)) < 0.02

    def test_a_row_of_zeros_stays_one(self):
        y = torch.randn(4, 64)
        y[2] = 0
        first = sketch(y)
        assert sketch_error(Comm.single(), sketch(y), first) == 0.0
        y[2] = 0.5
        assert sketch_error(Comm.single(), sketch(y), first) > 0.1
        nothing = torch.zeros(3, 64)
        assert sketch_error(Comm.single(), sketch(nothing), sketch(nothing)) == 0.0
        assert sketch_error(Comm.single(), sketch(nothing + 1), sketch(nothing)) == float("inf")


class TestWorstToken:
    def test_a_tiny_token_is_measured_against_the_mean(self):
        expected = torch.ones(10, 4)
        expected[3] = 1e-6
        off = expected.clone()
        off[3] += 1e-3
        assert worst_token(Comm.single(), off, expected) == pytest.approx(1e-3, rel=0.2)
        expected[3] = 0.2  # small, but a token
        off = expected.clone()
        off[3] = 0
        assert worst_token(Comm.single(), off, expected) == pytest.approx(1.0)

    def test_what_is_not_there_is_infinite(self):
        for y in (torch.ones(2, 4), torch.full((3, 4), float("nan"))):
            assert worst_token(Comm.single(), y, torch.ones(3, 4)) == float("inf")
        assert worst_token(Comm.single(), torch.ones(0, 4), torch.ones(0, 4)) == 0.0
        assert worst_token(Comm.single(), torch.zeros(3, 4), torch.zeros(3, 4)) == 0.0


def test_sums_are_gathered_piece_by_piece(monkeypatch):
    monkeypatch.setattr(gathered, "GATHERED", 3 * 4 * 5)
    part = torch.randn(10, 5)
    assert torch.equal(gathered.summed(Comm.single(), part), part)
    assert torch.equal(gathered.summed(Comm.single(), part[:0]), part[:0])


class TestStepsThatDoNotCompute:
    @pytest.mark.parametrize("tokens", [1, 2, 20])
    @pytest.mark.parametrize(
        "model", [SPEC, SHARED, SPEC.with_changes(quant="fp8_tensor_dynamic"), ON_INPUT, BIASED], ids=str
    )
    def test_right_ones_pass(self, model, tokens):
        row = row_of(alone(tokens, model=model), of=2)
        assert row.ok is True
        assert row.err_again < 5e-2
        assert row.err_repeat == 0.0

    @pytest.mark.parametrize("tokens", [1, 2, 20])
    @pytest.mark.parametrize("model", [SPEC, SHARED, ON_INPUT], ids=["routed", "shared", "on input"])
    def test_the_first_output_for_ever(self, model, tokens, monkeypatch):
        forward = MoELayer.forward

        def remembered(self, x, *rest, **options):
            if not hasattr(self, "first"):
                self.first = forward(self, x, *rest, **options)
            return self.first.clone()

        monkeypatch.setattr(MoELayer, "forward", remembered)
        row = row_of(alone(tokens, model=model))
        assert row.err_oracle < 1e-2
        assert row.err_repeat == 0.0
        assert row.not_finite == ("err_again",) or row.err_again > 0.3
        assert row.ok is False

    def test_a_graph_whose_replay_computes_nothing(self):
        class Still:
            """Its buffer holds the right output, and replays leave it alone."""

            def __init__(self, y):
                self.y = y

            def replay(self):
                return self.y

            def __call__(self, x, routing):
                return self.y

        context = RankContext(Comm.single(), "test")
        measure(context, alone(), alone().plan(CPU), Turn(0, 2, 0))
        (step,) = context.memo["kept"].steps.values()
        y = step.call()
        assert max(again_errors(step, sketch(y))) < 1e-2
        assert again_errors(replace(step, graph=Still(y.clone())), sketch(y)) == (float("inf"), float("inf"))

    @pytest.mark.parametrize("tokens", [700, 1024, 2100])
    def test_rows_that_are_lost_while_it_is_timed(self, tokens, monkeypatch):
        """Every second row is lost from the first timed iteration on."""
        forward, count = TorchBackend.forward, 0

        def losing(self, step, rows, sink):
            nonlocal count
            count += 1
            kept = torch.ones(len(rows), 1)
            if count > 4:  # two warm up, one is checked, one counts bytes
                kept[1::2] = 0
            forward(self, step, rows, Scaled(sink, kept))

        monkeypatch.setattr(TorchBackend, "forward", losing)
        small = SPEC.with_changes(hidden=128, intermediate=128)
        row = row_of(alone(tokens, model=small, iters=1, check=False))
        assert row.err_repeat > 0.3
        assert row.ok is False
