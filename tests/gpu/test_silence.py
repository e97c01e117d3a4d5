"""What a GPU must not do in silence: ids beyond the experts, weights and rows of no account, what a program has set,
groups of others, and what a captured step is given."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gpu.ranks import backends_here, run_on_ranks

from moe_dist.comm import Comm
from moe_dist.engine.graph import StepGraph
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.plan import Plan
from moe_dist.engine.planning import make_plan
from moe_dist.engine.router import Router
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.exchange import EXCHANGES
from moe_dist.machine.machine import Machine
from moe_dist.model.routing import Routing
from moe_dist.model.spec import QUANT_KINDS, MoESpec, ParallelSpec
from moe_dist.model.weights import shard
from moe_dist.oracle.reference import relative_error
from moe_dist.workloads.random_weights import random_weights
from moe_dist.workloads.skews import synthetic_routing
from moe_dist.workloads.streams import Stream

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

E, K, H, TOKENS = 16, 4, 1024, 40
STRANGE = (-1, -2, E, E + 1, 2**31 - 1, -(2**31))


def spec_of(quant: str) -> MoESpec:
    return MoESpec(hidden=H, intermediate=512, num_experts=E, top_k=K, quant=quant, scoring="sigmoid")


def plans(world: int, quant: str) -> list[Plan]:
    """Every exchange and backend that serves this format on these GPUs."""
    found = []
    for exchange in EXCHANGES.names():
        for backend in backends_here():
            for parallel in {ParallelSpec(ep=world), ParallelSpec(tp=world)}:
                with contextlib.suppress(UnsupportedError, ConfigError):
                    machine = Machine.detect("cuda")
                    plan = make_plan(spec_of(quant), parallel, exchange=exchange, backend=backend, machine=machine)
                    found.append(plan)
    return found


def layer_of(plan: Plan, comm: Comm, **given: Any) -> MoELayer:
    whole = random_weights(plan.spec, 0, comm.device)
    return MoELayer(plan, shard(whole, plan.placement, comm.rank), comm, **given)


def inputs(plan: Plan, comm: Comm, key: int = 0) -> tuple[torch.Tensor, Routing]:
    x = Stream("silence", key, comm.rank, device=comm.device).normal(TOKENS, H).to(plan.spec.torch_dtype)
    return x, synthetic_routing(plan.spec, TOKENS, "uniform", key, comm.rank).to(comm.device)


def label(plan: Plan) -> str:
    return f"{plan.parallel.label} {plan.spec.quant_label} {plan.exchange} {plan.backend}"


def errors_of(context: Any, quants: tuple[str, ...]) -> dict[str, float]:
    """For each plan, how far a step with strange ids, NaN weights beside them and wild rows without any expert is from
    one where all of that is plainly nothing; eager and, where it can be, replayed."""
    comm, found = context.comm, {}
    for plan in [plan for quant in quants for plan in plans(comm.world, quant)]:
        layer, (x, routing) = layer_of(plan, comm), inputs(plan, comm)
        places = torch.arange(TOKENS * K, device=comm.device).view(TOKENS, K) % 7 == 3
        places[5], places[11] = True, True
        nothing = Routing(routing.ids_TK.masked_fill(places, -1), routing.weights_TK.masked_fill(places, 0.0))
        calm_x = x.clone()
        calm_x[[5, 11]] = 0
        expected = layer(calm_x, nothing, max_tokens_per_rank=TOKENS).clone()
        wild_x = x.clone()
        wild_x[5], wild_x[11] = 3e4, float("nan")
        strange = torch.tensor(STRANGE, dtype=torch.int32, device=comm.device)
        values = strange[torch.arange(TOKENS * K, device=comm.device).view(TOKENS, K) // 7 % len(STRANGE)]
        ids = torch.where(places, values, routing.ids_TK)
        wild = Routing(ids, routing.weights_TK.masked_fill(places, float("nan")))
        y = layer(wild_x, wild, max_tokens_per_rank=TOKENS)
        found[f"{label(plan)} eager"] = relative_error(y, expected)
        if plan.capturable.ok:
            graph = StepGraph(layer, TOKENS + 3, calm_x, nothing)
            found[f"{label(plan)} graph"] = relative_error(graph(wild_x, wild), expected)
    torch.cuda.synchronize()
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_of_no_account_changes_nothing(world):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    found = [item for ranks in run_on_ranks(world, errors_of, QUANT_KINDS) for item in ranks.items()]
    assert {name.split()[3] for name, _ in found} == set(backends_here())
    # Equal bits, but where a kernel chosen for another bucket adds up in another order: bf16 rounds that to 0.5 %.
    wrong = [f"{name}: {error}" for name, error in found if not error <= 1e-2]
    assert not wrong, f"{len(wrong)} of {len(found)}:\n" + "\n".join(wrong)


def check_debug(context: Any) -> list[str]:
    """In the debug mode, and in no other, the host looks."""
    comm = context.comm
    plan = make_plan(
        spec_of("fp8_block"), ParallelSpec(), exchange="local", backend="triton", machine=Machine.detect("cuda")
    )
    x, routing = inputs(plan, comm)
    silent, watched = layer_of(plan, comm, debug=False), layer_of(plan, comm, debug=True)
    graph = StepGraph(watched, TOKENS, x, routing)
    said = []
    for step in (silent, watched, graph):
        for field, value in (("ids", E), ("ids", -2), ("weights", float("nan"))):
            wrong = Routing(routing.ids_TK.clone(), routing.weights_TK.clone())
            getattr(wrong, f"{field}_TK")[7, 2] = value
            try:
                step(x, wrong)
                said.append("nothing")
            except ConfigError as error:
                said.append(f"{error.field} {'token 7, place 2' in error.rule}")
    return said


def test_the_debug_mode_looks_at_values():
    (said,) = run_on_ranks(1, check_debug)
    looked = ["routing.ids True", "routing.ids True", "routing.weights True"]
    assert said == ["nothing"] * 3 + looked * 2


def check_refusals(context: Any) -> list[str]:
    """A captured step would copy what has another dtype into its buffers."""
    comm = context.comm
    plan = make_plan(
        spec_of("fp8_block"), ParallelSpec(), exchange="local", backend="triton", machine=Machine.detect("cuda")
    )
    layer, (x, routing) = layer_of(plan, comm), inputs(plan, comm)
    graph, said = StepGraph(layer, TOKENS, x, routing), []
    wrong = [
        (x.float(), routing),
        (x.cpu(), routing),
        (x[:, :-1], routing),
        (x, Routing(routing.ids_TK.long(), routing.weights_TK)),
        (x, Routing(routing.ids_TK, routing.weights_TK.bfloat16())),
        (x, routing.to("cpu")),
        (torch.cat([x, x]), Routing(torch.cat([routing.ids_TK] * 2), torch.cat([routing.weights_TK] * 2))),
    ]
    for given in wrong:
        for step in (graph, layer)[: 1 if len(given[0]) > TOKENS else 2]:
            try:
                step(*given)
                said.append("nothing")
            except ConfigError as error:
                said.append(error.field)
    return said


def test_captured_steps_refuse_what_eager_ones_refuse():
    (said,) = run_on_ranks(1, check_refusals)
    fields = ("x.dtype", "x.device", "x", "routing.ids.dtype", "routing.weights.dtype", "routing.ids.device")
    assert said == [field for field in fields for _ in range(2)] + ["tokens"]


@contextlib.contextmanager
def set_around(setter: Any, before: Any, now: Any):
    setter(now)
    try:
        yield
    finally:
        setter(before)


def set_tf32(on: bool) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if on else "none"


def worlds_around(context: Any) -> list[str]:
    """Where a layer's result differs from that of a plain world, by backend and world."""
    comm, wrong = context.comm, []
    other = torch.device("cuda", (comm.device.index + 1) % torch.cuda.device_count())
    worlds = {
        "default dtype": lambda: set_around(torch.set_default_dtype, torch.float32, torch.bfloat16),
        "default device": lambda: set_around(torch.set_default_device, None, "meta"),
        "autocast": lambda: torch.autocast("cuda", dtype=torch.bfloat16),
        "tf32": lambda: set_around(set_tf32, False, True),
        "another current GPU": lambda: torch.cuda.device(other),
    }
    for backend in backends_here():
        machine = Machine.detect("cuda")
        plan = make_plan(spec_of("fp8_block"), ParallelSpec(), exchange="local", backend=backend, machine=machine)
        gate = Stream("gate", device=comm.device).normal(E, H)
        layer = layer_of(plan, comm, router=Router(plan, gate))
        x, _ = inputs(plan, comm)
        expected = layer(x).clone()
        for name, world in worlds.items():
            with world():
                if not torch.equal(layer(x), expected):
                    wrong.append(f"{backend}: {name}")
        copied = copy.deepcopy(layer).half().to(torch.float64)
        if not torch.equal(copied(x), expected):
            wrong.append(f"{backend}: copied")
        if backend != "torch":
            graph = StepGraph(layer, TOKENS, x, layer.router(x))
            with torch.autocast("cuda", dtype=torch.bfloat16):
                if not relative_error(graph(x, layer.router(x)), expected) < 1e-3:
                    wrong.append(f"{backend}: a graph under autocast")
        compiled = torch.compile(lambda x, layer=layer: layer(x + 0), backend="eager")
        if not torch.equal(compiled(x), expected):
            wrong.append(f"{backend}: compiled")
    return wrong


