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
from moe_dist.model.spec import split_bounds
from moe_dist.model.weights import position_sum
from moe_dist.workloads.streams import Stream


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


def make_inputs(case: Case, plan: Plan, comm: Comm, routers: Sequence[Router | None]) -> list[Inputs]:
    """Dense Gaussian tokens drawn from the seed, the same on every rank, and for each layer a routing by the case's
    skew; a layer's router, where that is the skew, routes the step's tokens. Collective. Raises RankFailure where a
    rank has others: the oracle would take one thing, and the layer another."""
    work, spec = case.workload, plan.spec
    x_TH = Stream("tokens", work.seed, device=comm.device).normal(work.tokens, spec.hidden).to(spec.torch_dtype)
    if work.skew == "router" and None not in routers:
        routings = [router(x_TH) for router in routers if router is not None]
    else:
        routings = [routing.to(comm.device) for routing in draws(spec, work, case.layers)]
    for name, tensor in (("tokens", x_TH), *(("ids", routing.ids_TK) for routing in routings)):
        found = told(comm, position_sum(tensor) >> 16).flatten().tolist()  # float64 holds 53 bits
        if (rank := next((rank for rank, value in enumerate(found) if value != found[0]), None)) is not None:
            raise RankFailure(rank, "inputs", comm.sequence, f"it has other {name} than rank 0")
    sharded = work.token_layout == "sharded"
    bounds = split_bounds(work.tokens, comm.world) if sharded else [(0, work.tokens)] * comm.world
    return [Inputs(x_TH, routing, bounds, comm.rank, sharded) for routing in routings]
