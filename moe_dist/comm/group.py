"""The process group: every collective of moe_dist goes through `Comm`, which counts it, bounds it and names it when it
fails. NCCL on GPUs, gloo on CPUs, nothing at all on a single rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from datetime import timedelta
from typing import Any, SupportsIndex, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store, _set_pg_timeout

from moe_dist.comm.agreements import Agreements
from moe_dist.comm.bounded import short
from moe_dist.comm.collectives import Collectives
from moe_dist.comm.meeting import check_ranks, check_timeout, go_to
from moe_dist.comm.network import network_said
from moe_dist.comm.others import backends_of, device_of, known_elsewhere, rank_in, timeout_of, with_index
from moe_dist.comm.symmetric import Symmetric
from moe_dist.errors import ConfigError, RankFailure
from moe_dist.messages.counts import count_of

T = TypeVar("T")


class Comm(Collectives, Agreements):
    """A rank's end of the group: how it is made and left, and the memory that its ranks share.

    `nodes`: how many ranks are on each node, ranks being numbered node by node. Whoever forms the group says so where
    they are on several; empty: on one, or nobody has said.
    """

    nodes: tuple[int, ...] = ()

    def __init__(
        self,
        rank: int,
        world: int,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        cpu_group: dist.ProcessGroup | None = None,
        timeout_s: float = 60.0,
        owned: Sequence[dist.ProcessGroup | None] = (),
    ) -> None:
        """`owned`: the groups that `leave` destroys, None being the default one."""
        super().__init__(rank, world, device, group, cpu_group, timeout_s)
        self._owned = list(owned)
        self._given_up: torch.Tensor | None = None  # Symmetric.failed

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> Comm:
        """One rank alone: no process group is needed."""
        return cls(0, 1, with_index(device))

    @classmethod
    def join(
        cls, rank: int, world: int, at: Store | str | None, device: torch.device | str, timeout_s: float = 60.0
    ) -> Comm:
        """Form this process's default process group with the other ranks: `at` the address of a Meeting, through a
        store, or None for torchrun's own. On a GPU it is of NCCL, else of gloo; the caller has set its current GPU.

        Raises ConfigError for a rank, an address, a device or a timeout that can't be, RankFailure when the others
        don't come within `timeout_s`, which also bounds every later collective.
        """
        check_ranks(rank, world)
        check_timeout(timeout_s)
        device = with_index(device_of(device))
        store = go_to(at, rank, world, timeout_s) if isinstance(at, str) else at
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=timeout_s),
                device_id=device if device.type == "cuda" else None,
            )
        except Exception as error:
            doing = f"rendezvous of {count_of(world, 'rank')}"
            raise RankFailure(rank, doing, 0, short(error) + network_said()) from error
        comm = cls.from_group(device, timeout_s=timeout_s)
        comm._owned = [None]  # whose end is that of all others too
        return comm

    @classmethod
    def from_group(
        cls, device: torch.device | str, group: dist.ProcessGroup | None = None, timeout_s: float | None = None
    ) -> Comm:
        """Use a process group that this process has already (default: the default one), of NCCL, gloo, or both.

        Collective where the group can't move tensors of a CPU, as NCCL's alone: all ranks of the group, and no others,
        must call it, because small agreements get a gloo group of their own. Siblings may do so at the same time.

        `timeout_s` bounds every collective from here on (default: the group's own timeout). Collectives of gloo are
        waited for so long; a group of NCCL gets it as its own timeout, since only its own watchdog sees the device.
        Raises ConfigError without torch.distributed, for what is no process group or was destroyed, for a device that
        the group can't serve, and for a process that is not in the group; RankFailure where the group of gloo can't be
        formed within the timeout.
        """
        if not dist.is_initialized():
            raise ConfigError("process group", None, "torch.distributed is not initialized in this process")
        rank = rank_in(group)
        device, backends = device_of(device), backends_of(group)
        if device.type not in backends:
            raise ConfigError("device", str(device), "the process group has no backend for it", tuple(backends))
        device = with_index(device)
        if timeout_s is None:
            timeout_s = timeout_of(group, device)
        else:
            check_timeout(timeout_s)
            if backends[device.type] == "nccl":
                _set_pg_timeout(timedelta(seconds=timeout_s), group)
        cpu_group, owned = group, []
        if backends.get("cpu") != "gloo":
            cpu_group = _beside(group, rank, timeout_s)
            owned = [cpu_group]
        return cls(rank, dist.get_world_size(group), device, group, cpu_group, timeout_s, owned)

    def __deepcopy__(self, memo: dict[int, Any]) -> Comm:
        """A copy of what holds it talks to the same ranks through the same group."""
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Of one rank alone, as of anything. Raises ConfigError for several, whose group is this process's own: so does
        what holds it, as layers and stacks do."""
        if self.world == 1:
            return super().__reduce_ex__(protocol)
        given = f"that of rank {self.rank} of {self.world}"
        rule = "belongs to this process and its ranks, as does the layer that holds it: neither can be pickled"
        raise ConfigError("comm", given, rule, "the layer's state_dict(), and load_layer in each process")

    def leave(self) -> None:
        """Destroy the groups that were made here; ranks that wait in a collective of one get an error at once."""
        owned, self._owned = self._owned, []
        self.kept.clear()
        for group in owned:
            if dist.is_initialized():
                dist.destroy_process_group(group)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """For what takes one of torch's; None where this rank is alone."""
        return (self._group or dist.group.WORLD) if self.world > 1 else None

    def window(self, *sizes: int) -> Symmetric:
        """Memory on each rank with areas of at least so many bytes, which all ranks can reach. Collective where there
        is none or it must grow, so all ranks ask for the same. Whoever has captured launches into it keeps it. Raises
        UnsupportedError where the GPUs can't reach each other, ConfigError during a capture."""
        shared = self.shared
        there = (0,) * len(sizes) if shared is None else shared.sizes
        if shared is None or any(size > room for size, room in zip(sizes, there, strict=True)):
            if self.captures:
                raise ConfigError("window", sizes, "can't grow while a CUDA graph is captured", "a step before it")
            sizes = tuple(map(max, sizes, there))
            self.barrier()  # a rank that refuses this step must not leave the others waiting for the device
            if self._given_up is None:  # one for all windows: graphs go on in those that they were captured with
                self._given_up = torch.zeros(4, dtype=torch.int32, device="cpu", pin_memory=self.device.type == "cuda")
            given = sizes, self.process_group, self.device, self._given_up
            shared = self.shared = self._run("rendezvous of shared memory", lambda: Symmetric(*given))
            self.barrier()  # nobody writes into memory that is still being zeroed
        return shared

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """Memory of a kernel that reaches all ranks by itself: what `make` has made under `key`, which all layers of
        this Comm share and which ends with it. Collective where there is none, so all ranks ask alike. Raises
        ConfigError during a capture."""
        if key not in self.kept:
            if self.captures:
                raise ConfigError("window", key, "can't be made while a CUDA graph is captured", "a step before it")
            self.barrier()  # a rank that refuses this step must not leave the others waiting for the device
            self.kept[key] = self._run("rendezvous of a kernel's memory", make)
            self.barrier()
        found: T = self.kept[key]
        return found

    def to_host(self, values: Tensor) -> Callable[[], list[Any]]:
        """Start to bring a few numbers to the host. What is returned waits for them, no longer than the timeout, and
        for nothing that was launched since. While it waits, this rank counts as one that waits for others: the device
        may be in a collective, or in a wait for a peer's writes."""
        here, ready, sequence = values, None, self.sequence
        if values.is_cuda:
            here = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            here.copy_(values, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()

        def arrived() -> list[Any]:
            if ready is not None and not ready.query():
                self._await(ready, sequence)
            found: list[Any] = here.tolist()
            return found

        return arrived

    def _await(self, ready: torch.cuda.Event, sequence: int) -> None:
        if self.noted:
            self.noted("to_host", self.sequence)
        deadline = time.monotonic() + self._timeout_s
        try:
            while not ready.query():  # synchronize() would have no limit
                if time.monotonic() > deadline:
                    detail = f"the device did not get this far in {self._timeout_s:g} s"
                    raise RankFailure(self.rank, "to_host", sequence, detail)
        finally:
            if self.noted:
                self.noted("", self.sequence)


def _beside(group: dist.ProcessGroup | None, rank: int, timeout_s: float) -> dist.ProcessGroup:
    """A group of gloo of the same ranks. Raises RankFailure where one of them does not come within `timeout_s`."""
    members, timeout = dist.get_process_group_ranks(group), timedelta(seconds=timeout_s)
    try:
        made = dist.new_group(members, backend="gloo", timeout=timeout, use_local_synchronization=True)
    except Exception as error:
        cause = f"{short(error)}; every rank of the group makes its Comm, within {timeout_s:g} s of each other"
        raise RankFailure(rank, "forming a group for the CPU", 0, cause + known_elsewhere(group)) from error
    return cast(
        dist.ProcessGroup, made
    )  # this process is a member: since torch 2.14 the type says that it might not be
