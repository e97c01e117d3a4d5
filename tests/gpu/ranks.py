"""Ranks on GPUs for tests: one spawned process each, NCCL between them or, where they must share GPUs, which NCCL
refuses, gloo on the host."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from moe_dist.backends import BACKENDS
from moe_dist.comm import Comm, copied
from moe_dist.comm.meeting import reach_store, serve_store
from moe_dist.comm.network import use_network_of
from moe_dist.runtime.context import RankContext

HOST = "127.0.0.1"


def backends_here() -> list[str]:
    """Those that can run on this machine's GPUs, the reference among them; of whole layers see test_fused_on_gpus."""
    return [name for name, each in BACKENDS.usable() if each.available("cuda").ok and "token" in each.takes]


class ThroughHost(Comm):
    """Collectives of tensors that lie on a GPU, through host memory. Not fast, and not capturable."""

    def __init__(self, host: Comm, device: torch.device) -> None:
        super().__init__(host.rank, host.world, device)
        self.host = host

    def all_gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return self._here(self.host.all_gather([part.cpu() for part in parts]))

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        return self._here([self.host.reduce_scatter(rows.cpu())])[0]

    def all_reduce(self, rows: Tensor) -> Tensor:
        return rows.copy_(self._here([self.host.all_reduce(rows.cpu())])[0])

    def all_to_all(self, parts: Sequence[Tensor], *splits: Sequence[int], into=None) -> list[Tensor]:
        return copied(self._here(self.host.all_to_all([part.cpu() for part in parts], *splits)), into)

    def _here(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        self.sequence, self.bytes_sent = self.host.sequence, self.host.bytes_sent
        return [tensor.to(self.device) for tensor in tensors]

    def agree_max(self, value: int) -> int:
        return self.host.agree_max(value)

    def align(self) -> None:
        torch.cuda.synchronize()
        self.host.barrier()

    def barrier(self) -> None:
        self.host.barrier()


def run_on_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 500.0) -> list[Any]:
    """`function(context, *arguments)` on `world` ranks, a GPU each as far as there are; its results in rank order."""
    store, port = serve_store(HOST, world, 60.0)
    spawn = multiprocessing.get_context("spawn")
    processes, ends = [], {}
    for rank in range(world):
        here, there = spawn.Pipe(duplex=False)
        process = spawn.Process(target=_serve, args=(rank, world, port, there, function, arguments), daemon=True)
        process.start()
        there.close()
        processes.append(process)
        ends[here] = rank
    try:
        return _collect(ends, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.kill()
        del store


def _collect(ends: dict[Any, int], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while ends:
        ready = wait(list(ends), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {sorted(ends.values())} did not answer in time")
        for end in ready:
            rank = ends.pop(end)
            try:
                results[rank], trace = end.recv()
            except EOFError:
                trace = "its process died"
            if trace:
                raise AssertionError(f"rank {rank}:\n{trace}")
    return [results[rank] for rank in sorted(results)]


def _serve(rank: int, world: int, port: int, end: Any, function: Callable[..., Any], arguments: Any) -> None:
    try:
        os.environ.setdefault("OMP_NUM_THREADS", "4")
        use_network_of(HOST)
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        store = reach_store(HOST, port, world, 60.0)
        if world <= torch.cuda.device_count():
            comm = Comm.join(rank, world, store, device, 120.0)
        else:
            comm = ThroughHost(Comm.join(rank, world, store, torch.device("cpu"), 120.0), device)
        with torch.inference_mode():
            end.send((function(RankContext(comm, "test"), *arguments), ""))
        comm.leave()
    except BaseException:
        end.send((None, traceback.format_exc()))
        os._exit(1)  # the others wait in a collective; the parent ends them
