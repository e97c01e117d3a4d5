"""What enters the layers of a case: the tokens of the whole group and where they go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moe_dist.bench.case import Case
from moe_dist.bench.draws import draws
from moe_dist.bench.gathered import told
from moe_dist.comm import Comm
from moe_dist.engine.plan import Plan
from moe_dist.engine.router import Router
from moe_dist.errors import RankFailure
from moe_dist.model.routing import Routing
from moe_dist.model.weights import position_sum
from moe_dist.workloads.streams import Stream
from moe_dist.workloads.token_splits import token_bounds


@dataclass(frozen=True)
class Inputs:
    """Tokens of the whole group, `bounds[r]` being rank r's run of them (all of them where tokens are replicated)."""

    x_TH: Tensor
    routing: Routing
    bounds: list[tuple[int, int]]
    rank: int
    sharded: bool

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Every run of tokens once."""
        return self.bounds if self.sharded else self.bounds[:1]

    def mine(self) -> tuple[Tensor, Routing]:
        if not self.sharded:
            return self.x_TH, self.routing
        start, stop = self.bounds[self.rank]
        return self.x_TH[start:stop].contiguous(), self.routing.rows(start, stop)


def make_inputs(case: Case, plan: Plan, comm: Comm, routers: Sequence[Router | None]) -> list[list[Inputs]]:
    """For each step that has a routing of its own, those of its layers. Dense Gaussian tokens drawn from the seed, the
    same on every rank and in every step, and for each layer a routing by the case's skew; a layer's router, where that
    is the skew, routes the step's tokens. Collective. Raises RankFailure where a rank has others: the oracle would take
    one thing, and the layer another."""
    work, spec = case.workload, plan.spec
    x_TH = Stream("tokens", work.seed, device=comm.device).normal(work.tokens, spec.hidden).to(spec.torch_dtype)
    if work.skew == "router" and None not in routers:
        steps = [[router(x_TH) for router in routers if router is not None]]
    else:
        steps = [[routing.to(comm.device) for routing in layers] for layers in draws(spec, work, case.layers)]
    _check_alike(comm, x_TH, [routing.ids_TK for layers in steps for routing in layers])
    sharded = work.token_layout == "sharded"
    bounds = [(0, work.tokens)] * comm.world
    if sharded:
        bounds = token_bounds(work.tokens, comm.world, work.token_split, work.seed)
    return [[Inputs(x_TH, routing, bounds, comm.rank, sharded) for routing in layers] for layers in steps]


def _check_alike(comm: Comm, x_TH: Tensor, ids: list[Tensor]) -> None:
    sums = [position_sum(tensor) >> 16 for tensor in (x_TH, *ids)]  # float64 holds 53 bits
    found = told(comm, *sums).tolist()
    for rank, values in enumerate(found):
        if values != found[0]:
            name = "tokens" if values[0] != found[0][0] else "ids"
            raise RankFailure(rank, "inputs", comm.sequence, f"it has other {name} than rank 0")
