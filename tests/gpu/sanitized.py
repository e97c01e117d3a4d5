"""Small forwards of a backend, to be run under compute-sanitizer: python tests/gpu/sanitized.py BACKEND."""

import sys

import torch

from moe_dist.backends import BACKENDS, Problem
from moe_dist.rows import TokenRows
from moe_dist.spec import MoESpec
from moe_dist.weights import random_weights

CAPABILITY = (9, 0)


def main(name: str) -> None:
    backend_class = BACKENDS.get(name)
    for quant in ("fp8_block", "none", "fp8_tensor_static", "fp8_channel"):
        spec = MoESpec(hidden=256, intermediate=384, num_experts=5, top_k=2, quant=quant)
        problem = Problem(spec, 384, 5, "cuda", CAPABILITY, "none")
        if not backend_class.supports(problem).ok:
            continue
        backend = backend_class(spec, torch.bfloat16)
        backend.prepare(random_weights(spec, seed=1).to("cuda"))
        for count in (1, 7, 300, 2100):  # the last: pairs enough to be sorted as many
            slots = torch.stack([torch.randperm(5)[:2] for _ in range(count)]).to(torch.int32)
            slots[torch.rand(count, 2) < 0.3] = -1
            rows = TokenRows(torch.randn(count, 256).bfloat16().cuda(), slots.cuda(), torch.rand(count, 2).cuda())
            configs = backend_class.candidates(problem, count) or [None]
            for config in (configs[0], configs[-1]):
                backend.use_config(config)
                backend.forward(rows)
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1])
