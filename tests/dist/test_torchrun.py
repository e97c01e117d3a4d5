"""The same commands and the same layer without Ray, in processes that torchrun started."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes. --standalone: a free port, so that runs at the same time can't meet."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    without_ray = {"GLOO_SOCKET_IFNAME": "lo", "RAY_ADDRESS": "192.0.2.1:1"}  # nobody there: who asks, fails
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
    assert done.returncode != 0
    message = "world = 4: torchrun started 2 processes (legal: 2)"
    assert json.loads(done.stdout) == {"error": "ConfigError", "message": message}
    assert done.stderr.count(f"moe-dist: {message}") == 1
    assert re.search(r"exitcode\s*: 2 ", done.stderr)  # the program's; torchrun itself always ends with 1


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
