"""`Comm` on process groups of others: subgroups, siblings at a time, their timeouts, their end, their threads."""

from __future__ import annotations

import copy
import os
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dist.pool import fresh_processes

from moe_dist.comm import Comm
from moe_dist.comm import group as comm_module
from moe_dist.comm.user import SETTLED_AFTER_S
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.errors import ConfigError, RankFailure
from moe_dist.machine.machine import Machine
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import shard
from moe_dist.oracle.reference import oracle_layer, relative_error
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

WORLD = 4
SPEC = MoESpec(hidden=128, intermediate=128, num_experts=8, top_k=2)
BACKENDS = ("cpu:gloo", "cpu:gloo,cuda:gloo")  # the pool of the other tests is plain gloo


def layer_on(comm: Comm, exchange: str) -> MoELayer:
    machine = Machine.detect("cpu")
    plan = make_plan(SPEC, ParallelSpec(ep=comm.world), exchange=exchange, backend="torch", machine=machine)
    return MoELayer(plan, shard(random_weights(SPEC, 0), plan.placement, comm.rank), comm)


def inputs(key: int) -> tuple[torch.Tensor, Routing]:
    return Stream("tokens of groups", key).normal(6, SPEC.hidden).bfloat16(), synthetic_routing(SPEC, 6, "uniform", key)


def error_of(layer: MoELayer, key: int) -> float:
    """Of a step on tokens that no other rank has, against the exact layer."""
    x, routing = inputs(key)
    alone = Placement.build(SPEC, ParallelSpec())
    exact = oracle_layer(x, routing, [random_weights(SPEC, 0)], SPEC, alone, [(0, 6)], routing.ids_TK * 0, None)
    return relative_error(layer(x, routing), exact)


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ConfigError, RankFailure) as error:
        return str(error)
    return "nothing was refused"


# What each of four ranks does in the world of a backend; returns what it found.


