"""Which exchanges the ranks of a CPU can run."""

from moe_dist.exchange import EXCHANGES
from moe_dist.machine.machine import Machine
from moe_dist.model.placement import Placement
from moe_dist.model.spec import MoESpec, ParallelSpec


def exchanges_here() -> list[str]:
    spec, parallel = MoESpec(hidden=128, intermediate=128, num_experts=2, top_k=1), ParallelSpec()
    given = spec, Placement.build(spec, parallel), Machine.detect("cpu")
    return [name for name in EXCHANGES.names() if EXCHANGES.get(name).supports(*given).ok]
