"""A distributed MoE layer inside a program of one's own: torchrun --nproc-per-node 2 tests/dist/embedded_layer.py"""

import torch
import torch.distributed as dist

from moe_dist.comm import Comm
from moe_dist.engine.layer import MoELayer
from moe_dist.engine.planning import make_plan
from moe_dist.model.routing import route
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.model.weights import shard
from moe_dist.workloads.random_weights import random_weights


def main() -> None:
    comm = Comm.from_group("cpu")
    spec = MoESpec(hidden=256, intermediate=256, num_experts=8, top_k=2)  # FP8 in 128×128 blocks
    plan = make_plan(spec, ParallelSpec(ep=comm.world), exchange="all_to_all", backend="torch")
    layer = MoELayer(plan, shard(random_weights(spec, seed=0), plan.placement, comm.rank), comm)

    tokens = 5 + comm.rank  # ranks may have different numbers of tokens, none too
    x = torch.randn(tokens, spec.hidden).bfloat16()
    routing = route(torch.randn(tokens, spec.num_experts), spec)
    y = layer(x, routing)  # collective: every rank calls it
    print(f"rank {comm.rank} of {comm.world}: {tuple(x.shape)} to {tuple(y.shape)}, {y.dtype}, norm {y.norm():.3f}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()  # what holds the group, the layer too, must be gone before it is destroyed: gloo may abort at exit otherwise
    dist.destroy_process_group()
