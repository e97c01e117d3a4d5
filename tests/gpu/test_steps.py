"""What a step is told, on GPUs: scratch that layers, graphs and streams share, rows in two forms, ranges of columns."""

from __future__ import annotations

import pytest
import torch
from gpu.ranks import backends_here, run_on_ranks
from sinks import InRanges

from moe_dist.backends import BACKENDS
from moe_dist.comm import Comm
from moe_dist.commands.config import find_model
from moe_dist.engine.graph import StepGraph
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import shard_from
from moe_dist.oracle.reference import relative_error
from moe_dist.step import Step, TokenRows, workspace_of
from moe_dist.workloads.random_weights import random_expert, random_weights
from moe_dist.workloads.skews import synthetic_routing

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

SPEC = MoESpec(name="of tests", hidden=2048, intermediate=512, num_experts=16, top_k=4)
LAYERS, TOKENS = 100, 512


@pytest.fixture(autouse=True)
def needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


def layer_of(backend: str, comm: Comm, seed: int = 1) -> MoELayer:
    plan = make_plan(
        SPEC,
        ParallelSpec(),
        exchange="local",
        backend=backend,
        token_layout="replicated",
        machine=Machine.detect("cuda"),
    )
    return MoELayer(plan, random_weights(SPEC, seed).to("cuda"), comm)


def tokens(count: int, seed: int):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(count, SPEC.hidden, device="cuda", generator=generator).bfloat16()
    return x, synthetic_routing(SPEC, count, "zipf:1.2", seed).to("cuda")


