"""Eight worker processes that start once and then serve every distributed test of a session."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.comm import Comm

SIZE = 8
GRACE_S = 3.0  # how long the other ranks may take to answer once one has failed


def fresh_processes() -> ForkServerContext:
    """New processes fork from a helper that did nothing but import torch: as clean as spawned ones, and eight of them
    are there in the time that one import takes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "moe_dist.engine.layer"])
    return context


class Pool:
    """`run(world, function, *args)` runs `function(comm, *args)` on ranks 0..world-1 and returns their results.

    The function must be importable by name. What it raises on a rank is raised here, with rank and traceback as a
    note. After a failure or a timeout the ranks may be out of step, so the processes are killed; the next run starts
    new ones.
    """

    def __init__(self, size: int = SIZE, timeout_s: float = 60.0) -> None:
        self.size, self.timeout_s = size, timeout_s
        self._workers: list[tuple[Any, Connection]] = []
        self._store: dist.TCPStore | None = None
        self._worlds: set[int] = set()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> list[Any]:
        if not 1 <= world <= self.size:
            raise ValueError(f"world {world} is not within 1 and {self.size}")
        self._start()
        try:
            if world not in self._worlds:
                self._send(self.size, _make_group, world)
                self._worlds.add(world)
            return self._send(world, _call, world, function, args, timeout_s=timeout_s)
        except BaseException:  # KeyboardInterrupt and pytest-timeout's too: nobody knows what the ranks are doing
            self.close()
            raise

    def _send(self, world: int, function: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> list[Any]:
        job = pickle.dumps((function, args))
        connections = [connection for _, connection in self._workers[:world]]
        for connection in connections:
            connection.send_bytes(job)
        answers = self._collect(connections, self.timeout_s if timeout_s is None else timeout_s)
        return [answers[rank] for rank in range(world)]

    def _collect(self, connections: list[Connection], timeout_s: float) -> dict[int, Any]:
        """Each rank's result. Raises a rank's exception: the first one, or a death, of which that may be the echo; or
        TimeoutError naming who did not answer."""
        ranks = {connection: rank for rank, connection in enumerate(connections)}
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Any] = {}
        failure: BaseException | None = None
        death = False
        while ranks and (ready := wait(list(ranks), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                rank = ranks.pop(connection)
                error, died = None, False
                try:
                    answers[rank], error, trace = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError) as lost:
                    error, trace, died = lost, "its process died", True
                if error is not None and (failure is None or (died and not death)):
                    failure, death = error, died
                    failure.add_note(f"raised on rank {rank} of {len(connections)}:\n{trace}")
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        silent = sorted(ranks.values())
        if failure is not None:
            if silent:
                failure.add_note(f"ranks {silent} did not answer")
            raise failure
        if silent:
            raise TimeoutError(f"ranks {silent} of {len(connections)} did not answer within {timeout_s:g} s")
        return answers

    def _start(self) -> None:
        if self._workers:
            return
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = fresh_processes()
        for rank in range(self.size):
            here, there = context.Pipe()
            arguments = (rank, self.size, self._store.port, self.timeout_s, there)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()  # so that a dead worker reads as end of file here
            self._workers.append((process, here))
        up = self._collect([connection for _, connection in self._workers], 120.0)
        if len(up) != self.size:
            raise RuntimeError(f"only ranks {sorted(up)} started")

    def close(self) -> None:
        for process, connection in self._workers:
            process.kill()
            connection.close()
        for process, _ in self._workers:
            process.join()
        self._workers, self._store, self._worlds = [], None, set()


_groups: dict[int, dist.ProcessGroup] = {}


def group_of(world: int) -> dist.ProcessGroup:
    """In a worker: the process group of the first `world` ranks, for collectives that a test makes without Comm."""
    return _groups[world]


def _make_group(world: int) -> None:
    """Forming a group takes part of all processes, not only of its members."""
    _groups[world] = dist.new_group(list(range(world)))


def _serve(rank: int, size: int, port: int, timeout_s: float, connection: Connection) -> None:
    """A worker's life: answer jobs until the other end closes."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = timedelta(seconds=2 * timeout_s)  # the pool's own timeout comes first
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    connection.send_bytes(pickle.dumps((None, None, "")))
    while True:
        try:
            job = connection.recv_bytes()
        except (EOFError, ConnectionError):
            os._exit(0)
        connection.send_bytes(_answer(job))


def _call(world: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    comm = Comm.single() if world == 1 else Comm.from_group("cpu", group_of(world))
    comm._user.layers = 0  # a job that failed may have made layers on some of the ranks only
    return function(comm, *args)


def _answer(job: bytes) -> bytes:
    """(result, exception, traceback), pickled."""
    try:
        function, args = pickle.loads(job)
        return pickle.dumps((function(*args), None, ""))
    except BaseException as error:
        trace = "".join(traceback.format_exception(error))
        try:
            pickle.loads(answer := pickle.dumps((None, error, trace)))
        except Exception:  # an exception that does not survive pickling
            answer = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), trace))
        return answer