def siblings(rank: int) -> dict[str, Any]:
    """Two groups of every second rank form and step at the same time, in other orders."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    comm = Comm.from_group("cpu", groups[rank % 2], timeout_s=20)
    layers = [layer_on(comm, exchange) for exchange in ("all_to_all", "ag_rs", "all_reduce")]
    return {"errors": [error_of(layer, 10 * rank + step) for step in range(3) for layer in layers]}


def members_alone(rank: int) -> dict[str, Any]:
    """A group that its members formed without the others."""
    if rank > 1:
        return {"errors": []}
    group = dist.new_group([0, 1], use_local_synchronization=True)
    layer = layer_on(Comm.from_group("cpu", group), "all_to_all")
    return {"errors": [error_of(layer, rank), error_of(copy.deepcopy(layer), rank + 2)]}


def without_a_cpu(rank: int) -> dict[str, Any]:
    """As NCCL's groups are, which can't agree on a number on the CPU: siblings make groups of gloo for that at the same
    time, and `leave` ends them and nothing else."""
    real, groups = comm_module.backends_of, [dist.new_group([0, 1]), dist.new_group([2, 3])]
    comm_module.backends_of = lambda group: {"cpu": "another"}
    comm = Comm.from_group("cpu", groups[rank // 2], timeout_s=20)
    comm_module.backends_of = real
    found = {"errors": [error_of(layer_on(comm, "ag_rs"), rank)], "made": len(comm._owned)}
    comm.leave()
    total = torch.tensor(1.0)
    dist.all_reduce(total, group=groups[rank // 2])
    dist.all_reduce(total)
    return found | {"sum": float(total)}


def what_is_refused(rank: int) -> dict[str, Any]:
    group = dist.new_group([0, 1])
    if rank > 1:
        return {"refused": [refusal(lambda: Comm.from_group("cpu", group))], "words": ["not in it"]}
    wrong = (0, -1, 0.0005, 1.1e9, 1e15, 10**400, float("nan"), float("inf"), "5", True)
    calls = [lambda seconds=seconds: Comm.from_group("cpu", group, timeout_s=seconds) for seconds in wrong]
    calls += [lambda device=device: Comm.from_group(device, group) for device in ("xla", "gpu", 3.5, "cuda")]
    words = ["legal: seconds, 0.001 to 1000000000"] * len(wrong)
    words += ["no backend", "device = 'gpu'", "device = 3.5", "device = 'cuda'"]
    gone = dist.new_group([0, 1])
    dist.destroy_process_group(gone)
    for none, word in (([0, 1], "of type list"), ("WORLD", "of type str"), (0, "of type int"), (gone, "was destroyed")):
        calls.append(lambda none=none: Comm.from_group("cpu", none))
        words.append(word)
    return {"refused": [refusal(call) for call in calls], "words": words}


def two_threads(rank: int) -> dict[str, Any]:
    """First both begin at once, with a Comm; then, with another one, a second thread comes when the first has settled,
    and in the end takes over."""
    groups = [dist.new_group([0, 1], timeout=timedelta(seconds=seconds)) for seconds in (5, 30)]
    if rank > 1:
        return {"wrong": [], "began": 2, "later": [""], "end": "nothing was refused"}
    wrong: list[float] = []

    def stepped(layer: MoELayer, key: int, steps: int) -> None:
        for step in range(steps):
            if not (error := error_of(layer, 100 * rank + key + step)) < 6e-2:
                wrong.append(error)

    def in_threads(layers: list[MoELayer], steps: int) -> list[str]:
        said: list[str] = []
        tasks = [lambda n=n, layer=layer: stepped(layer, 10 * n, steps) for n, layer in enumerate(layers)]
        threads = [threading.Thread(target=lambda task=task: said.append(refusal(task))) for task in tasks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return said

    first, second = (Comm.from_group("cpu", group) for group in groups)
    began = in_threads([layer_on(first, "all_to_all"), layer_on(first, "ag_rs")], 200)
    layer = layer_on(second, "all_to_all")
    stepped(layer, 20, 2)
    second._user.since -= SETTLED_AFTER_S
    later = in_threads([layer], 1)
    stepped(layer, 30, 2)

    def handed_over() -> None:
        second.take_over()
        stepped(layer, 40, 2)

    box: list[str] = []
    thread = threading.Thread(target=lambda: box.append(refusal(handed_over)))
    thread.start()
    thread.join(30)
    return {
        "wrong": wrong,
        "began": sum(said != "nothing was refused" for said in began),
        "later": later,
        "end": box[0],
    }


def a_comm_for_each_of_two_threads(rank: int) -> dict[str, Any]:
    """On one group: it is the group's collectives that would cross."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=5))
    if rank > 1:
        return {"wrong": 0, "refused": 2}
    wrong: list[float] = []
    refused: list[str] = []

    def sums(value: float) -> None:
        comm = Comm.from_group("cpu", group)
        for _ in range(100):
            total = comm.all_reduce(torch.full((8,), value, dtype=torch.float32))
            if float(total[0]) != 2 * value:
                wrong.append(float(total[0]))

    order = (1.0, 10.0) if rank == 0 else (10.0, 1.0)
    threads = [threading.Thread(target=lambda v=value: refused.append(refusal(lambda: sums(v)))) for value in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return {"wrong": len(wrong), "refused": sum(said != "nothing was refused" for said in refused)}


def ranks_out_of_step(rank: int) -> dict[str, Any]:
    """Rank 0's input is refused and it goes on to the next step; then other tokens and buckets than another rank's."""
    groups = [dist.new_group([0, 1], timeout=timedelta(seconds=10)) for _ in range(3)]
    if rank > 1:
        return {"said": []}
    said = []
    layer = layer_on(Comm.from_group("cpu", groups[0]), "all_reduce")
    x, routing = inputs(7)
    wrong = Routing(routing.ids_TK + 100, routing.weights_TK)
    if rank == 0:
        refusal(lambda: layer(x, wrong))
    said.append(refusal(lambda: layer(x, routing)))  # rank 0's second step, rank 1's first
    machine = Machine.detect("cpu")
    for group, layout, count, bucket in (
        (groups[1], "replicated", 6 - rank, None),
        (groups[2], "sharded", 6, 6 + rank),
    ):
        comm = Comm.from_group("cpu", group)
        plan = make_plan(
            SPEC, ParallelSpec(ep=2), exchange="ag_rs", backend="torch", token_layout=layout, machine=machine
        )
        other = MoELayer(plan, shard(random_weights(SPEC, 0), plan.placement, comm.rank), comm)
        given = x[:count], routing.rows(0, count)
        said.append(refusal(lambda other=other, given=given, bucket=bucket: other(*given, max_tokens_per_rank=bucket)))
    return {"said": said}


def one_row_of_a_wider_tensor(rank: int) -> dict[str, Any]:
    """Contiguous, but with an odd stride and from an odd place on."""
    if rank > 1:
        dist.new_group([0, 1])
        return {"errors": []}
    comm = Comm.from_group("cpu", dist.new_group([0, 1]))
    found = []
    for exchange in ("all_to_all", "ag_rs"):
        layer, (x, routing) = layer_on(comm, exchange), inputs(rank)
        wide = torch.zeros(1, SPEC.hidden + 5, dtype=torch.bfloat16)
        wide[:, 3:-2] = x[:1]
        first = routing.rows(0, 1)
        found.append(relative_error(layer(wide[:, 3:-2], first), layer(x[:1].clone(), first)))
    return {"errors": found}


def a_timeout_of_its_own(rank: int) -> dict[str, Any]:
    """Rank 1 never comes; the group's own timeout would be a minute."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=60))
    if rank > 1:
        return {"seconds": 1.5, "refused": "rank 0 failed in meet (sequence number 1)"}
    comm = Comm.from_group("cpu", group, timeout_s=1.5)
    if rank == 1:
        time.sleep(4)
        return {"seconds": 1.5, "refused": "rank 0 failed in meet (sequence number 1)"}
    layer, start = layer_on(comm, "ag_rs"), time.monotonic()
    said = refusal(lambda: error_of(layer, 0))
    return {"seconds": time.monotonic() - start, "refused": said}


SCENARIOS = (
    siblings, members_alone, without_a_cpu, what_is_refused, two_threads, a_comm_for_each_of_two_threads,
    one_row_of_a_wider_tensor, ranks_out_of_step, a_timeout_of_its_own,
)  # fmt: skip


def _work(rank: int, port: int, backend: str, results: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(backend, store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=40))
    try:
        found = {}
        for scenario in SCENARIOS:
            dist.barrier()
            found[scenario.__name__] = scenario(rank)
        results.send(found)
    except BaseException:
        results.send(traceback.format_exc())
    os._exit(0)


@pytest.fixture(scope="module", params=BACKENDS)
def found(request: pytest.FixtureRequest) -> list[dict[str, dict[str, Any]]]:
    """Each rank's findings, all scenarios in one world after another."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = fresh_processes()
    ends, workers = [], []
    for rank in range(WORLD):
        here, there = context.Pipe()
        ends.append(here)
        arguments = (rank, store.port, request.param, there)
        workers.append(context.Process(target=_work, args=arguments, daemon=True))
        workers[-1].start()
    try:
        answers = [end.recv() if end.poll(120) else "no answer within 120 s" for end in ends]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    texts = [answer for answer in answers if isinstance(answer, str)]
    assert not texts, "\n".join(texts)
    return answers


def test_siblings_step_at_the_same_time(found):
    for ranks in found:
        assert all(error < 6e-2 for error in ranks["siblings"]["errors"])


def test_a_group_of_its_members_alone_and_a_copied_layer(found):
    for ranks in found:
        assert all(error < 6e-2 for error in ranks["members_alone"]["errors"])
    assert len(found[0]["members_alone"]["errors"]) == 2


def test_only_what_was_made_is_destroyed(found):
    for ranks in found:
        answer = ranks["without_a_cpu"]
        assert answer["errors"][0] < 6e-2
        assert (answer["made"], answer["sum"]) == (1, 8.0)


def test_refusals_say_what_is_wrong(found):
    for ranks in found:
        answer = ranks["what_is_refused"]
        assert len(answer["refused"]) == len(answer["words"])
        for said, words in zip(answer["refused"], answer["words"], strict=True):
            assert words in said


def test_two_threads_get_no_wrong_tokens(found):
    """Those that begin at once are both refused, one that comes later is, until it takes over."""
    for ranks in found:
        answer = ranks["two_threads"]
        assert answer["wrong"] == []
        assert answer["began"] == 2
        assert "nothing was refused" not in answer["later"]
        assert answer["end"] == "nothing was refused"
    assert all("shares this process group" in said for ranks in found[:2] for said in ranks["two_threads"]["later"])


def test_a_comm_for_each_thread_needs_a_group_for_each(found):
    """Both are refused as soon as the second one comes; a few sums may have crossed by then."""
    for ranks in found:
        answer = ranks["a_comm_for_each_of_two_threads"]
        assert answer["refused"] == 2
        assert answer["wrong"] < 50


def test_one_row_of_a_wider_tensor_is_a_row(found):
    for ranks in found:
        assert all(error == 0 for error in ranks["one_row_of_a_wider_tensor"]["errors"])


def test_ranks_that_are_not_in_one_step_are_told(found):
    words = ("rank 1 failed in meet", "tokens = ", "max_tokens_per_rank = ")
    for ranks in found[:2]:
        said = ranks["ranks_out_of_step"]["said"]
        assert len(said) == len(words)
        for text, expected in zip(said, words, strict=True):
            assert expected in text
    assert "begins step 1 where others begin step 2" in found[0]["ranks_out_of_step"]["said"][0]


def test_the_timeout_given_holds_on_a_group_that_exists(found):
    for ranks in found:
        answer = ranks["a_timeout_of_its_own"]
        assert answer["refused"].startswith("rank 0 failed in meet (sequence number 1)")
        assert answer["seconds"] < 4
