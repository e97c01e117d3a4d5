"""The same commands and the same layer without Ray, in processes that torchrun started."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LAUNCHER = HERE.parent.parent / "launch" / "torchrun.sh"


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes. --standalone: a free port, so that runs at the same time can't meet."""
    command = [LAUNCHER, "--standalone", "--nproc-per-node", "2", *arguments]
    without_ray = {"GLOO_SOCKET_IFNAME": "lo", "RAY_ADDRESS": "192.0.2.1:1"}  # nobody there: who asks, fails
    without_ray["TORCHRUN"] = str(Path(sys.executable).parent / "torchrun")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **without_ray}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_one_document_from_rank_0() -> None:
    arguments = ["run", "--runtime", "torchrun", "--ep", "2", "--tokens", "16", "--iters", "3", "--device", "cpu"]
    done = torchrun("-m", "moe_dist", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)  # one document and nothing else
    (row,) = document["rows"]
    assert row["ok"] is True
    shown = {key: row[key] for key in ("runtime", "placement", "world", "global_tokens", "tokens_per_rank", "iters")}
    assert shown == {
        "runtime": "torchrun", "placement": "EP2", "world": 2, "global_tokens": 16, "tokens_per_rank": 8, "iters": 3,
    }  # fmt: skip
    assert document["command"].startswith("moe-dist run --runtime torchrun --ep 2")


def test_a_world_that_torchrun_did_not_start_is_refused() -> None:
    arguments = ["run", "--runtime", "torchrun", "--ep", "4", "--tokens", "16", "--device", "cpu", "--json"]
    done = torchrun("-m", "moe_dist", *arguments)
    assert done.returncode == 2  # the program's; torchrun itself always ends with 1
    message = "--ep = 4: torchrun started 2 processes (legal: 2)"
    assert json.loads(done.stdout) == {"error": "ConfigError", "message": message}
    assert done.stderr.count(f"moe-dist: {message}") == 1


WAITS = r"; rank \d waits in barrier \(sequence number 21\)"
slow = partial(pytest.param, marks=pytest.mark.slow)  # the others, and ranks of Ray, show nearly as much


@pytest.mark.parametrize(
    ("how", "doomed", "cause"),
    [
        slow("raise", 1, r"ValueError: on purpose"),
        slow("interrupt", 1, r"KeyboardInterrupt"),
        slow("surrogate", 1, r"ValueError: a\\ud800b"),
        slow(
            "result", 0, r"its result, of type lock, can't be pickled: TypeError: cannot pickle '_thread.lock' object"
        ),
        slow("return", 1, r"returned after 20 collectives" + WAITS),
        ("SIGSTOP", 0, r"silent for \d s: its process is stopped \(SIGSTOP, or a debugger\)" + WAITS),
        ("SIGKILL", 0, r"its process died( of SIGKILL; where nobody sent it, the kernel did, because memory ran out)?"),
        slow("spin", 0, r"silent for \d s" + WAITS),
        # Both ranks have one deadline: the one that waits may have been freed before it is looked at.
        slow("sleep", 1, rf"not done within 4 s, here for \d s(, at doomed_rank\.py:\d+ in work)?({WAITS})?"),
    ],
)
def test_the_rank_that_fails_is_named_by_one_that_lives(how: str, doomed: int, cause: str) -> None:
    """In the promised time, on one line, with moe-dist's own exit code; rank 1 speaks where rank 0 can't."""
    done = torchrun(str(HERE / "doomed_rank.py"), how, str(doomed))
    told = rf"rank {doomed} failed in work of a doomed rank \(sequence number 20\): {cause}"
    assert len(re.findall(rf"^moe-dist: {told}$", done.stderr, re.MULTILINE)) == 1, done.stderr
    assert done.returncode == 4
    (line,) = done.stdout.splitlines()
    assert re.fullmatch(told, json.loads(line)["message"])
    (seconds,) = re.findall(r"failed after (\d+\.\d) s", done.stderr)
    assert float(seconds) < 15.0  # the collective itself would have waited for 60


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stdout.splitlines() if line.startswith("told: ")]


def test_what_ranks_have_to_say_is_told_once_with_its_ranks() -> None:
    done = torchrun(str(HERE / "speaking_ranks.py"), "group")
    assert done.returncode == 0, done.stderr
    assert told(done) == ["told: rank 0, 1: said by all", "told: rank 1: UserWarning: of another library"]


@pytest.mark.slow
def test_log_lines_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_DIST_LOG_FORMAT", "json")
    done = torchrun(str(HERE / "speaking_ranks.py"), "fails")
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert {line["rank"] for line in lines} == {0, 1}
    said = {(line["rank"], line["level"], line["message"]) for line in lines}
    assert {(0, "info", "speak"), (1, "info", "speak"), (1, "warning", "said by all")} <= said
    (failure,) = (line for line in lines if line["level"] == "error")
    assert (failure["rank"], failure["operation"]) == (1, "speak")
    assert "ValueError: on purpose" in failure["trace"]


@pytest.mark.slow
def test_what_a_rank_had_to_say_before_it_failed() -> None:
    done = torchrun(str(HERE / "speaking_ranks.py"), "fails")
    assert {"told: rank 1: said by all", "told: rank 1: UserWarning: of another library"} <= set(told(done)), done


@pytest.mark.slow
def test_a_rank_of_a_programs_own_group_says_which_it_is() -> None:
    done = torchrun(str(HERE / "speaking_ranks.py"), "layer")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("MoeDistWarning: rank 1: no table") == 1


@pytest.mark.parametrize("doomed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_death_before_there_is_a_group_is_told(doomed: int) -> None:
    """Not as SIGTERM, which torchrun sends to the other rank then."""
    done = torchrun(str(HERE / "doomed_rank.py"), "import", str(doomed))
    told = f"rank {doomed} failed in starting or ending (sequence number 0): its process died"
    assert done.returncode == 4, done.stderr
    assert json.loads(done.stdout) == {"error": "RankFailure", "message": told}
    assert done.stderr.count("moe-dist: ") == 1


def test_a_death_as_soon_as_there_is_a_group_is_told() -> None:
    done = torchrun(str(HERE / "doomed_rank.py"), "early", "1")
    assert done.returncode == 4
    # On a busy machine torchrun's SIGTERM may come before the other one can read what the first was doing.
    told = r"rank 1 failed in (work|starting or ending) \(sequence number 0\): its process died( with exit code 7)?"
    assert re.fullmatch(told, json.loads(done.stdout)["message"])


def test_a_number_out_of_tolerance_is_1_and_a_death_without_a_word_is_not() -> None:
    assert torchrun(str(HERE / "doomed_rank.py"), "wrong", "0").returncode == 1
    assert torchrun("--no-python", "false").returncode == 4


def test_without_torchrun_the_runtime_says_so() -> None:
    command = [sys.executable, "-m", "moe_dist", "run", "--runtime", "torchrun", "--device", "cpu"]
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean)
    assert done.returncode == 2
    assert "runtime = 'torchrun': this process was not started by torchrun (legal: ray)" in done.stderr


def test_the_layer_in_a_process_group_of_ones_own() -> None:
    done = torchrun(str(HERE / "embedded_layer.py"))
    assert done.returncode == 0, done.stderr
    for rank, tokens in enumerate((5, 6)):  # the two write to one pipe: their lines may run into each other
        wanted = rf"rank {rank} of 2: \({tokens}, 256\) to \({tokens}, 256\), torch\.bfloat16, norm (\d+\.\d{{3}})"
        (norm,) = re.findall(wanted, done.stdout)
        assert float(norm) > 1.0
