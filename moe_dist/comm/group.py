"""The process group: every collective of moe_dist goes through `Comm`, which counts it, bounds it and names it when it
fails. NCCL on GPUs, gloo on CPUs, nothing at all on a single rank."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store, _set_pg_timeout

from moe_dist.comm.meeting import check_ranks, check_timeout, go_to
from moe_dist.comm.network import network_said
from moe_dist.comm.others import backends_of, device_of, rank_in, real_group, timeout_of, with_index
from moe_dist.comm.symmetric import Symmetric
from moe_dist.comm.user import user_of
from moe_dist.comm.wires import copied, plain, row_bytes_of, wire
from moe_dist.errors import ConfigError, RankFailure
from moe_dist.model.sizes import row_bytes

R = TypeVar("R")

# torch 2.13 has new names for these two and warns at the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Comm:
    """A rank's end of the group.

    `sequence` counts this rank's collectives. `bytes_sent` adds up what this rank must send to others by the leanest
    algorithm of each collective: (W-1) times its part for an all-gather, (W-1)/W of the input for a reduce-scatter,
    twice that for an all-reduce, the rows for other ranks for an all-to-all.

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
        self.rank, self.world, self.device = rank, world, device
        self._group, self._cpu_group, self._timeout_s, self._owned = group, cpu_group, timeout_s, list(owned)
        self._user = user_of(group, world)
        self._real = weakref.ref(real_group(group)) if world > 1 and dist.is_initialized() else None
        self.sequence = 0
        self.bytes_sent = 0
        self.shared: Symmetric | None = None  # what `window` made last
        self._given_up: torch.Tensor | None = None  # Symmetric.failed
        self.noted: Callable[[str, int], None] | None = None  # told (op, number) as one begins, ("", ...) after it

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
            raise RankFailure(rank, f"rendezvous of {world} ranks", 0, _short(error) + network_said()) from error
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
        the group can't serve, and for a process that is not in the group.
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
            members = dist.get_process_group_ranks(group)
            # This process is a member: since torch 2.14 the type says that it might not be.
            made = dist.new_group(
                members, backend="gloo", timeout=timedelta(seconds=timeout_s), use_local_synchronization=True
            )
            cpu_group = cast(dist.ProcessGroup, made)
            owned = [cpu_group]
        return cls(rank, dist.get_world_size(group), device, group, cpu_group, timeout_s, owned)

    def is_of(self, group: dist.ProcessGroup) -> bool:
        """Whether it uses this very process group."""
        return self._real is not None and self._real() is group

    def __deepcopy__(self, memo: dict[int, Any]) -> Comm:
        """A copy of what holds it talks to the same ranks through the same group."""
        return self

    def leave(self) -> None:
        """Destroy the groups that were made here; ranks that wait in a collective of one get an error at once."""
        owned, self._owned = self._owned, []
        for group in owned:
            if dist.is_initialized():
                dist.destroy_process_group(group)

    def check_thread(self) -> None:
        """Raise ConfigError unless this is the thread that uses this process group, which is the first to do so: ranks
        whose threads take turns in different orders would get each other's tokens. Where two threads begin at about the
        same time, other ranks may follow the other one, so both are refused."""
        if self.world > 1 and not self._user.admits():
            rule = "shares this process group with another thread: their collectives would cross between ranks"
            legal = "a process group of its own for each thread, or take_over() by the only one that goes on with it"
            raise ConfigError("thread", threading.current_thread().name, rule, legal)

    def take_over(self) -> None:
        """From now on the calling thread is the one that uses this process group. Waits for what the device still
        does: steps of another thread may be on another stream."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._user.take_over()

    def meet(self, tokens: int, bucket: int | None, alike: bool, same: Callable[[], dict[str, int]] = dict) -> int:
        """The ranks tell each other, on the CPU, which step they begin, with how many tokens, in which bucket, and the
        numbers by name that `same` gives; the largest number of tokens comes back. Raises RankFailure where they begin
        different steps, as after an input that one of them has refused, ConfigError where one of these numbers differs,
        their buckets, or, with `alike`, their tokens."""
        if self.world == 1:
            return tokens
        numbers = same()
        told = [self._user.steps, -1 if bucket is None else bucket, tokens, *numbers.values()]
        mine = torch.tensor([told], dtype=torch.int64, device="cpu")
        everyone = mine.new_empty(self.world, len(told))

        def tell() -> None:
            self._wait(_all_gather(everyone, mine, group=self._cpu_group, async_op=True))

        self._run("meet", tell)
        steps, buckets, counts, *others = everyone.T.tolist()
        if len(set(steps)) > 1:
            behind = steps.index(min(steps))
            cause = f"it begins step {min(steps)} where others begin step {max(steps)}"
            why = "one of them left a step out, or raised in one and went on"
            raise RankFailure(behind, "meet", self.sequence, f"{cause}: {why}; form a new process group to go on")
        told_by = dict(zip(numbers, others, strict=True))
        for field in (name for name in told_by if name.startswith("plan.")):  # what differs else may follow from it
            _check_same(field, told_by[field])
        for field, values, matters in (("max_tokens_per_rank", buckets, True), ("tokens", counts, alike)):
            if matters and len(set(values)) > 1:
                told_all = ", ".join("none" if value < 0 else str(value) for value in values)
                mine_is = None if values[self.rank] < 0 else values[self.rank]
                raise ConfigError(field, mine_is, f"must be one on all ranks, not {told_all}")
        for field, values in told_by.items():
            _check_same(field, values)
        return int(max(counts))

    def begin_step(self) -> None:
        """Count a step of a layer of this process group, whatever becomes of it. Raises as `check_window`."""
        self.check_window()
        self._user.steps += 1

    def number_layer(self) -> int:
        """Count a layer that is made on this process group; ranks make them in one order."""
        self._user.layers += 1
        return self._user.layers

    def all_gather(self, parts: Sequence[Tensor], *, into: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Each [n, ...], the same shape on every rank, to [world·n, ...] in rank order: new tensors, or the contiguous
        ones of that shape and the part's dtype in `into`."""
        if self.world == 1:
            return list(parts)
        wires = self._wires(parts)
        if into is not None and len(wires) == len(parts):
            outs, into = [wire(target) for target in into], None
        else:
            outs = [wire.new_empty(self.world * wire.shape[0], *wire.shape[1:]) for wire in wires]

        def gather() -> None:
            with self._together(len(outs), named=True):
                for out, wire in zip(outs, wires, strict=True):
                    self._wait(_all_gather(out, wire, group=self._group, async_op=self._waits))

        self._run("all_gather", gather)
        self.bytes_sent += sum(wire.nbytes for wire in wires) * (self.world - 1)
        return copied(self._unwired(outs, parts), into)

    def _wires(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that cross for these. On gloo, where each collective costs milliseconds, one of packed bytes."""
        if self.device.type == "cuda" or len(parts) == 1:
            return [wire(part) for part in parts]
        return [torch.cat([row_bytes_of(part) for part in parts], 1)]

    def _unwired(self, outs: list[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
        """What came across for `parts`, in their dtypes and shapes but for the number of rows."""
        if len(outs) == len(parts):
            return [out.view(part.dtype) for out, part in zip(outs, parts, strict=True)]
        pieces = torch.split(outs[0], [row_bytes(part) for part in parts], 1)
        return [
            plain(piece).view(part.dtype).view(len(piece), *part.shape[1:])
            for piece, part in zip(pieces, parts, strict=True)
        ]

    def _together(self, count: int, named: bool) -> AbstractContextManager[Any]:
        """Collectives inside become one NCCL launch; each alone costs its own latency. gloo has no such thing.

        torch has this without an underscore only for point-to-point operations. `named`: torch has a grouped form of
        this very collective (all-gather), which must not be given the device as well: buffers then stay referenced by a
        second, forgotten piece of work (seen: a hundred steps' worth).
        """
        if self.device.type != "cuda" or count == 1:
            return nullcontext()
        return dist._coalescing_manager(group=self._group, device=None if named else self.device)  # type: ignore[attr-defined]

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        """[world·n, ...] on every rank to this rank's [n, ...] of the sum."""
        if self.world == 1:
            return rows
        rows = rows.contiguous()
        out = self._run("reduce_scatter", lambda: (self._summed if self._waits else self._scattered)(rows))
        self.bytes_sent += rows.nbytes * (self.world - 1) // self.world
        return out

    def _scattered(self, rows: Tensor) -> Tensor:
        out = rows.new_empty(rows.shape[0] // self.world, *rows.shape[1:])
        self._wait(_reduce_scatter(out, rows, group=self._group, async_op=self._waits))
        return out

    def _summed(self, rows: Tensor) -> Tensor:
        """The same by gloo, whose own reduce-scatter can't be waited for with a limit, and sends twice as much: each
        rank's part by all-to-all, added here in rank order, 16-bit numbers in float32."""
        parts = torch.empty_like(rows)
        self._wait(dist.all_to_all_single(parts, rows, group=self._group, async_op=True))
        first, *others = parts.chunk(self.world) if len(parts) else [parts]
        total = first.float() if rows.dtype in (torch.bfloat16, torch.float16) else first
        for part in others:
            total += part
        return total.to(rows.dtype)

    def all_reduce(self, rows: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            self._run("all_reduce", lambda: self._wait(dist.all_reduce(rows, group=self._group, async_op=self._waits)))
            self.bytes_sent += 2 * rows.nbytes * (self.world - 1) // self.world
        return rows

    def all_to_all(
        self,
        parts: Sequence[Tensor],
        send: Sequence[int],
        receive: Sequence[int],
        *,
        into: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Each part's rows by destination to [sum(receive), ...] by source: new tensors, or the contiguous ones of that
        shape and the part's dtype in `into`."""
        if self.world == 1:
            return copied(parts, into)
        wires = self._wires(parts)
        if into is not None and len(wires) == len(parts):
            outs, into = [wire(target) for target in into], None
        else:
            outs = [wire.new_empty(sum(receive), *wire.shape[1:]) for wire in wires]

        def exchange() -> None:
            with self._together(len(outs), named=False):
                for out, wire in zip(outs, wires, strict=True):
                    self._wait(
                        dist.all_to_all_single(
                            out, wire, list(receive), list(send), group=self._group, async_op=self._waits
                        )
                    )

        self._run("all_to_all", exchange)
        self.bytes_sent += sum(map(row_bytes, wires)) * (sum(send) - send[self.rank])
        return copied(self._unwired(outs, parts), into)

    @property
    def timeout_s(self) -> float:
        """What bounds every collective."""
        return self._timeout_s

    def window(self, *sizes: int) -> Symmetric:
        """Memory on each rank with areas of at least so many bytes, which all ranks can reach. Collective where there
        is none or it must grow, so all ranks ask for the same. Whoever has captured launches into it keeps it. Raises
        UnsupportedError where the GPUs can't reach each other, ConfigError during a capture."""
        shared = self.shared
        there = (0,) * len(sizes) if shared is None else shared.sizes
        if shared is None or any(size > room for size, room in zip(sizes, there, strict=True)):
            if torch.cuda.is_current_stream_capturing():
                raise ConfigError("window", sizes, "can't grow while a CUDA graph is captured", "a step before it")
            sizes = tuple(map(max, sizes, there))
            self.barrier()  # a rank that refuses this step must not leave the others waiting for the device
            if self._given_up is None:  # one for all windows: graphs go on in those that they were captured with
                self._given_up = torch.zeros(4, dtype=torch.int32, device="cpu", pin_memory=self.device.type == "cuda")
            shared = self.shared = Symmetric(sizes, self.process_group, self.device, self._given_up)
            self.barrier()  # nobody writes into memory that is still being zeroed
        return shared

    def check_window(self) -> None:
        """Raise RankFailure where a launch has given up waiting for a peer's writes; what came since is wrong."""
        problem = self.shared and self.shared.problem()
        if problem:
            phase, peer, step = problem
            operation = f"nvlink, {('rows', 'sums', 'copied rows')[phase]}"
            raise RankFailure(peer, operation, step, f"rank {self.rank} waited {self._timeout_s:g} s for its flag")

    def to_host(self, values: Tensor) -> Callable[[], list[Any]]:
        """Start to bring a few numbers to the host. What is returned waits for them, no longer than the timeout, and
        for nothing that was launched since."""
        here, ready, sequence = values, None, self.sequence
        if values.is_cuda:
            here = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            here.copy_(values, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()

        def arrived() -> list[Any]:
            deadline = time.monotonic() + self._timeout_s
            while ready is not None and not ready.query():  # synchronize() would have no limit
                if time.monotonic() > deadline:
                    detail = f"the device did not get this far in {self._timeout_s:g} s"
                    raise RankFailure(self.rank, "to_host", sequence, detail)
            found: list[Any] = here.tolist()
            return found

        return arrived

    def agree_max(self, value: int) -> int:
        """The largest `value` of any rank, agreed on the CPU group."""
        if self.world == 1:
            return value
        agreed = torch.tensor(value, dtype=torch.int64, device="cpu")

        def agree() -> None:
            self._wait(dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self._cpu_group, async_op=True))

        self._run("agree_max", agree)
        return int(agreed)

    def align(self) -> None:
        """Make the device streams of all ranks wait for each other; the host does not wait."""
        if self.world > 1 and self.device.type == "cuda":
            tiny = torch.zeros(1, dtype=torch.float32, device=self.device)
            self._run("align", lambda: dist.all_reduce(tiny, group=self._group))

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """For what takes one of torch's; None where this rank is alone."""
        return (self._group or dist.group.WORLD) if self.world > 1 else None

    def barrier(self) -> None:
        if self.world > 1:
            self._run("barrier", lambda: self._wait(dist.barrier(group=self._cpu_group, async_op=True)))

    @property
    def _waits(self) -> bool:
        """Whether the host waits for a collective to end: on a CPU."""
        return self.device.type == "cpu"

    def _wait(self, work: Any) -> None:
        """For gloo, no longer than the timeout. None comes back from what the device waits for."""
        if work is not None:
            work.wait(timedelta(seconds=self._timeout_s))

    def _check_group(self) -> None:
        """The default group is whichever there is now: in another one ranks may have other numbers."""
        if self._real is not None:
            with suppress(ValueError):  # of torch, for a group that was destroyed
                if self._real() is real_group(self._group) and dist.get_rank(self._group) == self.rank:
                    return
            raise RuntimeError(
                "the process group of this Comm was destroyed; make a new Comm from the one that is there"
            )

    def _run(self, op: str, call: Callable[[], R]) -> R:
        self.check_thread()
        self.check_window()
        self.sequence += 1
        if self.noted:
            self.noted(op, self.sequence)
        try:
            self._check_group()
            result = call()
        except Exception as error:
            raise RankFailure(self.rank, op, self.sequence, _short(error)) from error
        finally:
            if self.noted:
                self.noted("", self.sequence)
        self.check_thread()  # one that came meanwhile may have taken part
        return result


def _check_same(field: str, values: list[int]) -> None:
    """Raise ConfigError that says which ranks have what in common."""
    ranks: dict[int, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    if len(ranks) > 1:
        told = "; ".join(f"rank{'s' * (len(group) > 1)} {', '.join(map(str, group))}" for group in ranks.values())
        rule = "the ranks call different layers" if field == "layer" else "must be the same on all ranks"
        raise ConfigError(field, f"{len(ranks)} different ones", f"{rule}, alike are: {told}")


def _short(error: Exception) -> str:
    """The first line of a library's message, without its C++ stack."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
