"""The nvlink exchange on GPUs: its rows and sums are those of all_to_all, in steps that follow each other at once."""

from __future__ import annotations

import random

import pytest
import torch
from gpu.ranks import run_on_ranks

from moe_dist.engine.graph import StepGraph
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.engine.stack import MoEStack
from moe_dist.exchange.nvlink import engines
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import shard_from
from moe_dist.oracle.reference import relative_error
from moe_dist.workloads.random_weights import random_expert
from moe_dist.workloads.skews import synthetic_routing

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

SPEC = MoESpec(name="of tests", hidden=1024, intermediate=512, num_experts=16, top_k=4)
SKEWS = ("uniform", "zipf:1.2", "single", "hot:2")
MOST = 700  # tokens a rank
ROUNDING = 6e-3  # of sums in bf16 that were added in another order


GRIDS = [(1, ParallelSpec()), (2, ParallelSpec(ep=2)), (2, ParallelSpec(tp=2)), (4, ParallelSpec(ep=4)),
         (4, ParallelSpec(tp=4)), (4, ParallelSpec(tp=2, ep=2)),
         (4, ParallelSpec(ep=4, replicas={0: (1, 3), 5: (0,)}))]  # fmt: skip


def layers_of(
    context, parallel: ParallelSpec, backend: str, quant: str, exchanges=("nvlink", "all_to_all"), layout="sharded"
):
    """One layer for each exchange, of the same weights."""
    spec, comm, machine = SPEC.with_changes(quant=quant), context.comm, Machine.detect("cuda")
    plans = [
        make_plan(spec, parallel, exchange=name, backend=backend, token_layout=layout, machine=machine)
        for name in exchanges
    ]
    shard = shard_from(lambda e: random_expert(spec, e, 1, comm.device), plans[0].placement, comm.rank)
    return [MoELayer(plan, shard, comm) for plan in plans]


def tokens(context, count: int, seed: int, skew: str):
    device, own = context.comm.device, 100 * seed + context.comm.rank
    x = torch.randn(count, SPEC.hidden, device=device, generator=torch.Generator(device).manual_seed(own)).bfloat16()
    return x, synthetic_routing(SPEC, count, skew, own).to(device)


