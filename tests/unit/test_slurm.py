"""launch/slurm.sh with commands of Slurm, Ray and Python that are a few lines each: what is started where and in which
order, what it ends with, and that nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm.sh"
JOB = 7 + os.getpid() % 20000  # whose port is this test's own
PORT = 20000 + JOB % 20000

FAKES = {
    # Runs the command here, without the options before it, as a step of the allocation would on its node.
    "srun": """echo "srun $*" >>"$LOG"
while [[ $1 == --* ]]; do shift; done
exec "$@"
""",
    "scontrol": '[ "$1 $2" = "show hostnames" ] && printf "%s\\n" $NODES\n',
    "getent": 'echo "127.0.1.1 STREAM $2"\n',
    "hostname": "echo 127.0.0.1 10.0.0.1\n",
    "ray": """echo "ray $*" >>"$LOG"
[ "$FAIL" != "$1" ] || exit 1
for option in "$@"; do case $option in --port=*) port=${option#--port=} ;; esac; done
exec REAL_PYTHON -c 'import socket, sys, time
listener = socket.create_server(("127.0.0.1", int(sys.argv[1]))) if sys.argv[1] else None
time.sleep(60)' "${port:-}"
""",
    "python": """echo "python $* RAY_ADDRESS=${RAY_ADDRESS:-none}" >>"$LOG"
case $1 in
    launch/nodes.py) [ "$FAIL" != nodes ] ;;
    *) eval "$BODY" ;;
esac
""",
}


@pytest.fixture
def slurm(tmp_path):
    bin_folder, log = tmp_path / "bin", tmp_path / "log"
    bin_folder.mkdir()
    for name, body in FAKES.items():
        path = bin_folder / name
        path.write_text(f"#!/usr/bin/env bash\n{body.replace('REAL_PYTHON', sys.executable)}")
        path.chmod(0o755)
    log.touch()

    def start(*arguments, body="exit 0", fail="", nodes="a b c", **changes):
        known = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RAY_"))}
        environment = known | {
            "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHON": str(bin_folder / "python"), "LOG": str(log),
            "BODY": body, "FAIL": fail, "NODES": nodes, "START_TIMEOUT_S": "5", "SLURM_JOB_ID": str(JOB),
            "SLURM_JOB_NODELIST": "a-c", "SLURM_SUBMIT_DIR": str(ROOT),
        } | changes  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([SCRIPT, *arguments], env=environment, start_new_session=True, cwd=tmp_path, **pipes)

    start.log = log
    yield start
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert str(log).encode() not in (process / "environ").read_bytes(), "a process of it is left"
        except OSError:
            continue


def ended(process):
    _, err = process.communicate(timeout=40)
    return process.returncode, err


def test_head_workers_nodes_then_the_job(slurm):
    body = 'until grep -q -e --exclude=a "$LOG"; do sleep 0.05; done; exit 4'  # the workers start beside the job here
    code, err = ended(slurm("compare", "worlds=[16]", "ray.strategy=PACK", body=body))
    assert code == 4, err
    lines = slurm.log.read_text().splitlines()
    starts = [line for line in lines if line.startswith(("srun", "python"))]
    ray = f"{slurm.log.parent}/bin/ray start"
    assert starts[0] == "srun --overlap --nodes=1 --ntasks=1 --nodelist=a hostname -I"
    assert starts[1].startswith(f"srun --overlap --nodes=1 --ntasks=1 --nodelist=a --export=ALL {ray} --head --block ")
    assert starts[1].endswith(f"--node-ip-address=127.0.0.1 --port={PORT}")
    (workers,) = (line for line in starts if "--exclude=a" in line)
    assert workers.startswith("srun --overlap --nodes=2 --ntasks=2 --ntasks-per-node=1 --exclude=a --export=ALL ")
    assert workers.endswith(f"--address=127.0.0.1:{PORT}")
    jobs = [line for line in starts if line.startswith("python")]
    assert jobs == [
        f"python launch/nodes.py 127.0.0.1:{PORT} 3 5 RAY_ADDRESS=none",
        f"python -m moe_dist compare worlds=[16] ray.strategy=PACK RAY_ADDRESS=127.0.0.1:{PORT}",
    ]
    assert starts[-1] == f"srun --overlap --nodes=3 --ntasks-per-node=1 rm -rf /tmp/moe-dist-{JOB}"


def test_the_token_is_on_no_command_line(slurm):
    body = '[ "$RAY_AUTH_MODE" = token ] && [ ${#RAY_AUTH_TOKEN} -eq 64 ] && ! grep -q "$RAY_AUTH_TOKEN" "$LOG"'
    code, err = ended(slurm("doctor", body=body, nodes="a", HEAD_ADDRESS="127.0.0.1"))
    assert code == 0, err
    assert "--exclude" not in slurm.log.read_text()  # one node has no workers
    assert "hostname -I" not in slurm.log.read_text()  # its address was given


@pytest.mark.parametrize(("fail", "said"), [("start", "a node's Ray ended at once"), ("nodes", "")])
def test_a_cluster_that_does_not_come_up(slurm, fail, said):
    code, err = ended(slurm("doctor", fail=fail))
    assert code == 3
    assert said in err
    assert "-m moe_dist" not in slurm.log.read_text()


def test_a_signal_reaches_the_job_which_ends_in_its_own_way(slurm):
    body = "trap 'sleep 0.5; exit 143' TERM; echo ready >>\"$LOG\"; while :; do sleep 0.1; done"
    process = slurm("run", body=body)
    deadline = time.monotonic() + 20
    while "ready" not in slurm.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, err = ended(process)
    assert code == 143, err


@pytest.mark.parametrize(
    ("arguments", "changes", "said"),
    [
        ([], {}, "give a moe-dist command"),
        (["run"], {"SLURM_JOB_ID": ""}, "runs in a Slurm job"),
        (["run"], {"SLURM_SUBMIT_DIR": "/tmp"}, "/tmp is not the checkout"),
        (["run"], {"PYTHON": "/nosuch/python"}, "PYTHON=/nosuch/python is not there"),
    ],
)
def test_bad_input(slurm, arguments, changes, said):
    code, err = ended(slurm(*arguments, **changes))
    assert code == 2
    assert said in err
    assert slurm.log.read_text() == ""
