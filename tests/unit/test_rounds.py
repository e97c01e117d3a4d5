"""Cases in rounds: who is measured when, and what a rank keeps until the next turn."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sinks import Scaled
from unit.test_bench import CPU, H200, SPEC, case

from moe_dist.backends import BACKENDS
from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.bench import loading
from moe_dist.bench import measure as measuring
from moe_dist.bench import prepared as steps
from moe_dist.bench.findings import merge
from moe_dist.bench.measure import measure
from moe_dist.bench.results import Outcome
from moe_dist.bench.rounds import ROUNDS, Turn, batches, group_bytes, schedule, turns
from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.machine.machine import Machine
from moe_dist.messages.notices import notice
from moe_dist.runtime.context import RankContext

PLENTY = 1 << 40


def planned(*cases, machine=CPU):
    return [(one, one.plan(machine)) for one in cases]


class TestSchedule:
    FOUR = tuple(case(iters=7, exchange=exchange, parallel=parallel) for parallel in ({"tp": 2}, {"ep": 2})
                 for exchange in ("ag_rs", "all_to_all"))  # fmt: skip

    def test_every_round_is_over_before_the_next(self):
        found = list(schedule(planned(*self.FOUR), PLENTY))
        rounds = [found[start : start + 4] for start in range(0, len(found), 4)]
        assert len(rounds) == ROUNDS + 1
        for number, one in enumerate(rounds):  # queues come last, since they leave a GPU hot
            assert sorted(index for index, _ in one) == [0, 1, 2, 3]
            assert {(turn.number, turn.of, turn.batch) for _, turn in one} == {(number, ROUNDS, 0)}
        assert [index for index, _ in rounds[0]] == [0, 1, 2, 3]
        for number, one in enumerate(rounds):
            assert {(turn.iters(7) > 0, turn.queues) for _, turn in one} == {(number < 5, 0 if number < 5 else 5)}
        assert len({one[0][0] for one in rounds}) == 4  # not always the same one is first

    @pytest.mark.parametrize("iters", [0, 1, 2, 4, 5, 7, 100, 103])
    def test_all_iterations_are_shared_out(self, iters):
        mine = [turn for _, turn in schedule(planned(case(iters=iters)), PLENTY)]
        shares = [turn.iters(iters) for turn in mine]
        assert sum(shares) == iters
        assert len(mine) == turns(case(iters=iters)) == min(iters, ROUNDS) + 1
        assert shares[-1] == 0
        assert max(shares[:-1], default=0) - min(shares[:-1], default=0) <= 1
        assert [turn.last for turn in mine] == [False] * (len(mine) - 1) + [True]

    @pytest.mark.parametrize("machine", [CPU, H200])
    def test_placements_take_turns_only_where_their_weights_have_room_together(self, machine):
        given = planned(*self.FOUR, machine=machine)
        both = sum(group_bytes(plan) for _, plan in (given[0], given[2]))
        assert batches(given, int(both / 0.39)) == [[0, 1, 2, 3]]
        assert batches(given, int(both / 0.41)) == [[0, 1], [2, 3]]
        parts = [plan.weight_bytes(rank) for rank in (0, 1) for plan in (given[0][1],)]
        assert group_bytes(given[0][1]) == (max(parts) if machine is H200 else sum(parts))

    def test_models_do_not_mix(self):
        other = case(model=SPEC.with_changes(name="other"))
        assert batches(planned(case(), other, other, case()), PLENTY) == [[0], [1, 2], [3]]


HERE = Machine.detect("cpu")


class Alternating(TorchBackend):
    """Gives something else every second time."""

    def forward(self, step, rows, sink):
        self.count = getattr(self, "count", 0) + 1
        super().forward(step, rows, Scaled(sink, 1 + self.count % 2))


class Switched(TorchBackend):
    factor = 1

    def forward(self, step, rows, sink):
        super().forward(step, rows, Scaled(sink, self.factor))


class Speaking(TorchBackend):
    def forward(self, step, rows, sink):
        notice("said while it ran")
        super().forward(step, rows, sink)

    def config_sources(self):
        return ("nearest:8",)


@pytest.fixture
def backends():
    added = {"alternating": Alternating, "switched": Switched, "speaking": Speaking}
    for name, backend in added.items():
        BACKENDS.register(name, backend)
    yield
    for name in added:
        BACKENDS.unregister(name)


@pytest.fixture
def made(monkeypatch):
    """The layers that were made."""
    layers = []

    class Counted(MoELayer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            layers.append(self)

    monkeypatch.setattr(measuring, "MoELayer", Counted)
    return layers


def alone(**changes):
    return case(**{"parallel": {}, "exchange": "local", "workload": {"tokens": 20}, "iters": 7, "warmup": 1} | changes)


def measured(context, one, *turn):
    return measure(context, one, one.plan(HERE), *turn)


def all_turns(context, *cases, batch=0):
    """Results after each round and the queues, by case."""
    found = {}
    for turn in range(ROUNDS + 1):
        for number, one in enumerate(cases):
            found.setdefault(number, []).append(measured(context, one, Turn(turn, ROUNDS, batch)))
    return found


class TestOnARank:
    @pytest.fixture
    def context(self):
        return RankContext(Comm.single("cpu"), "test")

    def test_a_step_is_made_and_checked_once(self, context, made):
        found = all_turns(context, alone(), alone(workload={"tokens": 9}))
        assert len(made) == 2
        for results in found.values():
            assert [len(result.rounds_us) for result in results] == [1, 2, 3, 4, 5, 5]
            assert [len(times) for times in results[-1].rounds_us] == [2, 2, 1, 1, 1]
            assert all(result.rounds_us == results[-1].rounds_us[: len(result.rounds_us)] for result in results)
            assert {result.err_oracle for result in results} == {results[0].err_oracle}
            assert results[-1].err_repeat == 0.0
            assert results[-1].err_again < 1e-2
            assert sum(results[0].stages_us.values()) > 0
        assert context.memo["kept"].steps == {}  # after the last turn nothing is

    def test_steps_in_queues_are_timed_when_all_rounds_are_over(self, context, monkeypatch):
        """And the clock itself once in all; `merge` takes the slowest rank of each queue."""
        lengths, nothing = [], []
        chain, empty = measuring.time_chain, measuring.time_nothing
        monkeypatch.setattr(measuring, "time_chain", lambda *given: lengths.append(given[2]) or chain(*given))
        monkeypatch.setattr(measuring, "time_nothing", lambda *given: nothing.append(1) or empty(*given))
        found = all_turns(context, alone(), alone(workload={"tokens": 9}))
        for results in found.values():
            assert [len(result.chained_us) for result in results] == [0, 0, 0, 0, 0, 3]  # 5 on a GPU
            assert len({result.clock_us for result in results}) == 1
            assert {result.chained_steps for result in results[:-1]} == {None}
            assert 4 <= results[-1].chained_steps <= 32
            assert min(results[-1].chained_us) > results[-1].clock_us > 0
        assert sorted(lengths) == sorted([results[-1].chained_steps for results in found.values()] * 3)
        assert nothing == [1]
        last = replace(found[0][-1], chained_us=(1.0, 9.0, 5.0), clock_us=0.2)
        other = replace(last, chained_us=(2.0, 8.0, 6.0), clock_us=0.1)
        assert (merge([last, other]).chained_us, merge([last, other]).clock_us) == (6.0, 0.2)

    def test_the_output_of_a_queue_is_checked(self, context, backends, monkeypatch):
        """Where nothing but its last step is wrong."""

        def chain(comm, step, steps, queued):
            Switched.factor = 2
            step()
            Switched.factor = 1
            return 1.0

        monkeypatch.setattr(measuring, "time_chain", chain)
        assert measured(context, alone(backend="switched")).err_repeat > 0.3

    def test_time_in_no_stage_is_told(self, context, monkeypatch):
        forward = MoELayer.forward

        def late(self, *arguments, **options):
            time.sleep(0.02)
            return forward(self, *arguments, **options)

        before = measured(context, alone())
        monkeypatch.setattr(MoELayer, "forward", late)
        after = measured(context, alone())
        assert 0 < before.unstaged_us < 20_000 < after.unstaged_us
        assert sum(after.stages_us.values()) < 20_000

    def test_a_step_and_its_stages_are_of_one_run(self, monkeypatch):
        """The median of the differences, not the difference of medians, and less than nothing where that was found."""
        for staged, expected in (([90.0, 50.0, 310.0], 10.0), ([104.0, 201.0, 310.0], -4.0)):
            wholes, stages = iter([100.0, 200.0, 300.0]), iter(staged)
            monkeypatch.setattr(steps, "time_steps", lambda *_, wholes=wholes, **__: [next(wholes)])
            graph = SimpleNamespace(replay=None, totals_us=lambda stages=stages: {"gemm1": next(stages)})
            captured = SimpleNamespace(with_stages=lambda graph=graph: graph)
            module = SimpleNamespace(comm=SimpleNamespace(device=torch.device("cpu")))
            step = steps.Prepared([], [], torch.zeros(1), [[]], 1, module, captured)
            assert step.staged(3) == ({"gemm1": sorted(staged)[1]}, expected)

    @pytest.mark.parametrize("why", ["large", "turned"])
    def test_a_step_that_was_not_kept_is_made_again_and_gives_the_same(self, context, made, monkeypatch, why):
        """Another backend turns the weights that the first one was prepared with."""
        if why == "large":
            monkeypatch.setattr(steps, "SMALL", 0)
            found = all_turns(context, alone())
            assert len(made) == ROUNDS + 1
        else:
            found = {0: [measured(context, alone(), Turn(0, 3, 0))]}
            (weights,) = context.memo["weights"].values()
            weights[0].turn(gate_first=False)
            found[0] += [measured(context, alone(), Turn(number, 3, 0)) for number in (1, 2)]
            assert len(made) == 2
        assert found[0][-1].err_repeat == 0.0

    def test_weights_stay_within_a_batch_only(self, context, monkeypatch):
        loaded, load = [], loading._load
        monkeypatch.setattr(loading, "_load", lambda *given: loaded.append(given[1].model.name) or load(*given))
        other = alone(model=SPEC.with_changes(name="other"))
        all_turns(context, alone(), other, batch=0)
        assert loaded == ["small", "other"]
        all_turns(context, other, batch=1)
        assert loaded == ["small", "other"]
        assert len(context.memo["weights"]) == 1
        measured(context, alone())
        measured(context, other)
        assert loaded == ["small", "other", "small", "other"]
        assert len(context.memo["weights"]) == 1

    def test_expectations_are_not_another_placement_s(self, context):
        """Two layers of one workload in one batch, each against its own weights."""
        other = alone(model=SPEC.with_changes(name="other"), source={"seed": 5})
        for results in all_turns(context, alone(), other).values():
            assert results[0].err_oracle < 1e-2

    def test_an_output_that_changes_is_seen(self, context, backends):
        (result,) = (results[-1] for results in all_turns(context, alone(backend="alternating", check=False)).values())
        assert result.err_repeat > 0.3

    def test_what_is_said_comes_back_in_the_turn_that_said_it(self, context, backends):
        found = all_turns(context, alone(backend="speaking"))[0]
        assert {result.notices for result in found} == {("said while it ran",)}
        assert found[-1].config == ("nearest:8",)
        assert measured(context, alone()).config == measured(context, alone()).notices == ()

    def test_without_times_nothing_is_timed(self, context, made):
        result = measured(context, alone(iters=0))
        assert (result.rounds_us, result.stages_us, result.unstaged_us, result.err_repeat) == ([], {}, None, 0.0)
        assert (result.chained_us, result.chained_steps, result.clock_us) == ((), None, None)
        assert result.err_oracle < 1e-2
        assert len(made) == 1


def test_ranks_that_say_it_later_are_named_in_the_results():
    outcome = Outcome()
    assert outcome.add_notices({"a": [2]}) == ["rank 2: a"]
    assert outcome.add_notices({"a": [0], "b": [1]}) == ["rank 1: b"]
    assert outcome.notices == {"a": [0, 2], "b": [1]}
