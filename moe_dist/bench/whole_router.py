"""A check that another router than the checkpoint's can't pass: it is read by name, and some tokens are routed."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.bench.case import Case
from moe_dist.bench.gathered import told
from moe_dist.checkpoint.whole import WholeExperts
from moe_dist.comm import Comm
from moe_dist.model.routing import Routing, route
from moe_dist.workloads.streams import Stream

TOKENS = 256  # of the whole group
NUDGE = 1e-5  # of the largest logit: where so much sends a token elsewhere, float32 may do so


def router_error(comm: Comm, case: Case, x_TH: Tensor, routing: Routing) -> float:
    """The largest relative difference in any compared token's weights, expert by expert, from those of the checkpoint's
    router; 0 where it does not route. The same on every rank; collective. `x_TH`, `routing`: the whole group's."""
    source, work = case.source, case.workload
    if source.checkpoint is None or source.layer is None or work.skew != "router":
        return 0.0
    gate_EH, bias_E, logit_bias_E = WholeExperts(source.checkpoint, source.layer).router()
    stream = Stream("tokens compared with the router", work.seed, work.tokens)
    tokens = stream.permutation(work.tokens)[:TOKENS]
    here = tokens.to(x_TH.device)
    logits_nE = x_TH[here].cpu().double() @ gate_EH.double().T
    if logit_bias_E is not None:
        logits_nE = logits_nE + logit_bias_E.double()
    nudge_nE = NUDGE * logits_nE.abs().amax(1, keepdim=True) * (2 * stream.uniform(*logits_nE.shape) - 1)
    wanted, *nudged = (
        _by_expert(route(logits.float(), case.model, bias_E), case.model.num_experts)
        for logits in (logits_nE, logits_nE + nudge_nE, logits_nE - nudge_nE)
    )
    found = _by_expert(Routing(routing.ids_TK[here].cpu(), routing.weights_TK[here].cpu()), case.model.num_experts)
    steady = torch.stack([((other > 0) == (wanted > 0)).all(1) for other in nudged]).all(0)
    errors = ((found - wanted).norm(dim=1) / wanted.norm(dim=1))[steady]
    worst = errors.nan_to_num(nan=float("inf"), posinf=float("inf")).max() if len(errors) else 0.0
    return float(told(comm, worst).max())


def _by_expert(routing: Routing, experts: int) -> Tensor:
    """Weights, float64 [n, E]."""
    legal = routing.legal(experts)
    weights_nE = torch.zeros(routing.tokens, experts, dtype=torch.float64, device="cpu")
    weights_nE.scatter_add_(1, routing.ids_TK.long() * legal, routing.weights_TK.double().masked_fill(~legal, 0.0))
    return weights_nE
