"""A sweep on real ranks: a case that raises loses its row and no other does, and what was interrupted is resumed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from moe_dist.bench import sweep
from moe_dist.bench.findings import RankResult
from moe_dist.bench.measure import measure
from moe_dist.bench.row import Failed
from moe_dist.commands import measuring
from moe_dist.commands.cli import main
from moe_dist.runtime.context import RankContext
from moe_dist.runtime.ray_group import RayGroup

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors can't import test modules
pytestmark = pytest.mark.usefixtures("local_ray")

SMALL = ["model.hidden=128", "model.intermediate=256", "model.num_experts=4", "model.top_k=2", "worlds=[2]"]
SWEEP = ["compare", *SMALL, "placements=[ep]", "exchanges=[ag_rs]", "warmup=0", "skews=[uniform]", "tokens=[4,5,8]"]
HEALTHY = RayGroup.run
MARK = ""  # the file that `ill_once` leaves


def ill(context: RankContext, case: Any, plan: Any, turn: Any) -> RankResult:
    """As `measure`, but for what rank 1 does in the second turn of 5 tokens."""
    if context.rank == 1 and turn.number == 1 and case.workload.tokens == 5:
        context.progress("being ill")
        raise MemoryError("out of memory, on purpose")
    return measure(context, case, plan, turn)


def ill_once(context: RankContext, case: Any, plan: Any, turn: Any) -> RankResult:
    """As `measure`, but rank 1 is killed in the second turn, once."""
    if context.rank == 1 and turn.number == 1 and not os.path.exists(MARK):
        Path(MARK).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(context, case, plan, turn)


class Watched:
    """What ranks are asked to measure, as (tokens, turn); `ends_with` is interrupted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends_with: tuple[int, int] | None = None) -> None:
        self.turns: list[tuple[int, int]] = []
        self.ends_with = ends_with
        monkeypatch.setattr(RayGroup, "run", lambda group, *given, **options: self.run(group, *given, **options))

    def run(self, group: RayGroup, function: Any, *arguments: Any, **options: Any) -> Any:
        if function in (measure, ill):
            self.turns.append((arguments[0].workload.tokens, arguments[2].number))
            if self.turns[-1] == self.ends_with and self.turns.count(self.ends_with) == 1:
                raise KeyboardInterrupt
        return HEALTHY(group, function, *arguments, **options)


def test_one_case_fails_the_sweep_is_interrupted_and_resumed(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setenv("MOE_DIST_COMMIT", "one")
    out, lines = tmp_path / "out.json", tmp_path / "rows.jsonl"
    command = [*SWEEP, "--out", str(out), "--lines", str(lines), "--resume"]

    with monkeypatch.context() as first:
        first.setattr(sweep, "measure", ill)
        watched = Watched(first, ends_with=(8, 3))
        assert main([*command, "iters=3"]) == 130
    others = [(tokens, turn) for turn in range(4) for tokens in (4, 8)]
    assert watched.turns == [(4, 0), (5, 0), (8, 0), (4, 1), (5, 1), *others]
    before, said = json.loads(out.read_text()), capsys.readouterr().err
    assert {row["global_tokens"]: (row["iters"], row["start"]) for row in before["rows"]} == {4: (3, 1), 8: (3, 1)}
    assert [row["chained_us"] is None for row in before["rows"]] == [False, True]
    (failed,) = before["failed"]
    assert (failed["rank"], failed["op"], failed["exit_code"]) == (1, "being ill", 4)
    assert failed["reason"] == "MemoryError: out of memory, on purpose"
    assert "5 sharded tokens" in failed["case"]
    assert "going on without it" in said
    assert [json.loads(each)["kind"] for each in lines.read_text().splitlines()] == ["run", "failed", "row"]

    monkeypatch.setattr(measuring, "run_cases", lambda *_: pytest.fail("measured"))
    for changed, iters, named in (
        ("other", 3, "commit one then, other now"),
        ("one", 4, "3 of 3 cases that this experiment does not have"),
    ):
        monkeypatch.setenv("MOE_DIST_COMMIT", changed)
        assert main([*command, f"iters={iters}"]) == 2
        assert named in capsys.readouterr().err
        assert json.loads(out.read_text()) == before
    monkeypatch.undo()

    monkeypatch.setenv("MOE_DIST_COMMIT", "one")
    with monkeypatch.context() as second:
        watched = Watched(second)
        assert main([*command, "iters=3"]) == 0
    assert "1 of 3 cases is finished" in capsys.readouterr().err
    assert sorted(watched.turns) == [(tokens, turn) for tokens in (5, 8) for turn in range(4)]
    after = json.loads(out.read_text())
    assert {row["global_tokens"]: (row["iters"], row["run"]) for row in after["rows"]} == {
        4: (3, 0), 5: (3, 1), 8: (3, 1),
    }  # fmt: skip
    assert after["rows"][0] == before["rows"][0]
    keys = {row["global_tokens"]: row["key"] for row in after["rows"]}
    assert keys == {row["global_tokens"]: row["key"] for row in before["rows"]} | {5: failed["key"]}
    assert (after["failed"], len(after["runs"])) == ([], 2)
    kinds = [json.loads(each)["kind"] for each in lines.read_text().splitlines()]
    assert kinds == ["run", "run", "row", "row", "row"]

    monkeypatch.setattr(sweep._Sweep, "_started", lambda *_: pytest.fail("ranks were started"))
    assert main([*SWEEP, "iters=3", "--out", str(out), "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == after["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "compare"])
def test_a_case_is_measured_again_on_fresh_ranks(monkeypatch, tmp_path: Path, capsys, command):
    monkeypatch.setattr(sys.modules[__name__], "MARK", str(tmp_path / "mark"))
    monkeypatch.setattr(sweep, "measure", ill_once)
    out = tmp_path / "out.json"
    assert main([command, *SWEEP[1:-1], "tokens=[4]", "iters=3", "ray.restarts=1", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["start"], row["iters"], row["ok"]) == (1, 3, True)
    said = " ".join(capsys.readouterr().err.split())
    assert "rank 1 failed in" in said
    assert "its process died of SIGKILL" in said
    assert "; restart 1 of 1" in said


def test_the_command_ends_with_the_code_of_what_failed(monkeypatch, capsys):
    def failing(planned, start, timeout_s, outcome, *rest):
        assert rest[-2:] == (True, 0)  # it goes on, and repeats nothing
        for key, code in (("a", 3), ("b", 4)):
            known = {"run": 0, "case": "c", "error": "E", "rank": None, "op": None, "reason": "no room"}
            outcome.fail(Failed(key=key, exit_code=code, **known))

    monkeypatch.setattr(measuring, "run_cases", failing)
    assert main([*SWEEP, "iters=1"]) == 3
    assert "Failed, and why" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "--resume = True: is of a results file, and none is given"), (["--out", "/dev/null"], "is no regular file")],
)
def test_what_can_not_be_resumed(arguments, said, capsys):
    assert main([*SWEEP, "--resume", *arguments]) == 2
    assert said in capsys.readouterr().err
