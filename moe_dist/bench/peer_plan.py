"""What is settled of a peer's case before ranks start: whether it can run, and the plan of the layer that it stands
for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moe_dist.engine.backend_rule import EVERYWHERE
from moe_dist.engine.choosing import plain_exchange
from moe_dist.engine.plan import Plan
from moe_dist.engine.planning import make_plan
from moe_dist.errors import UnsupportedError
from moe_dist.machine.machine import Machine
from moe_dist.peers import PEERS
from moe_dist.workloads.token_splits import token_bounds

if TYPE_CHECKING:
    from moe_dist.bench.case import Case

PEER = "peer"  # what stands for the exchange of a step that another package runs whole


def peer_plan(case: Case, machine: Machine) -> Plan:
    """Of our plainest layer in the peer's placement: the peer gets its shards, and the oracle goes by it. Raises
    UnsupportedError with the reason where the peer can't run here or not this, ConfigError for an unknown name."""
    name, work = str(case.peer), case.workload
    peer, what = PEERS.get(name), f"peer {name}"
    plain = plain_exchange(case.parallel.world, work.token_layout)
    plan = make_plan(
        case.model, case.parallel, exchange=plain, backend=EVERYWHERE, token_layout=work.token_layout, machine=machine
    )
    available = peer.available(machine.device)
    if not available.ok:
        raise UnsupportedError(what, [available.reason])
    if case.model.weights_on_input:
        raise UnsupportedError(what, ["weighs what comes out of experts, and model.weights_on_input is True"])
    if case.layers > 1:
        raise UnsupportedError(what, ["is measured as one layer, and this is a stack"])
    if case.graph and not peer.capturable:
        raise UnsupportedError(what, ["is not capturable in a CUDA graph"])
    if case.graph and machine.device != "cuda":
        raise UnsupportedError(what, ["CUDA graphs need CUDA"])
    if len(nodes := machine.nodes_of(case.parallel.world)) > 1:
        raise UnsupportedError(what, [f"is measured on one node, and these ranks are on {len(nodes)}"])
    shares = [work.tokens] * case.parallel.world
    if work.token_layout == "sharded":
        bounds = token_bounds(work.tokens, case.parallel.world, work.token_split, work.seed)
        shares = [stop - start for start, stop in bounds]
    supported = peer.supports(case.model, plan.placement, work.token_layout, shares)
    if not supported.ok:
        raise UnsupportedError(what, [supported.reason])
    return replace(plan, graph=case.graph)