def draws(seed: int, world: int, count: int) -> list[tuple[int, list[int], str]]:
    """(bucket, tokens of each rank, skew) of steps in a row, the same on all ranks: nobody, one token, many."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        bucket = chance.choice((1, 2, 8, 64, 300, MOST))
        counts = [chance.choice((0, 1, bucket, chance.randint(0, bucket))) for _ in range(world)]
        found.append((bucket, counts, chance.choice(SKEWS)))
    return found


def use_engines(world: int, sums: int, rows: int) -> None:
    """Columns of sums go ahead, and rows by copy engines, in steps of so many tokens a rank and more; 0: in none. Of
    twice as many tokens and more, two ranges of columns go ahead. All ranks call it alike."""
    engines.AHEAD_FROM, engines.MOST_PAIRS = sums * (world - 1) * SPEC.hidden * 2, SPEC.top_k
    engines.TWICE_FROM = 2 * engines.AHEAD_FROM
    engines.COPIED_FROM = rows * (world - 1) * SPEC.hidden


def steps_in_a_row(context, parallel: ParallelSpec, backend: str, quant: str, count: int):
    """Labels of steps whose result is not that of all_to_all, or not the same bits by copy engines and by kernels;
    nothing waits for the device between steps."""
    nvlink, other = layers_of(context, parallel, backend, quant)
    nvlink(*tokens(context, 1, 0, "uniform"), max_tokens_per_rank=MOST)  # the window is as large as it will be
    found = []
    for number, (bucket, counts, skew) in enumerate(draws(7, context.comm.world, count)):
        x, routing = tokens(context, counts[context.comm.rank], number, skew)
        runs = []
        for sums, rows in ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0)):
            use_engines(context.comm.world, sums, rows)
            runs.append(nvlink(x, routing, max_tokens_per_rank=bucket))
        found.append((f"{number} {bucket} {counts} {skew}", x, routing, bucket, *runs))
    wrong = []
    for label, x, routing, bucket, y, *again in found:
        expected = other(x, routing, max_tokens_per_rank=bucket)
        wrong += [f"{label}: run {number} differs" for number, z in enumerate(again, 1) if not torch.equal(y, z)]
        if len(x) and relative_error(y, expected) > ROUNDING:
            wrong.append(f"{label}: {relative_error(y, expected)}")
    return wrong


@pytest.mark.parametrize(("world", "parallel"), GRIDS, ids=lambda each: getattr(each, "label", each))
@pytest.mark.parametrize(("backend", "quant"), [
    ("triton", "fp8_block"), ("cutlass", "fp8_block"), ("cutlass", "fp8_channel"), ("torch", "none"),
])  # fmt: skip
def test_steps_in_a_row_give_what_all_to_all_gives(world, parallel, backend, quant):
    _needs(world)
    for wrong in run_on_ranks(world, steps_in_a_row, parallel, backend, quant, 12 if backend == "torch" else 60):
        assert not wrong


def replicated_in_turn(context, parallel: ParallelSpec, backend: str, count: int):
    """Steps of replicated tokens against all_reduce, between steps of sharded ones in the same windows, and a graph of
    both against what they give eagerly."""
    nvlink, other = layers_of(context, parallel, backend, "fp8_block", ("nvlink", "all_reduce"), "replicated")
    (sharded,) = layers_of(context, parallel, backend, "fp8_block", ("nvlink",))
    wrong, device = [], context.comm.device
    inputs = {}
    for number, (bucket, counts, skew) in enumerate(draws(11, context.comm.world, count)):
        generator = torch.Generator(device).manual_seed(number)
        x = torch.randn(bucket, SPEC.hidden, device=device, generator=generator).bfloat16()
        routing = synthetic_routing(SPEC, bucket, skew, number).to(device)
        y = nvlink(x, routing)
        sharded(*tokens(context, counts[context.comm.rank], number, skew), max_tokens_per_rank=bucket)
        inputs[bucket] = x, routing, y
        if (error := relative_error(y, other(x, routing))) > ROUNDING:
            wrong.append(f"{number} {bucket} {skew}: {error}")
    graphs = {bucket: StepGraph(nvlink, bucket, x, routing) for bucket, (x, routing, _) in inputs.items()}
    for number in range(40):
        for bucket, (_, _, y) in inputs.items():
            if not torch.equal(graphs[bucket].replay(), y):
                wrong.append(f"replay {number} of {bucket} differs")
    return wrong


@pytest.mark.parametrize(("world", "parallel"), GRIDS, ids=lambda each: getattr(each, "label", each))
@pytest.mark.parametrize("backend", ["triton", "cutlass", "torch"])
def test_replicated_tokens_give_what_all_reduce_gives(world, parallel, backend):
    _needs(world)
    if backend == "torch":  # is not captured; its sums go by a launch
        for wrong in run_on_ranks(world, replicated_eagerly, parallel):
            assert not wrong
        return
    for wrong in run_on_ranks(world, replicated_in_turn, parallel, backend, 30):
        assert not wrong


def replicated_eagerly(context, parallel: ParallelSpec):
    nvlink, other = layers_of(context, parallel, "torch", "none", ("nvlink", "all_reduce"), "replicated")
    wrong, device = [], context.comm.device
    for bucket in (1, 3, 64, 300):
        x = torch.randn(bucket, SPEC.hidden, device=device, generator=torch.Generator(device).manual_seed(bucket))
        routing = synthetic_routing(SPEC, bucket, "uniform", bucket).to(device)
        error = relative_error(nvlink(x.bfloat16(), routing), other(x.bfloat16(), routing))
        wrong += [f"{bucket}: {error}"] if error > ROUNDING else []
    return wrong


def graphs_in_turn(context, parallel: ParallelSpec, replays: int, sums: int, rows: int):
    """Two graphs of two layers and eager steps between them, in one window; then a larger window for later steps.
    `sums`, `rows`: see use_engines."""
    use_engines(context.comm.world, sums, rows)
    layers = layers_of(context, parallel, "triton", "fp8_block", ("nvlink", "nvlink", "all_to_all"))
    inputs = {bucket: tokens(context, bucket, bucket, "zipf:1.2") for bucket in (4, 96, 500)}
    expected = {bucket: layers[2](*given, max_tokens_per_rank=bucket).clone() for bucket, given in inputs.items()}
    graphs = {bucket: StepGraph(layers[bucket == 96], bucket, *inputs[bucket]) for bucket in (4, 96)}
    chance, found = random.Random(3), []
    for _ in range(replays):
        bucket = chance.choice((4, 96, 500))
        if bucket == 500:  # the first one needs a larger window than the graphs have
            found.append((bucket, layers[0](*inputs[500], max_tokens_per_rank=500)))
        else:
            found.append((bucket, graphs[bucket].replay().clone()))
    torch.cuda.synchronize()
    first = {bucket: next(y for other, y in found if other == bucket) for bucket in inputs}
    wrong = [f"{bucket}: differs from its first run" for bucket, y in found if not torch.equal(y, first[bucket])]
    errors = {bucket: relative_error(first[bucket], expected[bucket]) for bucket in inputs}
    return wrong + [f"{bucket}: {error}" for bucket, error in errors.items() if error > ROUNDING]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["tp", "ep"])
@pytest.mark.parametrize(("sums", "rows"), [(0, 0), (96, 0), (96, 96)])
def test_graphs_and_eager_steps_share_windows(world, kind, sums, rows):
    _needs(world)
    for wrong in run_on_ranks(world, graphs_in_turn, ParallelSpec(**{kind: world}), 400, sums, rows):
        assert not wrong


def stack_by_engines(context, parallel: ParallelSpec, steps: int):
    """Replays of two layers in one graph, with eager steps between them, all by copies: the bits are those of
    kernels."""
    stack = MoEStack(layers_of(context, parallel, "triton", "fp8_block", ("nvlink", "nvlink")))
    x, routing = tokens(context, 96, 5, "zipf:1.2")
    routings, found = (routing, routing), []
    use_engines(context.comm.world, 0, 0)
    expected = stack(x, routings, max_tokens_per_rank=96)
    use_engines(context.comm.world, 96, 96)
    graph = StepGraph(stack, 96, x, routings)
    for number in range(steps):
        found.append(graph.replay().clone() if number % 3 else stack(x, routings, max_tokens_per_rank=96))
    return [f"step {number} differs" for number, y in enumerate(found) if not torch.equal(y, expected)]


@pytest.mark.parametrize("world", [2, 4])
def test_a_stack_in_one_graph_gives_the_same_by_copies_and_by_kernels(world):
    _needs(world)
    for wrong in run_on_ranks(world, stack_by_engines, ParallelSpec(ep=world), 100):
        assert not wrong


def _needs(world: int) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, {torch.cuda.device_count()} are here")
