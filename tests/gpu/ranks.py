"""Ranks on GPUs for tests: one spawned process each, NCCL between them."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from moe_dist.comm import Comm
from moe_dist.runtime.context import RankContext
from moe_dist.runtime.rendezvous import bind_gloo, reach_store, serve_store

HOST = "127.0.0.1"


def run_on_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 500.0) -> list[Any]:
    """`function(context, *arguments)` on `world` GPUs; its results in rank order."""
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
        bind_gloo(HOST)
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        comm = Comm.join(rank, world, reach_store(HOST, port, world, 60.0), device, 120.0)
        with torch.inference_mode():
            end.send((function(RankContext(comm, "test"), *arguments), ""))
        comm.leave()
    except BaseException:
        end.send((None, traceback.format_exc()))
        os._exit(1)  # the others wait in a collective; the parent ends them
