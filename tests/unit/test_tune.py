"""Tuning on the CPU with a backend made for it: the fastest config that runs and agrees with the oracle, or none."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch

from moe_dist import tables
from moe_dist.backends import BACKENDS
from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.bench import peaks, tune
from moe_dist.bench.case import Case
from moe_dist.bench.peaks import Peaks
from moe_dist.bench.roofline import floor_us, group_work
from moe_dist.bench.tune import count_steps, tune_shape
from moe_dist.commands.cli import main
from moe_dist.engine.plan import Plan
from moe_dist.machine.machine import Machine
from moe_dist.model.placement import Placement
from moe_dist.model.spec import MoESpec, ParallelSpec, WorkloadSpec
from moe_dist.step.rows import Support
from moe_dist.tables import find_table, read_table, user_folder

CPU = Machine("cpu", 1, "a test's CPU")
SPEC = MoESpec(name="small", hidden=128, intermediate=384, num_experts=6, top_k=2)
SMALL = ["model.hidden=128", "model.intermediate=384", "model.num_experts=6", "model.top_k=2"]
SLOW, FAST = {"sleep_ms": 24}, {"sleep_ms": 0}  # the sum itself takes a millisecond
RAISES, WRONG, NAN = ({"trick": trick} for trick in ("raises", "wrong", "nan"))


class Tricky(TorchBackend):
    """Its configs sleep, raise or give wrong numbers in no time."""

    table_revision = 7
    default = SLOW
    others = (RAISES, WRONG, {"sleep_ms": 12}, FAST, SLOW, NAN)
    seen: list = []  # noqa: RUF012  (config, rows) of every forward

    @classmethod
    def candidates(cls, problem, rows):
        return [dict(config) for config in cls.others]

    @classmethod
    def default_config(cls, problem, rows):
        return dict(cls.default)

    def use_config(self, config):
        self.forced = config

    def forward(self, step, rows, sink):
        config = self.forced
        self.seen.append((config, rows))
        trick = config.get("trick")
        if trick == "raises":
            raise RuntimeError("out of resource: shared memory\nand much more")
        if trick:
            fill = float("nan") if trick == "nan" else 0.5
            sink.put_all(sink.whole(step).fill_(fill))
            return
        time.sleep(config["sleep_ms"] / 1000)
        super().forward(step, rows, sink)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Few iterations, a cache and a backend of this test's own, and one thread: several wait for each other where
    others want the cores, longer than configs differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("MOE_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "QUICK", 1)
    monkeypatch.setattr(tune, "CAREFUL", 3)
    monkeypatch.setattr(tune, "FORWARDS", 2)
    monkeypatch.setattr(Tricky, "seen", [])
    tables.find_table.cache_clear()
    BACKENDS.register("tricky", Tricky)
    yield
    torch.set_num_threads(threads)
    BACKENDS.unregister("tricky")
    tables.find_table.cache_clear()


def plan(spec: MoESpec = SPEC, **parallel) -> Plan:
    placed = ParallelSpec(**parallel)
    exchange = "local" if placed.world == 1 else "ag_rs"
    case = Case(model=spec, parallel=placed, exchange=exchange, backend="tricky", workload=WorkloadSpec(tokens=1))
    return case.plan(CPU)


def tuned(made: Plan, buckets: list[int], part: int = 0, seeds: int = 2, step=lambda: None):
    return tune_shape(made, made.parts()[part], buckets, seeds, 0, lambda _: None, step)


class TestTuneShape:
    def test_the_fastest_sound_config_wins(self):
        result = tuned(plan(), [4, 32])
        assert result.table.shape == tables.Shape("tricky", "cpu", "fp8_block", "swiglu", 128, 384, 6, 6, 2)
        assert result.table.revision == 7
        assert {"torch", "cpu"} <= set(result.table.machine)
        assert list(result.table.entries) == [4, 32]
        for found in result.found:
            assert (found.tried, found.raised, found.wrong) == (6, 1, 2)  # SLOW is the default and counts once
            assert found.entry.config == FAST
            assert found.entry.us < found.entry.default_us >= 24_000  # no bound on the faster: machines get busy
            assert 0 < found.entry.err_oracle < 1e-2
            assert found.entry.floor_us is None  # no peaks of this CPU are known
        assert result.found[0].reason == "trick=raises raises RuntimeError: out of resource: shared memory"

    def test_the_default_stays_where_nothing_beats_it(self, monkeypatch):
        monkeypatch.setattr(Tricky, "default", FAST)
        (found,) = tuned(plan(), [4]).found
        assert found.entry.config == FAST
        assert found.entry.us == found.entry.default_us

    def test_wrong_candidates_do_not_crowd_out_the_sound_ones(self, monkeypatch):
        wrong = [{"trick": "wrong", "n": n} for n in range(2 * tune.FINALISTS)]
        monkeypatch.setattr(Tricky, "others", (*wrong, FAST))
        (found,) = tuned(plan(), [4]).found
        assert found.entry.config == FAST
        assert found.wrong == len(wrong)

    def test_only_the_best_are_timed_carefully(self, monkeypatch):
        monkeypatch.setattr(Tricky, "others", tuple({"sleep_ms": ms} for ms in (0, 3, 6, 32, 40)))
        tuned(plan(), [4], seeds=3)
        assert len({id(rows) for config, rows in Tricky.seen if config["sleep_ms"] == 3}) == 3 * tune.FORWARDS
        assert len({id(rows) for config, rows in Tricky.seen if config["sleep_ms"] == 40}) == tune.FORWARDS

    @pytest.mark.parametrize(("default", "why"), [(WRONG, "is off the oracle by"), (RAISES, "raises RuntimeError")])
    def test_nothing_is_written_where_the_default_fails(self, monkeypatch, default, why):
        monkeypatch.setattr(Tricky, "default", default)
        result = tuned(plan(), [4])
        assert result.table is None
        (found,) = result.found
        assert found.entry is None
        assert f"the default config {why}" in found.reason

    def test_one_seed_out_of_tolerance_is_enough(self, monkeypatch):
        expectations = []

        def off_with_the_second_seed(measured, expected):
            expectations.append(expected)
            return 1.0 if Tricky.seen[-1][0] == FAST and expected is not expectations[0] else 1e-3

        monkeypatch.setattr(tune, "relative_error", off_with_the_second_seed)
        monkeypatch.setattr(Tricky, "others", (FAST, {"sleep_ms": 2}))
        (found,) = tuned(plan(), [4]).found
        assert found.entry.config == {"sleep_ms": 2}
        assert found.entry.err_oracle == 1e-3
        assert found.wrong == 1

    def test_a_rank_of_an_expert_group_sees_pairs_that_are_elsewhere(self):
        result = tuned(plan(ep=3), [32])
        slots = torch.cat([rows.slots_RK for _, rows in Tricky.seen])
        assert set(slots.unique().tolist()) == {-1, 0, 1}
        assert (slots >= 0).float().mean() == pytest.approx(1 / 3, abs=0.1)
        assert (result.table.shape.experts, result.table.shape.width) == (2, 384)
        assert all(not isinstance(rows.x, torch.Tensor) for _, rows in Tricky.seen)  # rows would travel as FP8

    def test_every_forward_has_work(self):
        tuned(plan(ep=6), [1], seeds=3)
        distinct = {id(rows): rows for _, rows in Tricky.seen}
        assert len(distinct) == 3 * tune.FORWARDS
        assert all((rows.slots_RK >= 0).any() for rows in distinct.values())

    def test_floor(self, monkeypatch):
        monkeypatch.setitem(peaks.PEAKS, "cpu", Peaks(1e9, 1e9, 1e30))
        (found,) = tuned(plan(), [4]).found
        whole = Placement.build(SPEC, ParallelSpec())
        works = group_work(SPEC, whole, [4 * SPEC.top_k], [6])
        assert found.entry.floor_us == pytest.approx(floor_us(SPEC, works, "cpu"), abs=0.01)


class TestParts:
    def test_each_shape_once(self):
        shapes = [part.shape for part in plan(tp=2, ep=4).parts()]
        assert {(shape.width, shape.experts) for shape in shapes} == {(256, 2), (128, 2), (256, 1), (128, 1)}
        assert len(shapes) == 4

    @pytest.mark.parametrize(("how", "width"), [("replicated", 256), ("tp", 128)])
    def test_a_shared_expert_is_one_more(self, how, width):
        made = plan(SPEC.with_changes(shared_experts=how, shared_intermediate=256), ep=2)
        shapes = [part.shape for part in made.parts()]
        assert [(shape.width, shape.experts, shape.top_k) for shape in shapes] == [(384, 3, 2), (width, 1, 1)]
        found = tuned(made, [4], part=1).found
        assert found[0].entry.config == FAST

    def test_an_empty_shard_is_none(self):
        assert len(plan(ep=8, allow_empty_shards=True).parts()) == 1
        assert len(plan(tp=4, allow_empty_shards=True).parts()) == 1

    def test_steps_are_counted_as_they_are_made(self):
        made, steps = plan(), []
        tuned(made, [1, 8], step=lambda: steps.append(1))
        assert len(steps) == count_steps(made, [1, 8])


class TestCommand:
    @pytest.fixture
    def command(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")  # where a config stands in one line

        def call(*arguments: object):
            capsys.readouterr()
            code = main([str(argument) for argument in arguments])
            return code, *capsys.readouterr()

        return call

    def test_tables_are_made_shown_and_found(self, command, monkeypatch):
        monkeypatch.setattr("moe_dist.commands.progress.EVERY_S", 0.0)
        arguments = ["--backend", "tricky", "--tp", "2", "--device", "cpu", *SMALL]
        code, out, err = command("tune", *arguments, "--rows", "8,1", "--seeds", "1")
        assert code == 0
        names = {f"tricky--cpu--fp8_block--swiglu--H128-I{width}-E6of6-K2.json" for width in (256, 128)}
        assert {path.name for path in user_folder().iterdir()} == names
        for name in names:
            made = read_table(user_folder() / name)
            assert {rows: entry.config for rows, entry in made.entries.items()} == {1: FAST, 8: FAST}
            assert f"table: {user_folder() / name}" in out
        assert "sleep_ms=0" in out
        assert "1 row: trick=raises raises RuntimeError: out of resource" in out
        assert re.search(
            r"\[1/28\] tiny I256 E6, 1 row: candidate 2 of 6, best so far [\d,.]+ µs, about \d+ s left", err
        )

        code, out, _ = command("plan", *arguments, "--json")
        assert json.loads(out)["tables"] == dict.fromkeys(names, "user")
        assert all(f"tuned: user {name}" in command("plan", *arguments)[1] for name in names)

    def test_json_and_a_folder(self, command, tmp_path: Path):
        arguments = ["--backend", "tricky", "--rows", "4", "--out", tmp_path / "new", "--json", *SMALL]
        code, out, _ = command("tune", "--device", "cpu", *arguments)
        assert code == 0
        (document,) = json.loads(out)
        assert document["file"] == str(tmp_path / "new" / "tricky--cpu--fp8_block--swiglu--H128-I384-E6of6-K2.json")
        assert document["shape"]["width"] == 384
        (found,) = document["found"]
        assert (found["rows"], found["entry"]["config"], found["raised"], found["wrong"]) == (4, FAST, 1, 2)
        assert not user_folder().exists()
        assert find_table(read_table(Path(document["file"])).shape, 7) is None  # it lies where nobody looks

    def test_what_was_there_is_kept_where_nothing_is_found(self, command, monkeypatch):
        arguments = ["tune", "--backend", "tricky", "--rows", "4", "--device", "cpu", *SMALL]
        assert command(*arguments)[0] == 0
        (path,) = user_folder().iterdir()
        before = path.read_text()
        monkeypatch.setattr(Tricky, "default", WRONG)
        code, out, _ = command(*arguments)
        assert code == 1
        assert "none: the default config is off the oracle by" in out
        assert path.read_text() == before

    def test_a_plan_without_table_says_so(self, command):
        arguments = ["plan", "--device", "cpu", *SMALL]
        name = "tricky--cpu--fp8_block--swiglu--H128-I384-E6of6-K2.json"
        assert f"tuned: none, defaults (no {name})" in command(*arguments, "--backend", "tricky")[1]
        assert json.loads(command(*arguments, "--backend", "tricky", "--json")[1])["tables"] == {name: None}
        assert "tuned:" not in command(*arguments)[1]
        assert json.loads(command(*arguments, "--json")[1])["tables"] == {}

    @pytest.mark.parametrize(
        ("arguments", "code", "said"),
        [
            (["--backend", "torch"], 2, "tuning backend torch is not supported: it has nothing to tune"),
            (["--backend", "nosuch"], 2, "no backend has this name"),
            (["--backend", "tricky", "--rows", "1,x"], 2, "rows = '1,x'"),
            (["--backend", "tricky", "--rows", "0,8"], 2, "--rows = 0: is no number of rows"),
            (["--backend", "tricky", "--seeds", "0"], 2, "--seeds = 0"),
            (["--backend", "tricky", "--tp", "9"], 2, "1 to 5"),
            (["--backend", "tricky", "--model", "nosuch"], 2, "no model of this name"),
            (["--backend", "tricky", "--out", __file__], 2, f"--out = '{__file__}"),
            (["--backend", "tricky", "tokens=[8]"], 2, "only the model can be changed here"),
        ],
        ids=lambda value: Path(value[-1]).name if isinstance(value, list) else "",
    )
    def test_refusals(self, command, arguments, code, said):
        found, out, err = command("tune", "--device", "cpu", *arguments)
        assert (found, out) == (code, "")
        assert said in err
        assert not user_folder().exists()
        assert Tricky.seen == []

    def test_a_problem_that_the_backend_does_not_support(self, command, monkeypatch):
        monkeypatch.setattr(Tricky, "supports", lambda problem: Support(problem.width > 128, "slices are too narrow"))
        code, _, err = command("tune", "--backend", "tricky", "--device", "cpu", "--tp", "2", *SMALL)
        assert code == 2
        assert "slices are too narrow" in err

    def test_a_backend_that_needs_a_gpu(self, command, monkeypatch):
        monkeypatch.setattr(Tricky, "available", lambda device: Support(device == "cuda", "needs a Hopper GPU"))
        code, out, err = command("tune", "--backend", "tricky", "--device", "cpu", "--json", *SMALL)
        assert code == 3
        assert json.loads(out)["error"] == "ResourceError"
        assert "not enough CUDA devices: 1 needed, 0 available. Backend tricky: needs a Hopper GPU." in err

    def test_more_than_the_memory_holds(self, command):
        code, _, err = command(
            "tune", "--backend", "tricky", "--device", "cpu", "model.hidden=1000000", "model.intermediate=1000000"
        )
        assert code == 3
        assert "not enough memory" in err
