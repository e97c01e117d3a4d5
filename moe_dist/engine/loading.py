"""A layer of a checkpoint in one call: the plan, this rank's slices, the router, the shared expert."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from moe_dist.checkpoint import check_layer, layer_spec, load_router, load_shard, load_shared_shard
from moe_dist.comm import Comm
from moe_dist.engine.agreement import plan_facts
from moe_dist.engine.backend_rule import default_backend, refusal_of
from moe_dist.engine.choosing import plain_exchange
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.plan import Plan, shared_placement
from moe_dist.engine.planning import make_plan
from moe_dist.engine.router import Router
from moe_dist.errors import ConfigError
from moe_dist.machine.machine import Machine
from moe_dist.messages.notices import notice
from moe_dist.model.spec import MoESpec, ParallelSpec, QuantKind, TokenLayout


def load_layer(
    checkpoint: str | Path,
    layer: int,
    *,
    tp: int = 1,
    ep: int | None = None,
    exchange: str | None = None,
    backend: str | None = None,
    token_layout: TokenLayout = "sharded",
    shared_experts: str | None = None,
    quant: QuantKind | None = None,
    comm: Comm | None = None,
    progress: Callable[[], None] | None = None,
) -> MoELayer:
    """The MoE layer number `layer` of a Hugging Face checkpoint as this rank's part of a distributed one, with its own
    router and, where the model has one, its shared expert. Every rank calls it; each reads its own slices only.

    `ep` defaults to what the ranks leave beside `tp`. `comm` defaults to the process's default group, on this rank's
    GPU under NCCL, or to one rank alone where there is no group. `exchange` defaults to ag_rs where ranks exchange
    tokens, to all_reduce where all have them; `backend` to triton on a GPU that it can serve, else to torch. `auto`
    for one or both takes what was fastest when it was measured, by size of step. The plan says what was taken and why:
    `layer.plan`. `shared_experts`: replicated (the default where the model has one), tp or none. `quant`: the
    FP8 format that a layer stored as bf16 is quantized to as it is read; nothing is unless it is named. `progress` is
    called after each expert.

    Raises ConfigError where tp · ep is not the number of ranks, for what the checkpoint doesn't have, and where ranks
    ask for different layers or plans; CheckpointError for files that are missing, damaged or contradictory;
    UnsupportedError for what can't run here. Where that is raised on some ranks only, the others raise a RankFailure
    which says so; before any weights are read, unless it is found in them.
    """
    _check_types(checkpoint, layer=layer, tp=tp, **({} if ep is None else {"ep": ep}))
    if not (progress is None or callable(progress)):
        raise ConfigError("progress", progress, "is called after each expert", "a function without arguments, or None")
    comm = _comm() if comm is None else comm
    if not isinstance(comm, Comm):
        raise ConfigError("comm", comm, f"is {type(comm).__name__}", "a Comm, as of Comm.from_group, or None")

    def planned() -> Plan:
        spec, machine = _spec(str(checkpoint), layer, shared_experts, quant), Machine.detect(comm.device.type)
        return plan_for(spec, _parallel(tp, ep, comm.world), exchange, backend, token_layout, machine)

    def loaded() -> MoELayer:
        shard = load_shard(str(checkpoint), layer, plan.placement, comm.rank, comm.device, progress, quant)
        shared = None
        if plan.spec.shared_experts != "none":
            columns = shared_placement(plan.spec, plan.parallel).slice_of(comm.rank)
            shared = load_shared_shard(str(checkpoint), layer, *columns, comm.device, quant)
        stored = load_router(str(checkpoint), layer, comm.device)
        router = Router(plan, stored.gate_EH, stored.bias_E, stored.logit_bias_E)
        return MoELayer(plan, shard, comm, router=router, shared=shared)

    plan = comm.together("planning a layer", planned)
    check_alike(plan, comm, layer=layer)
    return comm.together("loading a layer", loaded)


def _check_types(checkpoint: object, **numbers: object) -> None:
    if not isinstance(checkpoint, (str, Path)):
        raise ConfigError("checkpoint", checkpoint, f"is {type(checkpoint).__name__}", "the path of a folder")
    for name, number in numbers.items():
        if type(number) is not int:
            raise ConfigError(name, number, f"is {type(number).__name__}", "a whole number")


def _spec(checkpoint: str, layer: int, shared_experts: str | None, quant: QuantKind | None) -> MoESpec:
    """Of the layer, with its shared expert and its format as asked for."""
    spec = layer_spec(checkpoint, layer, quant)
    has_one = spec.shared_intermediate > 0
    if shared_experts is None:
        shared_experts = "replicated" if has_one else "none"
    elif shared_experts != "none" and not has_one:
        raise ConfigError("shared_experts", shared_experts, f"{checkpoint} has no shared expert", "none")
    asked: MoESpec = spec.with_changes(shared_experts=shared_experts)
    check_layer(checkpoint, layer, shared=shared_experts != "none")
    return asked


def plan_for(
    spec: MoESpec,
    parallel: ParallelSpec,
    exchange: str | None,
    backend: str | None,
    token_layout: TokenLayout,
    machine: Machine,
) -> Plan:
    """With the exchange that goes with the tokens and the backend that goes with the machine where None is named: on a
    GPU that triton can't serve there is a notice why it is torch. A named one that can't serve is refused."""
    if exchange is None:
        exchange = plain_exchange(parallel.world, token_layout)
    plan = partial(make_plan, spec, parallel, exchange=exchange, token_layout=token_layout, machine=machine)
    if backend is not None:
        return plan(backend=backend)
    taken, reason = default_backend(machine, [refusal_of(lambda name: plan(backend=name))])
    made = plan(backend=taken)
    if reason:
        notice(f"backend {taken} by default, which is slow: {reason}")
    return made


def check_alike(plan: Plan, comm: Comm, **others: object) -> None:
    """Collective. Raises ConfigError where ranks would run different plans, as where `auto` chose from different
    records or they were given different arguments, with the values and whose they are. `others`: what must be the same
    beside it, by name."""
    facts = {name: str(value) for name, value in others.items()}
    comm.compare(facts | {"plan.backend": ", ".join(each.backend for each in plan.choices)} | plan_facts(plan))


def _comm() -> Comm:
    if not dist.is_initialized():
        return Comm.single("cuda" if torch.cuda.is_available() else "cpu")
    return Comm.from_group("cuda" if dist.get_backend() == "nccl" else "cpu")


def _parallel(tp: int, ep: int | None, world: int) -> ParallelSpec:
    if ep is None:
        ep = max(1, world // max(1, tp))
    parallel = ParallelSpec(tp=tp, ep=ep)
    if parallel.world != world:
        rule = f"tp · ep must be the number of ranks in the process group, {world}"
        alone = "; start several with torchrun and torch.distributed.init_process_group" if world == 1 else ""
        raise ConfigError("tp · ep", parallel.world, rule, f"{world}{alone}")
    return parallel
