"""`replace_experts`: the experts of a loaded model become distributed layers, under every placement that there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.checkpoint.layout import spec_as
from moe_dist.comm import Comm
from moe_dist.comm.others import backends_of, rank_in
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.plan import Plan
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.integrations.transformers.comms import comm_of
from moe_dist.integrations.transformers.forms import Form, check_structure, form_of, is_experts, tensors_of
from moe_dist.integrations.transformers.settings import AUTO, Settings
from moe_dist.integrations.transformers.steps import Steps, check_inference, plan_of, routing_of
from moe_dist.integrations.transformers.stored import StoredExperts
from moe_dist.integrations.transformers.version import installed
from moe_dist.integrations.transformers.weights import as_they_lie, check_values, shard_of
from moe_dist.model.spec import TOKEN_LAYOUTS, ParallelSpec, QuantKind, TokenLayout
from moe_dist.model.weights import ExpertWeights

T = TypeVar("T")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts", "moe_top_k")
NO_CHECKPOINT = (
    "its experts are this rank's slices in moe_dist's own form, and no checkpoint has that form",
    "a call before its experts are replaced",
)
REFUSED = {
    "save_pretrained": NO_CHECKPOINT,
    "push_to_hub": NO_CHECKPOINT,  # it makes a repository before it saves
    "set_experts_implementation": (
        "its experts are moe_dist's layers, and transformers' functions can't run them",
        "exchange and backend of replace_experts",
    ),
}


class DistributedExperts(nn.Module):
    """In the place of an experts module: this rank's part of a layer, called as transformers calls experts."""

    def __init__(self, layer: MoELayer, graph_buckets: Sequence[int]) -> None:
        super().__init__()
        self.layer = layer
        self.num_experts, self.hidden_dim = layer.plan.spec.num_experts, layer.plan.spec.hidden
        self.intermediate_dim = layer.plan.spec.intermediate
        self._graph_buckets = tuple(graph_buckets)
        self._steps: Steps | None = None

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index [T, K] integers, top_k_weights [T, K] floats, to [T, H]. Collective. Raises
        ConfigError where a gradient is wanted, RankFailure for a rank that does not come in time."""
        check_inference(hidden_states, top_k_weights)
        if self._steps is None or self._steps.layer is not self.layer:  # a copy has a layer of its own
            self._steps = Steps(self.layer, self._graph_buckets)
        return self._steps(hidden_states, routing_of(top_k_index, top_k_weights))

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs, which can't be copied and are captured anew."""
        return {**self.__dict__, "_steps": None}


def replace_experts(
    model: nn.Module,
    *,
    token_layout: TokenLayout,
    tp: int = 1,
    ep: int | None = None,
    expert_map: Sequence[int] = (),
    replicas: Mapping[int, Sequence[int]] | None = None,
    allow_empty_shards: bool = False,
    exchange: str | None = None,
    backend: str | None = None,
    quant: QuantKind | None = None,
    checkpoint: Path | str | None = None,
    top_k: int | None = None,
    graph_buckets: tuple[int, ...] = (),
    group: dist.ProcessGroup | None = None,
    device: torch.device | str | None = None,
    timeout_s: float | None = None,
    progress: Callable[[], None] | None = None,
) -> tuple[str, ...]:
    """Replace the experts of a model of transformers by moe_dist's layers, and return the names of the modules that
    were replaced. Every rank calls it on the same whole model; it takes its own slices, and the originals are freed one
    layer after the other. Router, shared expert, routed scaling and all else stay transformers' own.

    `token_layout`: replicated where all ranks give the model the same batch, sharded where each has its own. `tp` and
    `ep`, multiplied, are the number of ranks; `ep` defaults to what `tp` leaves. `expert_map`, `replicas` and
    `allow_empty_shards`: as ParallelSpec. `exchange`, `backend`, `graph_buckets`, `timeout_s`: as Settings. `quant`:
    the FP8 format that bf16 experts are quantized to. `checkpoint`: the folder that the model was loaded from, whose
    experts are read as they are stored: transformers makes bf16 of FP8 on a CPU. `top_k`: experts of a token, if the
    model's config does not say it. `group`: of the ranks (default: the process's default group, or one rank alone).
    `device`: of this rank's experts (default: its GPU under NCCL, else where they are). `progress` is called after each
    module.

    Nothing is replaced on any rank unless all of it can be, on all of them. Raises ConfigError for an argument that
    can't be and for weights that are not finite or all zeros, UnsupportedError for experts that moe_dist does not
    compute or a model that is distributed already, InstallationError without transformers. Where weights or what is
    planned are refused on some ranks only, the others raise a RankFailure that says so.
    """
    installed()
    settings = Settings(exchange, backend, graph_buckets, timeout_s)
    if token_layout not in TOKEN_LAYOUTS:
        raise ConfigError("token_layout", token_layout, "says whether ranks share a batch", TOKEN_LAYOUTS)
    found = _experts_of(model)
    comm = _comm(group, device, settings, next(iter(found.values())))
    given = {"expert_map": expert_map, "replicas": replicas or (), "allow_empty_shards": allow_empty_shards}
    parallel = _parallel(tp, ep, given, comm.world)
    stored = None if checkpoint is None else StoredExperts(checkpoint, list(found), quant)

    def planned(name: str) -> tuple[Form, Plan]:
        form = form_of(found[name], tensors_of(found[name]), name)
        experts = _top_k(found[name], top_k)
        spec = stored.spec(name, form, experts) if stored else spec_as(form.spec(name, experts), quant)
        return form, plan_of(spec, parallel, token_layout, settings, comm)

    def checked() -> None:
        for name, (form, plan) in plans.items():
            _check_values(name, form, tensors_of(found[name]), plan.placement.experts_of(comm.rank))

    def replaced() -> None:
        for name, (form, plan) in plans.items():
            if stored:
                shard = stored.shard(name, plan, comm.rank, comm.device)
            else:
                shard = _shard(model, name, form, plan, comm)
            _replace(model, name, MoELayer(plan, shard, comm), settings)
            if progress:
                progress()

    # What one rank alone refuses would leave the others waiting for it in the model's first step, for up to two hours.
    plans = _together(comm, settings, lambda: {name: planned(name) for name in found})
    comm.together("checking a model's experts", checked)
    found.clear()  # so that each is freed as it is replaced
    comm.together("replacing a model's experts", replaced)
    _settle(model)
    return tuple(plans)


