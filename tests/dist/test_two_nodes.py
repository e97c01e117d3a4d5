"""Ranks on two nodes of a Ray cluster, each with a network, processes and a host name of its own (two_nodes.py)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator

import pytest
from dist.two_nodes import GCS, GPUS, HEAD, ROOT, WORKER, Cluster, finish, unavailable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SPREAD = ("ray.strategy=SPREAD", "ray.cpus_per_rank=0.5")
SMALL = ("model.hidden=128", "model.intermediate=512", "model.num_experts=8", "model.top_k=2")
MOE_DIST = (sys.executable, "-m", "moe_dist")
SOON_S = 12.0  # from the loss of a node to the end of the command that says so

# What each rank uses, where it is, and a sum that all of them must have given.
ASK = """
import json, os, socket, sys
import torch
from moe_dist.runtime.context import RaySpec
from moe_dist.runtime.ray_group import RayGroup

def ask(context):
    total = context.comm.all_reduce(torch.full((3,), float(context.rank + 1)))
    names = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
    return [socket.gethostname(), *(os.environ.get(name) for name in names), total.tolist()]

given = json.loads(sys.argv[1])
with RayGroup(4, "cpu", RaySpec(**given)) as group:
    print(json.dumps([list(group.nodes), group.run(ask, timeout_s=60, shown=lambda _: None)]))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := unavailable():
        pytest.skip(reason)
    with Cluster() as made:
        yield made


def asked(cluster: Cluster, **environment: str) -> tuple[list[int], list[list[object]]]:
    given = json.dumps({"strategy": "SPREAD", "cpus_per_rank": 0.5})
    code, out, err = finish(cluster.head.popen(sys.executable, "-c", ASK, given, **environment), 90)
    assert code == 0, out + err
    nodes, ranks = json.loads(out.splitlines()[-1])
    return nodes, ranks


def test_ranks_lie_node_by_node_and_use_the_network_between(cluster: Cluster) -> None:
    nodes, ranks = asked(cluster)
    assert nodes == [2, 2]
    assert [host for host, *_ in ranks] == [cluster.head.name] * 2 + [cluster.worker.name] * 2
    assert [gloo for _, gloo, *_ in ranks] == [cluster.head.cable] * 2 + [cluster.worker.cable] * 2
    assert [nccl for _, _, nccl, _ in ranks] == [f"={gloo}" for _, gloo, *_ in ranks]
    assert [total for *_, total in ranks] == [[10.0] * 3] * 4


def test_results_are_right_and_what_would_cross_nodes_is_refused(cluster: Cluster) -> None:
    arguments = (
        "worlds=[4]", "placements=[ep,tp2xep2,tp]", "exchanges=[ag_rs,all_to_all,hierarchical]", "tokens=[9]",
        "skews=[uniform]", "token_splits=[ragged]", "iters=2", "warmup=0", *SMALL, *SPREAD,
    )  # fmt: skip
    command = (*MOE_DIST, "compare", "--device", "cpu", *arguments, "--json")
    code, out, err = finish(cluster.head.popen(*command), 150)
    assert code == 0, out + err
    document = json.loads(out)
    rows = document["rows"]
    assert sorted((row["placement"], row["exchange"]) for row in rows) == [
        (placement, exchange)
        for placement in ("EP4", "TP2xEP2")
        for exchange in ("ag_rs", "all_to_all", "hierarchical")
    ]
    assert all(row["ok"] and row["world"] == 4 for row in rows)
    assert [line.rpartition(" on ")[2] for line in document["ranks"]["4"]] == [HEAD] * 2 + [WORKER] * 2
    refused = document["refused"]
    assert len(refused) == 3
    assert all("the nodes have 2 + 2 ranks" in each["reason"] for each in refused)


