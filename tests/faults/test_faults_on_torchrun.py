"""Faults in ranks that torchrun started: real processes, real signals, the launcher's exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from faults.kinds import Fault, drawn
from faults.outcome import Outcome, figures, keep, marked, shared_memory, wait_gone
from faults.work import healthy

pytestmark = pytest.mark.faults

HERE = Path(__file__).parent
LAUNCHER = HERE.parent.parent / "launch" / "torchrun.sh"
SEED = int(os.environ.get("MOE_DIST_FAULTS_SEED", "2"))
COUNT = int(os.environ.get("MOE_DIST_FAULTS_COUNT", "100"))
ENDED_S = 45.0  # for torchrun to end: it gives ranks that ignore SIGTERM half a minute
OK, FAILED, BAD_INPUT = 0, 4, 2  # exit codes
CODES = {"": OK, "RankFailure": FAILED, "ConfigError": BAD_INPUT}
TOLD = re.compile(r"rank (\d+) failed in (.*) \(sequence number (-?\d+)\): (.*)", re.DOTALL)
# torchrun's own report of the rank that failed first.
ROOT = re.compile(r"Root Cause.*?rank\s+: (\d+).*?exitcode\s+: (-?\d+)", re.DOTALL)


def launch(fault: Fault) -> tuple[Outcome, int, float]:
    """What the rank that speaks says, the exit code, and how long after that everything had ended."""
    outcome, spoken = Outcome(fault, "torchrun"), 0.0
    memory = shared_memory()
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "MARKS": fault.marks}
    environment["TORCHRUN"] = str(Path(sys.executable).parent / "torchrun")
    script = [str(HERE / "torchrun_rank.py"), json.dumps(asdict(fault))]
    command = [str(LAUNCHER), "--standalone", "--nproc-per-node", str(fault.world), *script]
    with open(f"{fault.marks}.err", "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    assert process.stdout is not None
    pids: set[int] = set()
    lines = []
    for line in process.stdout:  # one line, from the rank that speaks, then the end of file
        spoken = spoken or time.monotonic()
        pids |= family(process.pid)
        lines.append(line)
    code = process.wait(ENDED_S)
    ended = time.monotonic()
    _, outcome.left = wait_gone(pids)
    outcome.left += [f"/dev/shm/{name}" for name in shared_memory() - memory]
    outcome.gone_s = ended - (spoken or ended)
    _read(outcome, lines)
    if (struck := marked(fault)) is not None:
        outcome.named_s = (spoken or ended) - struck[0]
    elif fault.kind != "none":
        outcome.left.append("the fault never happened")
    if code != CODES.get(outcome.error):
        outcome.left.append(f"exit code {code}")
    return outcome, code, ended


def family(pid: int) -> set[int]:
    """What the launcher has started."""
    try:
        return {child.pid for child in psutil.Process(pid).children(recursive=True)}
    except psutil.Error:
        return set()


def _read(outcome: Outcome, lines: list[str]) -> None:
    if not lines and (root := ROOT.search(Path(f"{outcome.fault.marks}.err").read_text())):
        outcome.error, outcome.rank = "RankFailure", int(root[1])  # the others were ended while they imported
        outcome.op, outcome.seq, outcome.cause = "starting, told by torchrun", 0, f"exit code {root[2]}"
        return
    if len(lines) != 1:
        outcome.left.append(f"{len(lines)} lines of output: {lines}")
        outcome.error = "nothing"
        return
    said = json.loads(lines[0])
    outcome.results, outcome.error = said.get("results", ()), said.get("error", "")
    outcome.cause = said.get("message", "")
    if found := TOLD.match(outcome.cause):
        rank, outcome.op, seq, outcome.cause = found.groups()
        outcome.rank, outcome.seq = int(rank), int(seq)
    elif outcome.error == "ConfigError":
        outcome.rank = outcome.fault.rank  # its message names field and value, and no rank


@pytest.mark.timeout(3600)
def test_every_fault_is_named_by_a_rank_that_lives(tmp_path: Path) -> None:
    references: dict[int, list[str]] = {}
    rows, wrong = [], []
    for number, drawn_fault in enumerate(drawn(SEED, COUNT)):
        fault = replace(drawn_fault, marks=str(tmp_path / str(number)))
        if fault.world not in references:
            whole = healthy(world=fault.world, marks=str(tmp_path / f"healthy{fault.world}"))
            references[fault.world] = list(launch(whole)[0].results)
            assert len(references[fault.world]) == fault.world
        outcome, _, _ = launch(fault)
        found = outcome.wrong(references[fault.world])
        if found:
            found.append(Path(f"{fault.marks}.err").read_text()[-1500:])
        wrong += [f"{fault}: {each}: {outcome}" for each in found]
        rows.append(outcome.row() | {"wrong": found[:-1]})
        print(fault, outcome.error, outcome.named_s, outcome.gone_s, found[:-1], flush=True)
        keep("torchrun", {"seed": SEED, "figures": figures(rows), "rows": rows})
    assert len(rows) == COUNT
    assert not wrong, "\n".join(wrong)