def _check_values(name: str, form: Form, tensors: Mapping[str, Tensor], held: Sequence[int]) -> None:
    try:
        check_values(form, as_they_lie(form, tensors), held)
    except ConfigError as error:
        raise error.of(f"{name}: {error.field}") from None


def _together(comm: Comm, settings: Settings, plan: Callable[[], T]) -> T:
    """Of all ranks, unless planning is collective by itself, as `auto` is."""
    return plan() if AUTO in (settings.exchange, settings.backend) else comm.together("planning experts", plan)


def _experts_of(model: nn.Module) -> dict[str, Any]:
    """Its experts modules by name, all of which can be computed."""
    if not isinstance(model, nn.Module):
        raise ConfigError("model", type(model).__name__, "is no module", "a model of transformers")
    found = {name: module for name, module in model.named_modules() if is_experts(module)}
    if not found:
        if any(isinstance(module, DistributedExperts) for module in model.modules()):
            raise UnsupportedError("replacing experts a second time", ["they are moe_dist's already"])
        reason = "no module of it has the flags of transformers' experts (has_gate, is_transposed)"
        raise UnsupportedError(f"replacing the experts of a {type(model).__name__}", [reason])
    for name, module in found.items():
        check_structure(module, name, copied=True)
        reasons = []
        if any(hasattr(tensor, "device_mesh") for tensor in module._parameters.values()):
            reasons.append("it was loaded with a DistributedConfig, so a rank has its own experts only")
        if hasattr(module, "_hf_hook"):
            reasons.append("accelerate has spread the model over devices (device_map)")
        if reasons:
            raise UnsupportedError(f"replacing {name}", reasons, "a model loaded whole, on a CPU or on one device")
    return found


def _comm(
    group: dist.ProcessGroup | None, device: torch.device | str | None, settings: Settings, experts: nn.Module
) -> Comm:
    here = tensors_of(experts)["down_proj"].device
    if group is None and not dist.is_initialized():
        return Comm.single(device or here)
    if dist.is_initialized() and device is None:  # without the one, from_group says what is wrong
        rank_in(group)
        nccl = backends_of(group).get("cuda") == "nccl" and torch.cuda.is_available()
        device = "cuda" if nccl else here
    return comm_of(group, device or here, settings.timeout_s)


def _parallel(tp: int, ep: int | None, given: dict[str, Any], world: int) -> ParallelSpec:
    if ep is None:
        ep = max(1, world // tp) if type(tp) is int and tp > 0 else 1
    parallel = ParallelSpec(tp=tp, ep=ep, **given)
    if parallel.world != world:
        rule = f"tp · ep must be the number of ranks in the process group, {world}"
        raise ConfigError("tp · ep", parallel.world, rule, world)
    return parallel


def _top_k(module: Any, asked: int | None) -> int:
    if asked is not None:
        return asked
    found = (getattr(module.config, name, None) for name in TOP_K)
    known = next((each for each in found if isinstance(each, int)), None)
    if known is None:
        raise ConfigError("top_k", None, f"the model's config has none of {', '.join(TOP_K)}", "experts of a token")
    return known


def _shard(model: nn.Module, name: str, form: Form, plan: Plan, comm: Comm) -> ExpertWeights:
    whole = as_they_lie(form, tensors_of(model.get_submodule(name)))
    return shard_of(form, whole, plan.spec, plan.placement, comm.rank, comm.device)


def _replace(model: nn.Module, name: str, layer: MoELayer, settings: Settings) -> None:
    new = DistributedExperts(layer, settings.graph_buckets)
    new.train(model.get_submodule(name).training)
    model.set_submodule(name, new)


def _settle(model: nn.Module) -> None:
    """Refuse what the model and its parts can't do any more."""
    around = [each for each in model.modules() if any(isinstance(one, DistributedExperts) for one in each.modules())]
    named: list[Any] = [each for each in around if hasattr(each, "set_experts_implementation")]
    for each in named:  # or generate() on a GPU would set one for its decoding
        each.set_experts_implementation("eager")
    for each in around:
        for method in REFUSED:
            if hasattr(each, method):
                setattr(each, method, partial(_refuse, method))


def _refuse(method: str, *_: Any, **__: Any) -> NoReturn:
    reason, instead = REFUSED[method]
    raise UnsupportedError(f"{method} after replace_experts", [reason], instead)