def test_strict_pack_keeps_ranks_on_one_node(cluster: Cluster) -> None:
    arguments = ("--device", "cpu", "--tp", "2", "--tokens", "4", "--iters", "0", *SMALL, "--json")
    code, out, err = finish(cluster.head.popen(*MOE_DIST, "run", *arguments), 90)
    assert code == 0, out + err
    assert " on " not in "".join(json.loads(out)["ranks"]["2"])


def test_an_interface_that_a_node_lacks_is_named_with_the_node(cluster: Cluster) -> None:
    arguments = ("--device", "cpu", "--ep", "4", *SMALL, *SPREAD, f"ray.interface={cluster.head.cable}")
    code, _, err = finish(cluster.head.popen(*MOE_DIST, "run", *arguments), 90)
    assert code == 2, err
    last = err.strip().splitlines()[-1]
    assert f"ray.interface = '{cluster.head.cable}': {cluster.worker.name} has no such interface" in last
    assert f"did you mean {cluster.worker.cable}? (legal: {cluster.worker.cable}, lo)" in last


ASK_MACHINE = """
import json, socket
from dataclasses import asdict, replace
from moe_dist.machine.machine import Machine
from moe_dist.runtime.cluster_machine import cluster_machine
from moe_dist.runtime.context import RaySpec

def detect():
    return replace(Machine.named("h200x4"), name=f"GPU of {socket.gethostname()}")

print(json.dumps([asdict(cluster_machine(RaySpec(strategy=name), "auto", detect)) for name in ("STRICT_PACK", "PACK")]))
"""


def test_a_head_without_gpus_plans_by_the_workers(cluster: Cluster) -> None:
    """There are no GPUs here: the worker's node says that it has some, and is really asked what they are."""
    code, out, err = finish(cluster.head.popen(sys.executable, "-c", ASK_MACHINE), 90)
    assert code == 0, out + err
    for machine, strategy in zip(json.loads(out.splitlines()[-1]), ("STRICT_PACK", "PACK"), strict=True):
        assert machine["name"] == f"GPU of {cluster.worker.name}"
        assert (machine["device"], machine["devices"], machine["elsewhere"]) == ("cuda", GPUS, True)
        assert machine["nodes"] == {"room": [GPUS], "strategy": strategy}


def test_a_script_can_wait_for_nodes(cluster: Cluster) -> None:
    """As launch/slurm.sh does before it starts the command."""
    script = ROOT / "launch" / "nodes.py"
    code, _, err = finish(cluster.head.popen(sys.executable, script, GCS, "2", "30"), 60)
    assert (code, err) == (0, "")
    code, _, err = finish(cluster.head.popen(sys.executable, script, GCS, "3", "2"), 60)
    assert code == 3
    assert err.endswith(f"2 of 3 nodes came within 2 s: {HEAD}, {WORKER}\n")


@pytest.mark.parametrize("how", ["kill", "cut"])
def test_a_lost_node_is_named_within_seconds(cluster: Cluster, how: str) -> None:
    """Killed, its raylet refuses; cut off, it is as silent as the rest of it."""
    if cluster.worker.process is None:
        cluster.start_worker()
    arguments = ("--device", "cpu", "--ep", "4", "--tokens", "8", "--iters", "1000000", "case_timeout_s=200", *SMALL)
    process = cluster.head.popen(*MOE_DIST, "run", *arguments, *SPREAD)
    try:
        assert process.stderr is not None
        deadline = time.monotonic() + 60
        while "timing" not in process.stderr.readline():
            assert time.monotonic() < deadline
            assert process.poll() is None
        time.sleep(1.0)
        getattr(cluster.worker, how)()
        begin = time.monotonic()
        code, _, err = finish(process, 60)
        took = time.monotonic() - begin
    finally:
        process.kill()
        cluster.worker.kill()
    last = err.strip().splitlines()[-1]
    assert code == 4, err
    assert took < SOON_S, last
    assert last.startswith(f"moe-dist: rank 2 on {cluster.worker.name} failed in ")
    assert "(sequence number " in last
    assert f"its node {WORKER} was lost, with ranks 2, 3: the raylet there does not answer: " in last
