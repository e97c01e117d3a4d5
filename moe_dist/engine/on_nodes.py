"""Whether a plan can run on the nodes where its ranks are, before they are placed and once they are."""

from __future__ import annotations

from dataclasses import replace

from moe_dist.engine.plan import Plan
from moe_dist.errors import UnsupportedError
from moe_dist.exchange import EXCHANGES
from moe_dist.machine.machine import Machine
from moe_dist.machine.nodes import Nodes, crosses
from moe_dist.model.spec import ParallelSpec
from moe_dist.step import Support

LEGAL = "a TP size that divides each node's number of ranks, EP, or ray.strategy STRICT_PACK"


def check_nodes(parallel: ParallelSpec, machine: Machine) -> None:
    """Raise UnsupportedError where a TP group would lie on two nodes: its ranks add up every token's sums in each
    layer, which NVLink is made for and a network between nodes is not."""
    if problem := crosses(parallel.tp, machine.nodes_of(parallel.world)):
        raise UnsupportedError(f"{parallel.label} on these nodes", [problem], LEGAL)


def check_placed(plan: Plan, ranks: tuple[int, ...]) -> None:
    """The same of a plan whose ranks are placed, `ranks[n]` of them on node n: Ray may have had to place them otherwise
    than the plan expected. Raises UnsupportedError too where an exchange of the plan can't serve ranks there."""
    machine = replace(plan.machine, nodes=Nodes(ranks))
    check_nodes(plan.parallel, machine)
    for name in dict.fromkeys(choice.exchange for choice in plan.choices):
        support: Support = EXCHANGES.get(name).supports(plan.spec, plan.placement, machine)
        if not support.ok:
            raise UnsupportedError(f"exchange {name} under {plan.parallel.label}", [support.reason])
