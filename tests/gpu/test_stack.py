"""Stacks on GPUs: one graph of eight layers against the same steps run eagerly, its memory, and rows of stacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu.ranks import backends_here, run_on_ranks

from moe_dist.backends import BACKENDS
from moe_dist.bench.case import Case
from moe_dist.bench.findings import merge
from moe_dist.bench.measure import measure
from moe_dist.bench.results import make_row
from moe_dist.bench.rounds import Turn
from moe_dist.comm import Comm
from moe_dist.engine.graph import StepGraph
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.engine.router import Router
from moe_dist.engine.stack import MoEStack
from moe_dist.machine.machine import Machine
from moe_dist.model.routing import Routing
from moe_dist.model.spec import MoESpec, ParallelSpec, WorkloadSpec
from moe_dist.model.weights import shard_from
from moe_dist.oracle.reference import relative_error
from moe_dist.step import workspace_of
from moe_dist.workloads.random_weights import random_expert
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(500)]

SPEC = MoESpec(name="of tests", hidden=2048, intermediate=768, num_experts=32, top_k=4)
LAYERS, BUCKET = 8, 96
# Of what the layers add. A kernel chosen for another number of rows adds up in another order, and where a token's FP8
# code flips, the layers behind see it; a layer that is left out is worth 0.35.
ORDER = 5e-2


@pytest.fixture(autouse=True)
def needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


def capturable_here() -> list[str]:
    return [name for name in backends_here() if BACKENDS.get(name).capturable]


def stack_of(comm: Comm, backend: str, exchange: str, layers: int = LAYERS, router: bool = False) -> MoEStack:
    parallel = ParallelSpec(ep=comm.world)
    plan = make_plan(SPEC, parallel, exchange=exchange, backend=backend, machine=Machine.detect("cuda"))
    made = []
    for number in range(layers):

        def draw(expert: int, number: int = number):
            return random_expert(SPEC, expert, 0, comm.device, layer=number)

        gate = Stream("a test's router", number, device=comm.device).normal(SPEC.num_experts, SPEC.hidden)
        own = Router(plan, gate) if router else None
        made.append(MoELayer(plan, shard_from(draw, plan.placement, comm.rank), comm, router=own, debug=False))
    return MoEStack(made)


def inputs(comm: Comm, count: int, key: int = 0, layers: int = LAYERS) -> tuple[torch.Tensor, list[Routing]]:
    x = Stream("a test's tokens", key, comm.rank, device=comm.device).normal(count, SPEC.hidden).bfloat16()
    draws = [synthetic_routing(SPEC, count, "zipf:1.2", comm.rank, 100 * key + number) for number in range(layers)]
    return x, [routing.to(comm.device) for routing in draws]


def graph_against_eager(context: Any, exchange: str, own: bool) -> list[str]:
    """What is wrong on this rank, over all backends and numbers of tokens; rank 1 has fewer, and none."""
    comm, wrong = context.comm, []
    for backend in capturable_here():
        stack = stack_of(comm, backend, exchange, router=own)
        x, routings = inputs(comm, BUCKET)
        step = StepGraph(stack, BUCKET, x, None if own else routings)
        for key, counts in enumerate(((BUCKET, BUCKET), (17, 1), (BUCKET, 0))):
            count = counts[min(comm.rank, 1)]
            x, routings = inputs(comm, count, key + 1)
            given = None if own else routings
            y = step(x, given).clone()
            again = step(x, given).clone()
            expected = stack(x, given, max_tokens_per_rank=BUCKET, captured=True)
            same = key == 0 and not own and BACKENDS.get(backend).deterministic
            error = relative_error(y.float() - x.float(), expected.float() - x.float())
            if error > ORDER or (same and not torch.equal(y, expected)):
                wrong.append(f"{backend}, {count} tokens: {error} off what eager steps give")
            if BACKENDS.get(backend).deterministic and not torch.equal(y, again):
                wrong.append(f"{backend}, {count} tokens: not the same bits again")
    torch.cuda.synchronize()
    return wrong


@pytest.mark.parametrize("own", [False, True], ids=["given", "own routers"])
@pytest.mark.parametrize(
    ("world", "exchange"), [(1, "local"), (2, "ag_rs"), (2, "all_to_all"), (2, "all_reduce")]
)  # fmt: skip
def test_a_graph_of_eight_layers_gives_what_eager_steps_give(world, exchange, own):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, {torch.cuda.device_count()} are here")
    assert run_on_ranks(world, graph_against_eager, exchange, own) == [[]] * world


def memory_of_graphs(context: Any, backend: str) -> dict[str, int]:
    """Bytes that the capture of one layer and of eight reserves, of the arena after each, and of the tokens."""
    comm, count, found = context.comm, 4096, {}
    stack = stack_of(comm, backend, "local")
    x, routings = inputs(comm, count)
    kept = []
    for layers in (1, LAYERS):
        part = MoEStack(stack.layers[:layers])
        part.warm_up(x, routings[:layers], count, captured=True)  # what is compiled, and the arena, are there
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        kept.append(StepGraph(part, count, x, routings[:layers]))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        found[f"graph of {layers}"] = torch.cuda.memory_reserved() - before
        found[f"arena of {layers}"] = workspace_of(comm.device).nbytes
    return found | {"tokens": x.nbytes}


@pytest.mark.parametrize("backend", ["triton", "cutlass"])
def test_eight_layers_in_a_graph_need_the_memory_of_one(backend):
    if backend not in backends_here():
        pytest.skip(f"{backend} is not here")
    (found,) = run_on_ranks(1, memory_of_graphs, backend)
    assert found[f"arena of {LAYERS}"] == found["arena of 1"] > 0
    # Each layer's input and output, did they stay, would be 14 times the tokens more.
    assert found[f"graph of {LAYERS}"] <= found["graph of 1"] + 3 * found["tokens"] + (32 << 20)


def waits_of(context: Any, exchange: str) -> tuple[int, list[bool]]:
    """How often ranks meet in a step without a bucket; whether the host waits in a step with one, of the layers one by
    one and of the stack."""
    comm = context.comm
    stack = stack_of(comm, "triton", exchange)
    x, routings = inputs(comm, BUCKET)
    stack.warm_up(x, routings, BUCKET)
    meetings, meet = [], comm.meet
    comm.meet = lambda *given: (meetings.append(given), meet(*given))[1]
    stack(x, routings)
    comm.meet = meet

    def one_by_one() -> None:
        y = x
        for layer, routing in zip(stack.layers, routings, strict=True):
            y = y + layer(y, routing, max_tokens_per_rank=BUCKET)

    waited = []
    for call in (one_by_one, lambda: stack(x, routings, max_tokens_per_rank=BUCKET)):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
            waited.append(False)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            waited.append(True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return len(meetings), waited


@pytest.mark.parametrize(("world", "exchange"), [(1, "local"), (2, "ag_rs"), (2, "all_to_all")])
def test_a_stack_waits_for_nothing_that_its_layers_do_not_wait_for(world, exchange):
    if "triton" not in backends_here() or torch.cuda.device_count() < world:
        pytest.skip(f"needs triton and {world} GPUs")
    for met, (of_layers, of_stack) in run_on_ranks(world, waits_of, exchange):
        assert met == (1 if world > 1 else 0)
        assert of_stack <= of_layers


def rows_of(context: Any, cases: list[Case]) -> list[Any]:
    found = {}
    for number in range(3):
        for index, case in enumerate(cases):
            found[index] = measure(context, case, case.plan(Machine.detect("cuda")), Turn(number, 2, 0))
    return [found[index] for index in range(len(cases))]


@pytest.mark.parametrize("world", [1, 2])
def test_rows_of_stacks(world):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, {torch.cuda.device_count()} are here")
    cases = [
        Case(
            model=SPEC, parallel=ParallelSpec(ep=world), exchange=exchange, backend=backend, graph=graph, layers=LAYERS,
            workload=WorkloadSpec(tokens=tokens), iters=6,
        )
        for exchange in (["local"] if world == 1 else ["ag_rs", "all_to_all"])
        for backend in backends_here() for graph in (False, True) if not graph or backend in capturable_here()
        for tokens in (1, 200)
    ]  # fmt: skip
    machine, wrong = Machine.detect("cuda"), []
    for case, results in zip(cases, zip(*run_on_ranks(world, rows_of, cases), strict=True), strict=True):
        row = make_row(case, case.plan(machine), merge(list(results)), "test")
        errors = {name: value for name, value in row if name.startswith("err_")}
        if row.ok is not True or row.layer != f"stack:{LAYERS}" or not row.stages_us["gemm1"] > 0:
            wrong.append(f"{case.label}: {errors} {row.stages_us}")
    assert wrong == []
