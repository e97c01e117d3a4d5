"""The same ranks without Ray: every process that torchrun started runs this same program, one is each rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.comm import Comm
from moe_dist.errors import ConfigError, RankFailure
from moe_dist.runtime.context import RankContext, RankFunction, limit_threads
from moe_dist.runtime.rendezvous import LOOPBACK, bind_gloo


class TorchrunGroup:
    """`run` is collective: each process works its own part and gets everybody's results."""

    runtime = "torchrun"

    def __init__(self, world: int, device: str = "cpu", timeout_s: float = 60.0) -> None:
        if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
            raise ConfigError("runtime", "torchrun", "this process was not started by torchrun", ("ray",))
        launched = int(os.environ["WORLD_SIZE"])
        if launched != world:
            raise ConfigError("world", world, f"torchrun started {launched} processes", (launched,))
        self.world = world
        self.rank = int(os.environ["RANK"])
        local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        place = torch.device("cpu")
        if device == "cuda":
            place = torch.device("cuda", local_rank)
            torch.cuda.set_device(place)
        limit_threads(local_world)
        if local_world == world:
            bind_gloo(LOOPBACK)
        comm = Comm.join(self.rank, world, None, place, timeout_s)
        self.context = RankContext(comm, "torchrun")
        self._results = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def run(self, function: RankFunction, *arguments: Any, timeout_s: float, shown: Callable[[str], None]) -> list[Any]:
        """See Group.run. A rank's exception is raised on every rank."""
        outcome: Any
        try:
            with torch.inference_mode():
                outcome = function(self.context, *arguments)
        except Exception as error:
            outcome = error
        results: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(results, outcome, group=self._results)
        except Exception as error:
            raise (
                outcome
                if isinstance(outcome, Exception)
                else RankFailure(self.rank, "gather results", self.context.comm.sequence, str(error).splitlines()[0])
            ) from error
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def describe(self) -> Sequence[str]:
        return [f"rank {rank}: {self.context.device.type}" for rank in range(self.world)]

    def close(self) -> None:
        self.context.comm.leave()