def test_the_world_around_changes_nothing():
    (wrong,) = run_on_ranks(1, worlds_around)
    assert wrong == []


def siblings(context: Any) -> list[float]:
    """On two GPUs: a group of each rank alone, and one of both that its members make, all of NCCL; and a timeout."""
    comm, errors = context.comm, []
    alone = [dist.new_group([0], backend="nccl"), dist.new_group([1], backend="nccl")][comm.rank]
    both = dist.new_group([1, 0], backend="nccl")
    mixed = dist.new_group([0, 1], backend="cpu:gloo,cuda:nccl")
    before = layer_of(plan_over(comm), comm)(*inputs(plan_over(comm), comm))
    for group in (alone, both, mixed):
        ours = Comm.from_group("cuda", group, timeout_s=30)
        assert ours.device == comm.device
        plan = plan_over(ours)
        x, routing = inputs(plan, comm)  # the same tokens whatever the group
        layer = layer_of(plan, ours)
        errors.append(relative_error(layer(x, routing), before))
        errors.append(relative_error(StepGraph(layer, TOKENS, x, routing)(x, routing), before))
        ours.leave()
        tiny = torch.ones(1, device=comm.device)
        dist.all_reduce(tiny, group=group)  # it is still there
        errors.append(abs(float(tiny) - dist.get_world_size(group)))
    return errors


def plan_over(comm: Comm) -> Plan:
    exchange = "local" if comm.world == 1 else "all_to_all"
    backend, machine = "triton", Machine.detect("cuda")
    return make_plan(
        spec_of("fp8_block"), ParallelSpec(ep=comm.world), exchange=exchange, backend=backend, machine=machine
    )


def test_sibling_groups_of_nccl():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    for errors in run_on_ranks(2, siblings):
        assert all(error < 1e-2 for error in errors), errors
