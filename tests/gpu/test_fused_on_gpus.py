"""Exchange `fused` with backend `deep_gemm_mega` for real: the package's kernel behind our layer, against the oracle,
eagerly and in graphs, and the same bits in steps that follow each other at once."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from gpu.ranks import run_on_ranks

from moe_dist.backends.deep_gemm_mega import DeepGemmMega
from moe_dist.bench.case import Case
from moe_dist.bench.findings import merge
from moe_dist.bench.measure import measure
from moe_dist.bench.results import make_row
from moe_dist.commands.config import find_model
from moe_dist.engine.graph import StepGraph
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec, ParallelSpec, WorkloadSpec
from moe_dist.model.weights import shard_from
from moe_dist.workloads.random_weights import random_expert
from moe_dist.workloads.skews import synthetic_routing

THERE = DeepGemmMega.available("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not THERE.ok, reason=THERE.reason),
]

PAIR = {"exchange": "fused", "backend": "deep_gemm_mega"}
SMALL = MoESpec(name="of tests", hidden=1024, intermediate=512, num_experts=16, top_k=4)
DEEPSEEK = find_model("DeepSeek-V3")
HALF = DEEPSEEK.with_changes(num_experts=128, num_groups=1, top_groups=1)  # each rank's load is that of four ranks
MOST = 700  # tokens a rank


def measured(context, cases: list[Case]):
    return [measure(context, case, case.plan(Machine.detect("cuda"))) for case in cases]


ALL = tuple(product(("uniform", "zipf:1.2", "single"), ("even", "ragged", "one_rank")))
TWO = (("uniform", "even"), ("zipf:1.2", "ragged"))  # of large layers, whose check takes its time


@pytest.mark.parametrize(
    ("world", "model", "tokens", "drawn"),
    [
        pytest.param(2, SMALL, (2, 64, 1400), ALL, id="2 small"),
        pytest.param(4, SMALL, (4, 64, 2800), ALL, id="4 small"),
        pytest.param(2, HALF, (16, 4096), TWO, id="2 of half of DeepSeek-V3"),
        pytest.param(4, DEEPSEEK, (32, 8192), TWO, id="4 of DeepSeek-V3"),
    ],
)
def test_it_computes_what_the_oracle_does(world, model, tokens, drawn):
    """Even and skewed, also where ranks have different numbers of tokens or none; each row is `ok` by the check that
    every row of results has."""
    _needs(world)
    cases = [
        Case(
            model=model, parallel=ParallelSpec(ep=world), graph=graph, iters=9, **PAIR,
            workload=WorkloadSpec(tokens=count, skew=skew, token_split=split),
        )
        for count in tokens for skew, split in drawn for graph in (False, True)
    ]  # fmt: skip
    by_rank = run_on_ranks(world, measured, cases)
    for number, case in enumerate(cases):
        row = make_row(case, case.plan(Machine.detect("cuda")), merge([each[number] for each in by_rank]), "test")
        found = row.err_oracle, row.err_exact, row.err_token, row.err_repeat, row.err_again
        assert row.ok is True, (case.label, found)
        assert (row.exchange, row.backend, row.form) == ("fused", "deep_gemm_mega", "layer")


def layers_of(context, count: int, exchange: str = "fused", backend: str = "deep_gemm_mega") -> list[MoELayer]:
    comm, machine = context.comm, Machine.detect("cuda")
    plan = make_plan(SMALL, ParallelSpec(ep=comm.world), exchange=exchange, backend=backend, machine=machine)
    shards = [
        shard_from(lambda e, seed=seed: random_expert(SMALL, e, seed, comm.device), plan.placement, comm.rank)
        for seed in range(count)
    ]
    return [MoELayer(plan, shard, comm) for shard in shards]


def tokens_of(context, count: int, seed: int, skew: str):
    device, own = context.comm.device, 100 * seed + context.comm.rank
    x = torch.randn(count, SMALL.hidden, device=device, generator=torch.Generator(device).manual_seed(own)).bfloat16()
    return x, synthetic_routing(SMALL, count, skew, own).to(device)


def steps_in_a_row(context, count: int):
    """What differs between two runs of the same steps of two layers that share memory, one behind another without a
    wait; between these and graphs; and an id that is no expert's, which counts as none."""
    layers = layers_of(context, 2)
    chance, steps = random.Random(3), []
    for number in range(count):
        bucket = chance.choice((1, 2, 8, 64, 300, MOST))
        counts = [chance.choice((0, 1, bucket, chance.randint(0, bucket))) for _ in range(context.comm.world)]
        skew = chance.choice(("uniform", "zipf:1.2", "single", "hot:2"))
        steps.append((bucket, *tokens_of(context, counts[context.comm.rank], number, skew)))
    runs = [
        [
            layers[number % 2](x, routing, max_tokens_per_rank=bucket)
            for number, (bucket, x, routing) in enumerate(steps)
        ]
        for _ in range(2)
    ]
    wrong = [number for number, (one, other) in enumerate(zip(*runs, strict=True)) if not torch.equal(one, other)]
    samples = {bucket: (x, routing) for bucket, x, routing in steps[::2]}
    graphs = {bucket: StepGraph(layers[0], bucket, *sample) for bucket, sample in samples.items()}
    for number in range(0, count, 2):
        bucket, x, routing = steps[number]
        for _ in range(3):
            if not torch.equal(graphs[bucket](x, routing), runs[0][number]):
                wrong.append(("graph", number))
    x, routing = tokens_of(context, 5, 1, "uniform")
    expected = layers[0](x, routing, max_tokens_per_rank=5)
    strange = routing.ids_TK.clone()
    strange[0], routing.ids_TK[0] = SMALL.num_experts + 7, -1
    one, other = (
        layers[0](x, replace(routing, ids_TK=ids), max_tokens_per_rank=5) for ids in (strange, routing.ids_TK)
    )
    if not torch.equal(one, other) or bool(one[0].any()) or not torch.equal(one[1:], expected[1:]):
        wrong.append("an id that is no expert's")
    memory, plan = context.comm.kept.values(), layers[0].plan
    held = {each.num_max_tokens_per_rank: each.buffer.nbytes for each in memory}
    return wrong, len(memory), [(nbytes, plan.window_bytes(tokens)) for tokens, nbytes in held.items()]


@pytest.mark.parametrize("world", [2, 4])
def test_steps_in_a_row_give_the_same_bits(world):
    _needs(world)
    for wrong, memories, held in run_on_ranks(world, steps_in_a_row, 60):
        assert not wrong
        assert memories == 3, "of up to 256, 512 and 1,024 tokens, which layers of one shape share"
        assert all(nbytes <= planned for nbytes, planned in held), f"(bytes, at most by the plan): {held}"


def weights_held(context):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    (layer,) = layers_of(context, 1)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() - before, layer.plan.weight_bytes(context.comm.rank)


def test_weights_weigh_what_the_plan_says():
    _needs(2)
    for held, planned in run_on_ranks(2, weights_held):
        assert planned <= held < 1.02 * planned + (1 << 20)


def _needs(world: int) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, {torch.cuda.device_count()} are here")
