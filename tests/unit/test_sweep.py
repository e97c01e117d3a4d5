"""Sweeps: what becomes of a case that fails, what is measured again, how long the rest takes, and what is resumed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from unit.test_bench import CPU, SPEC, case, printed, ran_by, rank_result, row

from moe_dist.bench import identity, sweep
from moe_dist.bench.answer import tied
from moe_dist.bench.case import Experiment
from moe_dist.bench.identity import case_key
from moe_dist.bench.measure import measure, ready
from moe_dist.bench.results import Outcome, provenance, results_document
from moe_dist.bench.resume import resumed
from moe_dist.bench.rounds import ROUNDS, Turn
from moe_dist.bench.row import Failed
from moe_dist.bench.sweep import MOST_STARTS, Item, Left, run_cases
from moe_dist.bench.table import failed_table
from moe_dist.commands import measuring
from moe_dist.commands.flags import Measuring
from moe_dist.errors import ClusterLost, ConfigError, RankFailure, ResourceError
from moe_dist.runtime.context import RaySpec
from moe_dist.runtime.voice import Launched

LOST = RankFailure(1, "all_gather", 7, "gone")
EXCHANGES = "ag_rs", "all_to_all", "all_reduce"
LATE = "all_reduce", ROUNDS  # the last turn of all: the two other cases are finished
CASES = tuple(case(exchange=exchange, iters=5) for exchange in EXCHANGES)


def planned(*cases):
    return [(one, one.plan(CPU)) for one in cases]


class Ranks:
    """Groups of ranks whose findings are known. `raises`: by exchange and turn, each once or, of turn None, always;
    `starts`: what the next starts raise."""

    runtime = "fake"

    def __init__(self, raises=(), starts=(), said=None, nodes=None):
        self.given_nodes = nodes
        self.raises, self.starts, self.said = dict(raises), list(starts), said or {}
        self.calls = []

    def start(self, world, shown):
        error = self.starts.pop(0) if self.starts else None
        self.calls.append("failed to start" if error else "started")
        if error:
            raise error
        self.world, self.rounds = world, {}
        self.nodes = self.given_nodes or (world,)
        return self

    def describe(self):
        return [f"rank {rank}" for rank in range(self.world)]

    def run(self, function, *arguments, timeout_s, shown):
        if function is ready:
            assert arguments == (CPU,)
            if error := self.raises.pop("ready", None):
                raise error
            return [None] * self.world
        assert function is measure
        one, plan, turn = arguments
        error = self.raises.pop((one.exchange, turn.number), self.raises.get((one.exchange, None)))
        if error:
            raise error
        self.calls.append((one.exchange, turn.number))
        times = self.rounds.setdefault(one.exchange, [])
        assert len(times) == turn.number  # these ranks have had the turns before
        if not turn.last:
            times.append([100.0 * (turn.number + 1)])
        queues = (90.0, 70.0, 80.0) if turn.last else ()
        given = {"rounds_us": list(times), "chained_us": queues, "ran": ran_by(plan)}
        ranks = [rank_result(**given, notices=self.said.get(rank, ())) for rank in range(self.world)]
        return [replace(ranks[0], rows=20), *ranks[1:]]

    def close(self):
        self.calls.append("closed")

    @property
    def turns(self):
        return [call for call in self.calls if isinstance(call, tuple)]


def swept(ranks, cases=CASES, outcome=None, go_on=True, restarts=0):
    """The outcome, the lines that were said, and what each step came to."""
    outcome, lines, steps = outcome or Outcome(), [], []
    pairs = cases if isinstance(cases, list) else planned(*cases)
    run_cases(pairs, ranks.start, 1.0, outcome, lambda _: None, lines.append, steps.append, "fake", go_on, restarts)
    return outcome, lines, steps


class TestRows:
    def test_a_case_has_one_row_which_grows(self):
        ranks, outcome, seen = Ranks(), Outcome(), []
        arguments = (
            lambda _: None,
            lambda _: None,
            lambda _: seen.append([len(row.round_p50_us) for row in outcome.rows]),
        )
        run_cases(planned(*CASES[:2]), ranks.start, 1.0, outcome, *arguments, "fake")
        assert len(ranks.turns) == 2 * (ROUNDS + 1)
        assert [row.exchange for row in outcome.rows] == ["ag_rs", "all_to_all"]
        for found in outcome.rows:
            assert found.round_p50_us == (100.0, 200.0, 300.0, 400.0, 500.0)
            assert (found.chained_us, found.run, found.start) == (80.0, 0, 0)
        assert seen[:4] == [[1], [1, 1], [2, 1], [2, 2]]
        assert ranks.calls[-1] == "closed"

    def test_ranks_are_heard_once(self):
        outcome, lines, _ = swept(Ranks(said={0: ("a",), 1: ("a", "b")}))
        assert lines == ["rank 0, 1: a", "rank 1: b"]
        assert outcome.notices == {"a": [0, 1], "b": [1]}

    def test_a_row_is_told_when_it_is_finished(self):
        outcome, _, steps = swept(Ranks())
        ended = [step.ended for step in steps if step.ended]
        assert {each.key: each for each in ended} == {each.key: each for each in outcome.rows}
        assert [step.turns_left for step in steps] == list(range(len(steps)))[::-1]


class TestFailures:
    def test_a_case_that_raises_loses_its_row_and_no_other_does(self):
        ranks = Ranks({("all_to_all", 2): LOST})
        outcome, lines, steps = swept(ranks)
        assert {row.exchange: (row.iters, row.start) for row in outcome.rows} == {
            "ag_rs": (5, 1), "all_reduce": (5, 1),
        }  # fmt: skip
        (failed,) = outcome.failed
        assert (failed.rank, failed.op, failed.reason, failed.exit_code) == (1, "all_gather", "gone", 4)
        assert (failed.error, failed.case, failed.run) == ("RankFailure", CASES[1].label, 0)
        assert failed.key == case_key(*planned(CASES[1])[0], "fake")
        assert ranks.calls.count("started") == ranks.calls.count("closed") == 2
        assert [turn for name, turn in ranks.turns if name == "all_to_all"] == [0, 1]
        assert lines == [f"{CASES[1].label}: {LOST}; going on without it"]
        assert [step.turns_left for step in steps if step.ended == failed] == [2 * (ROUNDS + 1)]
        assert steps[-1].turns_left == 0
        assert not outcome.ok
        assert "rank 1: gone" in printed(failed_table(outcome.failed))

    def test_what_is_finished_before_is_not_measured_again(self):
        ranks = Ranks({("all_to_all", ROUNDS): LOST})
        outcome, _, _ = swept(ranks)
        again = ranks.calls[ranks.calls.index("closed") + 1 :]
        assert again == ["started", *(("all_reduce", turn) for turn in range(ROUNDS + 1)), "closed"]
        assert {row.exchange: (row.iters, row.start) for row in outcome.rows} == {
            "ag_rs": (5, 0), "all_reduce": (5, 1),
        }  # fmt: skip

    def test_every_case_may_fail(self):
        ranks = Ranks({(name, None): ResourceError("memory", 2, 1, "Less.") for name in EXCHANGES})
        outcome, _, _ = swept(ranks)
        assert outcome.rows == []
        assert [failed.exit_code for failed in outcome.failed] == [3, 3, 3]
        assert outcome.failed[0].rank is outcome.failed[0].op is None
        assert ranks.calls == ["started", "closed"] * 3

    @pytest.mark.parametrize(
        "error", [ClusterLost("a:1", "measuring", "gone"), KeyboardInterrupt(), ValueError("fault")]
    )
    def test_what_is_no_case_s_failure_ends_it(self, error):
        ranks, outcome = Ranks({("all_to_all", 1): error}), Outcome()
        with pytest.raises(type(error)):
            swept(ranks, outcome=outcome)
        assert ranks.calls[-1] == "closed"
        assert outcome.failed == []
        assert len(outcome.rows) == 3  # what was measured before

    def test_a_single_configuration_s_error_is_raised(self):
        ranks, outcome = Ranks({("all_to_all", 0): LOST}), Outcome()
        with pytest.raises(RankFailure, match="gone"):
            swept(ranks, outcome=outcome, go_on=False)
        assert (outcome.failed, len(outcome.rows)) == ([], 1)

    def test_a_first_group_that_does_not_start_ends_it_at_once(self):
        for ranks in (Ranks(starts=[LOST]), Ranks({"ready": LOST})):
            with pytest.raises(RankFailure):
                swept(ranks)
            assert len(ranks.calls) == 1 + ("closed" in ranks.calls)

    def test_a_rank_that_fails_before_any_case_is_started_again_where_restarts_are_left(self):
        for ranks in (Ranks(starts=[LOST, LOST]), Ranks({"ready": LOST}, [None, LOST])):
            outcome, lines, _ = swept(ranks, restarts=2)
            assert (len(outcome.rows), outcome.failed) == (3, [])
            assert lines == [f"{LOST}; restart {number} of 2" for number in (1, 2)]
        with pytest.raises(RankFailure):
            swept(Ranks(starts=[LOST, LOST]), restarts=1)
        with pytest.raises(ResourceError):
            swept(Ranks(starts=[ResourceError("CPUs", 2, 1, "More.")]), restarts=1)

    def test_starts_after_a_failure_are_bounded(self):
        broken = ResourceError("CPUs", 2, 1, "More.")
        ranks = Ranks({("ag_rs", 1): LOST}, [None, *[broken] * (MOST_STARTS - 1)])
        outcome, lines, _ = swept(ranks)
        assert len(outcome.rows) == 2
        assert sum("could not be started again" in line for line in lines) == MOST_STARTS - 1
        ranks = Ranks({("ag_rs", 1): LOST}, [None, *[broken] * MOST_STARTS])
        outcome = Outcome()
        with pytest.raises(ResourceError):
            swept(ranks, outcome=outcome)
        assert ranks.calls.count("failed to start") == MOST_STARTS
        assert len(outcome.failed) == 1
        assert len(outcome.rows) == 2  # with the rounds that they had


class TestRestarts:
    def test_a_case_is_measured_again_from_its_start(self):
        ranks = Ranks({("all_to_all", 2): LOST})
        outcome, lines, steps = swept(ranks, restarts=2)
        assert lines == [f"{CASES[1].label}: {LOST}; restart 1 of 2"]
        assert {row.exchange: (row.iters, row.start) for row in outcome.rows} == dict.fromkeys(EXCHANGES, (5, 1))
        assert [turn for name, turn in ranks.turns if name == "all_to_all"] == [0, 1, *range(ROUNDS + 1)]
        assert outcome.failed == []
        assert steps[-1].turns_left == 0

    def test_after_the_last_one_the_first_failure_counts(self):
        ranks = Ranks({("all_to_all", None): RankFailure(0, "barrier", 9, "again"), ("all_to_all", 0): LOST})
        outcome, lines, _ = swept(ranks, restarts=2)
        assert lines[0].endswith("gone; restart 1 of 2")
        assert lines[1].endswith("again; restart 2 of 2")
        assert lines[2:] == [f"{CASES[1].label}: {LOST}; going on without it"]
        assert [(failed.reason, failed.rank) for failed in outcome.failed] == [("gone", 1)]
        assert len(outcome.rows) == 2

    def test_of_a_single_configuration(self):
        ranks = Ranks({("ag_rs", 3): LOST})
        outcome, _, _ = swept(ranks, CASES[:1], go_on=False, restarts=1)
        assert outcome.ok
        ranks = Ranks({("ag_rs", None): RankFailure(0, "barrier", 9, "again"), ("ag_rs", 0): LOST})
        with pytest.raises(RankFailure, match="gone"):
            swept(ranks, CASES[:1], go_on=False, restarts=1)
        assert ranks.calls == ["started", "closed"] * 2

    def test_what_would_fail_the_same_way_is_not_repeated(self):
        ranks = Ranks({("all_to_all", None): ResourceError("memory", 2, 1, "Less.")})
        outcome, lines, _ = swept(ranks, restarts=2)
        assert len(outcome.failed) == 1
        assert not any("restart" in line for line in lines)

    def test_torchrun_s_ranks_are_torchrun_s_to_start(self, monkeypatch):
        monkeypatch.setattr(measuring, "launched", lambda: Launched(0, 4, 0, 4))
        experiment = Experiment(models=(SPEC,), runtime="torchrun", ray=RaySpec(restarts=1))
        with pytest.raises(ConfigError, match=r"ray\.restarts = 1: torchrun ends all ranks"):
            measuring._check_names_and_launcher(SimpleNamespace(experiment=experiment))


class TestTimeLeft:
    def left(self):
        return Left.of([Item(*pair, key) for pair, key in zip(planned(*CASES[:2]), "ab", strict=True)])

    def test_first_turns_and_later_ones_are_told_apart(self):
        left = self.left()
        assert left.seconds() is None
        left.done("a", Turn(0, ROUNDS, 0), 20.0)
        assert left.seconds() == 20.0 * 11  # for want of anything better
        left.done("a", Turn(1, ROUNDS, 0), 1.0)
        left.done("a", Turn(2, ROUNDS, 0), 3.0)
        assert left.seconds() == 20.0 + (3 + 5) * 2.0
        left.lost(["a", "b"])
        left.failed("b")
        assert left.turns == {"a": ROUNDS + 1, "b": 0}
        assert left.seconds() == 20.0 + 5 * 2.0

    def test_it_is_told_with_every_step(self, monkeypatch):
        now = iter(range(0, 1000, 2))
        monkeypatch.setattr(sweep.time, "monotonic", lambda: next(now))
        _, _, steps = swept(Ranks())
        assert [step.seconds_left for step in steps] == [2.0 * step.turns_left for step in steps]


class TestResume:
    @pytest.fixture
    def about(self, monkeypatch):
        monkeypatch.setenv("MOE_DIST_COMMIT", "a commit")
        return provenance(CPU)

    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "out.json"

    def killed(self, path, about, raises, cases=CASES):
        """A run that ends half-way, and the document that it leaves."""
        outcome = Outcome()
        with pytest.raises(KeyboardInterrupt):
            swept(Ranks({raises: KeyboardInterrupt()}), cases, outcome)
        document = results_document(about, outcome)
        path.write_text(json.dumps(document))
        return document

    def test_nothing_is_measured_twice(self, path, about):
        before = self.killed(path, about, LATE)
        assert [row["iters"] for row in before["rows"]] == [5, 5, 5]
        finished = {row["key"]: row for row in before["rows"] if row["chained_us"] is not None}
        assert 0 < len(finished) < 3
        outcome, left = resumed(str(path), about, planned(*CASES), "fake")
        assert len(left) == 3 - len(finished)
        ranks = Ranks()
        swept(ranks, left, outcome)
        assert {name for name, _ in ranks.turns} == {one.exchange for one, _ in left}
        after = results_document(about, outcome)
        assert [row["key"] for row in after["rows"]][: len(finished)] == list(finished)
        assert {row["key"] for row in after["rows"]} == {case_key(*pair, "fake") for pair in planned(*CASES)}
        assert all(row["iters"] == 5 for row in after["rows"])
        for found in after["rows"]:
            assert found["run"] == (0 if found["key"] in finished else 1)
            assert found["run"] == 1 or found == finished[found["key"]]
        assert len(after["runs"]) == 2

    def test_rounds_of_an_unfinished_case_stay_until_it_has_new_ones(self, path, about):
        before = self.killed(path, about, ("all_to_all", 2))
        outcome, left = resumed(str(path), about, planned(*CASES), "fake")
        assert results_document(about, outcome)["rows"] == before["rows"]
        assert len(left) == 3

    def test_a_failure_is_tried_again(self, path, about):
        first, _, _ = swept(Ranks({("all_to_all", None): LOST}))
        path.write_text(json.dumps(results_document(about, first)))
        outcome, left = resumed(str(path), about, planned(*CASES), "fake")
        assert [one.exchange for one, _ in left] == ["all_to_all"]
        assert len(outcome.failed) == 1
        swept(Ranks(), left, outcome)
        assert outcome.failed == []
        assert outcome.ok

    def test_a_third_run_knows_both_before(self, path, about):
        self.killed(path, about, LATE)
        for runs in (2, 3):
            outcome, left = resumed(str(path), about, planned(*CASES), "fake")
            if runs == 2:
                with pytest.raises(KeyboardInterrupt):
                    swept(Ranks({LATE: KeyboardInterrupt()}), left, outcome)
            else:
                swept(Ranks(), left, outcome)
            document = results_document(about, outcome)
            assert len(document["runs"]) == runs
            path.write_text(json.dumps(document))
        assert {row["exchange"]: row["run"] for row in document["rows"]} == {
            "ag_rs": 0, "all_to_all": 0, "all_reduce": 2,
        }  # fmt: skip

    def test_a_file_that_is_not_there_holds_nothing(self, path, about):
        outcome, left = resumed(str(path), about, planned(*CASES), "fake")
        assert (outcome, len(left)) == (Outcome(), 3)

    @pytest.mark.parametrize(
        ("cases", "named"),
        [
            ([case(exchange=exchange, iters=6) for exchange in EXCHANGES], "3 of 3 cases.* 5 iterations"),
            ([case(exchange=exchange, iters=5, warmup=1) for exchange in EXCHANGES], "3 of 3 cases"),
            (CASES[1:], "1 of 3 cases .*ag_rs"),
        ],
    )
    def test_another_experiment_is_refused(self, path, about, cases, named):
        self.killed(path, about, LATE)
        with pytest.raises(ConfigError, match=named):
            resumed(str(path), about, planned(*cases), "fake")

    def test_a_case_that_stands_there_twice_is_refused(self, path, about):
        self.killed(path, about, LATE)
        document = json.loads(path.read_text())
        document["rows"] += document["rows"][:1]
        path.write_text(json.dumps(document))
        with pytest.raises(ConfigError, match=r"holds a case more than once: .*ag_rs"):
            resumed(str(path), about, planned(*CASES), "fake")

    def test_an_experiment_may_have_grown(self, path, about):
        self.killed(path, about, LATE)
        _, left = resumed(str(path), about, planned(*CASES, case(exchange="ag_rs", iters=9)), "fake")
        assert {one.iters for one, _ in left} == {5, 9}

    @pytest.mark.parametrize("name", ["commit", "code", "cpu", "gpu", "count", "torch", "nccl", "driver"])
    def test_what_moves_numbers_is_named(self, path, about, name):
        self.killed(path, about, LATE)
        change = {name: 7 if name == "count" else "another"}
        other = about.model_copy(update=change)
        if name not in ("commit", "code"):
            other = about.model_copy(update={"machine": about.machine.model_copy(update=change)})
        with pytest.raises(ConfigError, match=f"{name} .* then, {change[name]} now"):
            resumed(str(path), other, planned(*CASES), "fake")

    @pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"date": "d", "rows": [{"model": "m"}]}'])
    def test_a_file_of_another_version_is_refused(self, path, about, text):
        path.write_text(text)
        with pytest.raises(ConfigError, match="is no results file that this version wrote"):
            resumed(str(path), about, planned(*CASES), "fake")
        with pytest.raises(ConfigError, match="can't be read"):
            resumed(str(path.parent), about, planned(*CASES), "fake")

    def test_torchrun_s_ranks_must_all_read_the_file(self, monkeypatch):
        asked = Measuring(out="out.json"), Experiment(models=(SPEC,), runtime="torchrun")
        monkeypatch.setattr(measuring, "launched", lambda: Launched(0, 4, 0, 4))
        assert measuring._resumable(*asked) == "out.json"
        monkeypatch.setattr(measuring, "launched", lambda: Launched(0, 4, 0, 2))
        with pytest.raises(ConfigError, match="several machines"):
            measuring._resumable(*asked)


class TestKeys:
    def key(self, one, runtime="ray"):
        return case_key(one, one.plan(CPU), runtime)

    def test_everything_that_decides_a_row_changes_it(self, monkeypatch):
        changed = [
            case(), case(iters=21), case(warmup=4), case(check=False), case(chosen_by="default"), case(form="expert"),
            case(exchange="all_to_all"), case(payload="unquantized"), case(combine_dtype="fp32"),
            case(layers=2), case(model=SPEC.with_changes(top_k=3)), case(model=SPEC.with_changes(name="other")),
            case(source={"seed": 1}), case(parallel={"tp": 2}), case(workload={"tokens": 34}),
            case(workload={"seed": 1}), case(workload={"skew": "single"}),
            case(workload={"token_layout": "replicated"}),
        ]  # fmt: skip
        keys = [self.key(one) for one in changed]
        assert len(set(keys)) == len(changed)
        assert keys[0] == self.key(case())
        assert self.key(case(), "torchrun") != keys[0]
        monkeypatch.setenv("MOE_DIST_DEBUG", "1")
        assert self.key(case()) != keys[0]

    def test_a_checkpoint_that_changes_is_another_one(self, tmp_path: Path):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_text("weights")
        one = case(source={"checkpoint": str(tmp_path), "layer": 0})
        before = self.key(one)
        assert self.key(one) == before
        os.utime(tmp_path / "model.safetensors", ns=(0, 0))
        assert self.key(one) != before

    def test_code_is_known_by_its_files(self, tmp_path, monkeypatch):
        def digest():
            identity.code_digest.cache_clear()
            return identity.code_digest()

        monkeypatch.setattr(identity, "PACKAGE", tmp_path)
        (tmp_path / "a.py").write_text("a")
        before = digest()
        (tmp_path / "__pycache__").mkdir()
        (tmp_path / "__pycache__" / "a.pyc").write_text("compiled")
        assert digest() == before
        (tmp_path / "a.py").write_text("b")
        assert digest() != before
        identity.code_digest.cache_clear()


def times(us, **changes):
    return row(p50=us, scatter_us=1.0, **changes)


def test_rows_of_two_starts_are_tied_by_more():
    """Together scatter explains 3 x sqrt(2) or 2 %, whatever is more; apart it is both."""
    for changes in ({"run": 1}, {"start": 1}):
        assert not tied(times(100.0), times(105.0))
        assert tied(times(100.0), times(105.0, **changes))
        assert not tied(times(100.0, **changes), times(105.0, **changes))
        assert not tied(times(100.0), times(107.0, **changes))


def test_a_failure_takes_the_place_of_what_was_known():
    outcome = Outcome(rows=[row(key="a"), row(key="b")])
    failed = Failed(key="b", run=0, case="c", error="E", rank=None, op=None, reason="r", exit_code=4)
    outcome.fail(failed)
    assert [known.key for known in outcome.rows] == ["a"]
    outcome.fail(failed.model_copy(update={"run": 1}))
    assert [known.run for known in outcome.failed] == [1]
    outcome.put(row(key="b"))
    assert ([known.key for known in outcome.rows], outcome.failed) == (["a", "b"], [])