@pytest.mark.parametrize("backend", ["triton", "cutlass"])
def test_a_hundred_layers_need_the_scratch_of_one(backend):
    if backend not in backends_here():
        pytest.skip(f"{backend} is not here")
    comm = Comm.single("cuda")
    layer = layer_of(backend, comm)
    x, routing = tokens(TOKENS, 1)
    layer(x, routing)
    layer(x, routing)
    workspace = workspace_of(comm.device)
    alone = workspace.nbytes
    assert 0 < workspace.high_water <= layer.plan.scratch_bytes(TOKENS)
    weights = layer.backend._weights
    layers = [MoELayer(layer.plan, weights, comm) for _ in range(LAYERS)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = x
    for one in layers:
        y = x + one(y, routing)
    torch.cuda.synchronize()
    assert workspace.nbytes == alone
    assert torch.cuda.memory_allocated() - before <= 2 * y.nbytes + (1 << 20)
    assert bool(y.isfinite().all())


def test_graphs_and_eager_steps_on_several_streams_give_what_each_gives_alone():
    comm = Comm.single("cuda")
    layers = [layer_of("triton", comm, seed) for seed in (1, 2)]
    inputs = [tokens(count, count) for count in (8, 300, 3000)]
    expected = {(i, j): layers[i](*inputs[j]).clone() for i in range(2) for j in range(3)}
    graphs = {(i, j): StepGraph(layers[i], len(inputs[j][0]), *inputs[j]) for i, j in expected}
    workspace_of(comm.device).reserve(workspace_of(comm.device).nbytes + 1)  # graphs keep the one they have
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    found = {}
    for turn in range(3):
        for number, (i, j) in enumerate(expected):
            with torch.cuda.stream(streams[(number + turn) % 3]):
                run = graphs[i, j] if (number + turn) % 2 else layers[i]
                found[turn, i, j] = run(*inputs[j]).clone()
    torch.cuda.synchronize()
    wrong = [key for key, y in found.items() if not torch.equal(y, expected[key[1:]])]
    assert not wrong


@pytest.mark.parametrize("backend", ["triton", "cutlass", "deep_gemm", "flashinfer_cutlass", "torch"])
@pytest.mark.parametrize("rows", [3, 130, 5000])
def test_ranges_of_columns_give_the_same_bits(backend, rows):
    if backend not in backends_here():
        pytest.skip(f"{backend} is not here")
    wanted = {"none", "fp8_block", "fp8_channel", "fp8_tensor_static", "fp8_tensor_dynamic"}
    tried = 0
    for quant in sorted(wanted):
        spec = SPEC.with_changes(quant=quant)
        plan_of = {"exchange": "local", "token_layout": "replicated", "machine": Machine.detect("cuda")}
        problem = make_plan(spec, ParallelSpec(), backend="torch", **plan_of).problem(0)
        if not BACKENDS.get(backend).supports(problem).ok:
            continue
        made = BACKENDS.get(backend)(problem)
        made.prepare(random_weights(spec, 1).to("cuda"))
        x = torch.randn(rows, spec.hidden, device="cuda").bfloat16()
        routing = synthetic_routing(spec, rows, "uniform", 1).to("cuda")
        given = TokenRows(x, routing.ids_TK, routing.weights_TK)
        whole = made.forward_alone(given, torch.bfloat16)
        for widths in ([512], [128, 1024], [2048]):
            sink = InRanges((rows, spec.hidden), torch.bfloat16, x.device, widths)
            step = Step(workspace_of(x.device))
            step.workspace.begin()
            made.forward(step, given, sink)
            assert torch.equal(sink.y, whole), (quant, widths)
            assert sink.put_so_far == sink.columns(), (quant, widths)
        tried += 1
    assert tried


def scratch(context, backend: str):
    """Of each exchange on this rank: what its steps took, eager, as captured, and what the plan says."""
    model, comm, found = find_model("Qwen3-30B-A3B"), context.comm, []
    for parallel in (ParallelSpec(tp=comm.world), ParallelSpec(ep=comm.world)):
        for exchange in ("all_reduce", "ag_rs", "all_to_all"):
            for layout in ("sharded", "replicated"):
                plan = make_plan(
                    model, parallel, exchange=exchange, backend=backend, token_layout=layout,
                    machine=Machine.detect("cuda"),
                )  # fmt: skip
                shard = shard_from(lambda e: random_expert(model, e, 1, comm.device), plan.placement, comm.rank)
                layer = MoELayer(plan, shard, comm)
                for count in (16, 1500):
                    x = torch.randn(count, model.hidden, device=comm.device).bfloat16()
                    seed = comm.rank if layout == "sharded" else 7
                    routing = synthetic_routing(model, count, "uniform", seed).to(comm.device)
                    if layout == "replicated":
                        x = torch.ones_like(x)
                    workspace = workspace_of(comm.device)
                    for captured in (False, True):
                        workspace.high_water = 0
                        layer(x, routing, max_tokens_per_rank=count, captured=captured)
                        label = f"{parallel.label} {exchange} {layout} {count} {captured}"
                        found.append((label, workspace.high_water, plan.scratch_bytes(count)))
    return found


def test_the_plan_knows_the_scratch_of_two_ranks():
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, {torch.cuda.device_count()} are here")
    for of_rank in run_on_ranks(2, scratch, "triton"):
        wrong = [line for line in of_rank if not 0.5 * line[2] <= line[1] <= line[2]]
        assert not wrong


def forms(context, backend: str):
    """Outputs with rows as tokens and sorted by expert, eager and in a graph, of each exchange on this rank."""
    model, comm, wrong = find_model("Qwen3-30B-A3B"), context.comm, []
    parallel = ParallelSpec(ep=comm.world)
    exchanges = ("local",) if comm.world == 1 else ("all_reduce", "ag_rs", "all_to_all")
    for exchange in exchanges:
        layout = "replicated" if exchange in ("local", "all_reduce") else "sharded"
        given = {"exchange": exchange, "backend": backend, "token_layout": layout, "machine": Machine.detect("cuda")}
        plans = [make_plan(model, parallel, form=form, **given) for form in ("token", "expert")]
        shard = shard_from(lambda e: random_expert(model, e, 1, comm.device), plans[0].placement, comm.rank)
        layers = [MoELayer(plan, shard, comm) for plan in plans]
        for count in (1, 16, 1500):
            seed = count if layout == "replicated" else count + comm.rank
            generator = torch.Generator(comm.device).manual_seed(seed)
            x = torch.randn(count, model.hidden, device=comm.device, generator=generator).bfloat16()
            routing = synthetic_routing(model, count, "zipf:1.2", seed).to(comm.device)
            eager = [layer(x, routing, max_tokens_per_rank=count) for layer in layers]
            graphs = [StepGraph(layer, count, x, routing)(x, routing).clone() for layer in layers]
            for name, y in zip(("expert", "graph of token", "graph of expert"), (eager[1], *graphs), strict=True):
                if not torch.equal(y, eager[0]):
                    wrong.append(f"{exchange} {count} {name}: {relative_error(y, eager[0])}")
    return wrong


@pytest.mark.parametrize("backend", ["triton", "cutlass", "deep_gemm"])
@pytest.mark.parametrize("world", [1, 2])
def test_rows_sorted_by_the_exchange_give_the_same_bits(backend, world):
    if backend not in backends_here():
        pytest.skip(f"{backend} is not here")
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, {torch.cuda.device_count()} are here")
    for wrong in run_on_ranks(world, forms, backend):
        assert not wrong
