"""The Ray actor of one rank. Its methods run on two threads: one works, the other answers and can cut the work off."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import ray
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from moe_dist.comm import Comm
from moe_dist.comm.meeting import reach_store, serve_store
from moe_dist.comm.network import use_network_of
from moe_dist.errors import RankFailure
from moe_dist.machine.interfaces import address_of
from moe_dist.messages import logs
from moe_dist.messages.notices import collecting
from moe_dist.runtime.blame import as_failure, log_failure, packed
from moe_dist.runtime.context import RankContext, RankFunction, limit_threads
from moe_dist.runtime.pulse import Pulse


class RankActor:
    """Decorated with ray.remote where it is used, so that importing this module starts nothing."""

    def __init__(self, rank: int, world: int, device: str, log_format: str | None = None) -> None:
        """`rank`: until `join`, by which it is known where the others are."""
        if log_format is not None:  # a cluster that was joined has an environment of its own
            os.environ[logs.VARIABLE] = log_format
        self.rank, self.world = rank, world
        self.device = torch.device("cpu")
        if device == "cuda":
            # Every GPU stays visible (symmetric memory needs that), so the rank's own one must be named.
            self.device = torch.device("cuda", int(ray.get_gpu_ids()[0]))
        self.context: RankContext | None = None
        self._pulse = Pulse()
        self._store: TCPStore | None = None

    def where(self, interface: str | None = None) -> dict[str, Any]:
        """Identity of this rank's place: node, address, process, GPU, and where it can be watched from outside.
        `interface`: the network interface whose address it is; None: that of the node's address in Ray. Raises
        ConfigError for one that this node does not have."""
        gpu = None
        if self.device.type == "cuda":
            gpu = str(torch.cuda.get_device_properties(self.device).uuid)
        return {
            "node": ray.get_runtime_context().get_node_id(),
            "address": ray.util.get_node_ip_address() if interface is None else address_of(interface),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pulse": self._pulse.fd,
            "log": _log_file(),
            "device": str(self.device),
            "gpu": gpu,
        }

    def serve(self, host: str, timeout_s: float) -> int:
        """Open the group's store here and return its port."""
        self._store, port = serve_store(host, self.world, timeout_s)
        return port

    def join(
        self, rank: int, own: str, named: bool, host: str, port: int, nodes: tuple[int, ...], timeout_s: float
    ) -> None:
        """Form the process group, as `rank`. `own`: the address of this node whose interface gloo and NCCL use, `named`
        by the user or not. `nodes`: how many ranks are on each node."""
        self.rank = rank
        self._enter_thread()
        limit_threads(max(nodes))
        use_network_of(own, named)
        store = self._store or reach_store(host, port, self.world, timeout_s)
        comm = Comm.join(self.rank, self.world, store, self.device, timeout_s)
        comm.nodes = nodes
        self.context = RankContext(comm, "ray", pulse=self._pulse)

    def run(self, function: RankFunction, arguments: tuple[Any, ...]) -> bytes:
        """`function(context, *arguments)` and its notices, packed here: where Ray can't, it does not know what the rank
        was doing. Whatever the function raises leaves here as a MoeDistError that knows this rank."""
        if self.context is None:
            raise RankFailure(self.rank, "run", -1, "this rank has not joined a group")
        self._enter_thread()
        self.context.comm.take_over()  # Ray runs methods on either of the two threads; only one works at a time
        self.context.progress(getattr(function, "__name__", "run"))
        said: list[str] = []
        try:
            with torch.inference_mode(), collecting(self.context.watched_by, warned=True) as said:
                outcome = function(self.context, *arguments)
            return packed(outcome, self.context, ray.cloudpickle.dumps, said)
        except BaseException as error:  # Ray has meanings of its own for KeyboardInterrupt and the like
            failure = as_failure(error, self.context, ray.cloudpickle.dumps, said)
        finally:
            self.context.lift_limit()
        log_failure(failure)  # into this rank's log
        raise failure  # not from the error, which would travel too

    def beat(self) -> tuple[str, float, int]:
        """(what this rank is doing, for how many seconds, how many collectives so far); answers while `run` works."""
        self._pulse.beat()
        if self.context is None:
            return "starting", 0.0, 0
        context = self.context
        return context.status, time.monotonic() - context.status_since, context.comm.sequence

    def abort(self) -> None:
        """Destroy the process group under a running call, which frees it from a collective that will never end."""
        if self.context is not None:
            self.context.comm.leave()

    def _enter_thread(self) -> None:
        """The current CUDA device is a thread's own, and Ray runs methods on several threads."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)


def _log_file() -> str | None:
    """Where Ray keeps what this process writes to standard error."""
    node = getattr(ray._private.worker, "_global_node", None)
    if node is None:
        return None
    return next(map(str, Path(node.get_logs_dir_path()).glob(f"worker-*-{os.getpid()}.err")), None)
