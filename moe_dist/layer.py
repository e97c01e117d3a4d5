"""The layer: dispatch, local partial sum, combine. Usable in any process that has a process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.backends import BACKENDS, Backend
from moe_dist.comm import Comm
from moe_dist.errors import ConfigError
from moe_dist.exchange import EXCHANGES
from moe_dist.exchange.layout import AnyExchange, with_layout
from moe_dist.plan import Plan
from moe_dist.routing import Routing, route
from moe_dist.rows import TokenRows
from moe_dist.stages import NO_STAGES, Stages
from moe_dist.weights import ExpertWeights


class Router(nn.Module):
    """Logits in float32 from the router's weight [E, H], and the spec's top-k rule."""

    def __init__(self, plan: Plan, gate_EH: Tensor, bias_E: Tensor | None = None) -> None:
        super().__init__()
        expected = (plan.spec.num_experts, plan.spec.hidden)
        if tuple(gate_EH.shape) != expected:
            raise ConfigError("router.weight", tuple(gate_EH.shape), "wrong shape", expected)
        self.spec = plan.spec
        self.register_buffer("gate_EH", gate_EH.float())
        self.register_buffer("bias_E", None if bias_E is None else bias_E.float())
        self.gate_EH: Tensor
        self.bias_E: Tensor | None

    def forward(self, x_TH: Tensor) -> Routing:
        return route(x_TH.float() @ self.gate_EH.T, self.spec, self.bias_E)


class MoELayer(nn.Module):
    """One rank's part of a distributed MoE layer.

    `shard` is what `plan.placement` gives this rank (weights.shard, checkpoint.load_shard). `shared` is the shared
    expert, whole or this rank's slice, as `plan.spec.shared_experts` says. Forward is collective.
    """

    def __init__(
        self,
        plan: Plan,
        shard: ExpertWeights,
        comm: Comm,
        *,
        router: Router | None = None,
        shared: ExpertWeights | None = None,
        stages: Stages = NO_STAGES,
    ) -> None:
        super().__init__()
        if comm.world != plan.placement.world:
            raise ConfigError("parallel", plan.parallel.label, f"the process group has {comm.world} ranks", comm.world)
        if (plan.spec.shared_experts != "none") != (shared is not None):
            rule = "the shared expert's weights must be given exactly if the spec has one"
            raise ConfigError("model.shared_experts", plan.spec.shared_experts, rule)
        _check_shard(plan, shard, comm.rank)
        if shared is not None and shared.a13 is not None and shard.a13 is not None and shared.a13 != shard.a13:
            rule = "the shared expert takes the same quantized rows, so it needs the experts' static input scale"
            raise ConfigError("shared.a13", float(shared.a13), rule, float(shard.a13))
        self.plan, self.comm, self.stages, self.router = plan, comm, stages, router
        self.exchange: AnyExchange = with_layout(
            EXCHANGES.get(plan.exchange)(comm, plan.placement, plan.spec, plan.payload, shard.a13, stages),
            plan.token_layout,
        )
        self.backend = _prepared(plan, shard, stages)
        self.shared = None if shared is None else _prepared(plan, shared, stages, shared_expert=True)

    def forward(
        self, x_TH: Tensor, routing: Routing | None = None, *, max_tokens_per_rank: int | None = None
    ) -> Tensor:
        """[T, H] in the spec's dtype to [T, H]. T may be zero where tokens are sharded, and differ between ranks.

        Without `routing` the layer's own router decides. `max_tokens_per_rank` is the bucket that all ranks step at,
        the same on all; a rank with more tokens raises, and the others wait for it until the collective's timeout.
        Without it they agree on one, which costs a small collective on the CPU.
        """
        routing = self._routing(x_TH, routing)
        bucket = max_tokens_per_rank if self.exchange.needs_bucket else None
        if self.exchange.needs_bucket and bucket is None:
            bucket = self.comm.agree_max(routing.tokens)
        rows, handle = self.exchange.dispatch(x_TH, routing, bucket)
        y_RH = self.backend.forward(rows)
        if self.shared is not None and self.plan.spec.shared_experts == "tp":
            y_RH = y_RH + self.shared.forward(_every_row(rows))
        y_TH = self.exchange.combine(y_RH, handle)
        if self.shared is not None and self.plan.spec.shared_experts == "replicated":
            y_TH = y_TH + self.shared.forward(_every_row(TokenRows(x_TH, routing.ids_TK, routing.weights_TK)))
        return y_TH.to(self.plan.spec.torch_dtype)

    def warm_up(self, x_TH: Tensor, routing: Routing, max_tokens_per_rank: int) -> None:
        """Let the backend choose and compile what it needs for this bucket, then run a step: collective, not to be
        timed or captured."""
        bucket = max_tokens_per_rank if self.exchange.needs_bucket else None
        rows, handle = self.exchange.dispatch(x_TH, self._routing(x_TH, routing), bucket)
        self.backend.tune(rows)
        self.exchange.combine(self.backend.forward(rows), handle)
        self(x_TH, routing, max_tokens_per_rank=max_tokens_per_rank)

    def _routing(self, x_TH: Tensor, routing: Routing | None) -> Routing:
        spec = self.plan.spec
        if x_TH.ndim != 2 or x_TH.shape[1] != spec.hidden:
            raise ConfigError("x", tuple(x_TH.shape), "wrong shape", f"[tokens, {spec.hidden}]")
        if x_TH.dtype != spec.torch_dtype:
            raise ConfigError("x.dtype", x_TH.dtype, "not the spec's", spec.torch_dtype)
        if routing is None:
            if self.router is None:
                raise ConfigError("routing", None, "this layer has no router of its own")
            routing = self.router(x_TH)
        if tuple(routing.ids_TK.shape) != (len(x_TH), spec.top_k):
            raise ConfigError("routing.ids", tuple(routing.ids_TK.shape), "wrong shape", (len(x_TH), spec.top_k))
        return routing

    def extra_repr(self) -> str:
        plan = self.plan
        return f"{plan.parallel.label}, exchange={plan.exchange}, backend={plan.backend}, payload={plan.payload}"


def _check_shard(plan: Plan, shard: ExpertWeights, rank: int) -> None:
    placement, spec = plan.placement, plan.spec
    width, experts = placement.width_of(rank), len(placement.experts_of(rank))
    expected: dict[str, Any] = {
        "w13": (experts, spec.w13_rows(width), spec.hidden),
        "w2": (experts, spec.hidden, width),
        "kind": spec.quant,
    }
    found = {"w13": tuple(shard.w13_eFH.shape), "w2": tuple(shard.w2_eHi.shape), "kind": shard.kind}
    for name, value in expected.items():
        if found[name] != value:
            raise ConfigError(f"shard.{name}", found[name], f"not what rank {rank} holds under this plan", value)


def _prepared(plan: Plan, weights: ExpertWeights, stages: Stages, shared_expert: bool = False) -> Backend:
    spec = plan.spec.shared_spec() if shared_expert else plan.spec
    backend = BACKENDS.get(plan.backend)(spec, plan.out_dtype, stages)
    backend.prepare(weights)
    return backend


def _every_row(rows: TokenRows) -> TokenRows:
    """The same rows for a backend of one expert that every token picks with weight 1."""
    count = rows.slots_RK.shape[0]
    slots = rows.slots_RK.new_zeros(count, 1)
    return TokenRows(rows.x, slots, torch.ones(count, 1, dtype=torch.float32, device=slots.device))
