"""Ranks of torchrun that have something to say: torchrun --nproc-per-node 2 tests/dist/speaking_ranks.py HOW

group: by a function that a group runs; fails: rank 1's raises after it; layer: in a layer of a program's own group."""

import sys
import warnings

import torch
import torch.distributed as dist

from moe_dist.comm import Comm
from moe_dist.errors import RankFailure
from moe_dist.messages.notices import notice, telling
from moe_dist.runtime.torchrun_group import TorchrunGroup


def speak(context, how):
    notice("said by all")
    if context.rank == 1:
        warnings.warn("of another library", UserWarning, stacklevel=1)
    if how == "fails" and context.rank == 1:
        raise ValueError("on purpose")
    return torch.tensor(context.rank)


def main(how: str) -> None:
    if how == "layer":
        dist.init_process_group("gloo")
        comm = Comm.from_group("cpu")
        if comm.rank == 1:
            notice("no table")
        comm.barrier()
        dist.destroy_process_group()
        return
    group = TorchrunGroup(2)
    with telling(lambda text: print(f"told: {text}", flush=True)):
        try:
            results = group.run(speak, how, timeout_s=30.0, shown=lambda _: None)
            assert [int(result) for result in results] == [0, 1]
        except RankFailure as failure:
            print(f"failed: {failure}", flush=True)
    group.close()


if __name__ == "__main__":
    main(sys.argv[1])
