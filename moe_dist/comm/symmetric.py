"""Memory of the same size on every rank of a host, which each of them reads and writes through NVLink, and copies into
it beside the current stream."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.errors import RankFailure, UnsupportedError
from moe_dist.model.sizes import cdiv

GRAIN = 1 << 20  # bytes of an area: steps of slightly more tokens don't need new memory each time
MOST_VIEWS = 4096  # of a window that are kept: steps of ever new sizes would otherwise collect them
STREAMS = 8  # that a thread's copies are spread over; with as many peers or fewer, each has one to itself


class Symmetric:
    """Areas of at least these `sizes` in bytes on each rank, one behind the other; the first bytes of area a are at
    `starts[a]`. `local`: this rank's own memory, uint8, zero at first, and as 32-bit `words`. `addresses_W`:
    where each rank's begin as this rank sees them, int64 on the device, in turn: its own, those of the next rank, and
    so on to the one before it; `by_rank_W`: the same in the order of ranks. `failed`: int32 [4] that the host can read
    without waiting; a launch that gives up waiting for a peer leaves there what for (see `problem`). `open`: a step has
    told the others of itself and has not ended."""

    open = False

    def __init__(
        self, sizes: Sequence[int], group: dist.ProcessGroup | None, device: torch.device, failed: Tensor
    ) -> None:
        """Collective in `group`; None: this rank is alone. Raises UnsupportedError where GPUs can't reach each other.
        Not during a capture."""
        self.sizes = tuple(cdiv(size, GRAIN) * GRAIN for size in sizes)
        self.starts, nbytes = tuple(accumulate(self.sizes[:-1], initial=0)), sum(self.sizes)
        with torch.inference_mode(False):
            if group is None:
                self.local = torch.zeros(nbytes, dtype=torch.uint8, device=device)
                everyone, addresses, rank = [self.local], [self.local.data_ptr()], 0
            else:
                self.local, self._handle = _met(nbytes, group, device)
                peers = range(len(self._handle.buffer_ptrs))
                everyone = [self._handle.get_buffer(peer, (nbytes,), torch.uint8) for peer in peers]
                addresses, rank = [int(pointer) for pointer in self._handle.buffer_ptrs], self._handle.rank
            self._everyone = everyone
            self._views: dict[tuple[Any, ...], Tensor] = {}
            self.words = self.local.view(torch.int32)
            self.failed = failed
            in_turn = addresses[rank:] + addresses[:rank]
            self.addresses_W = torch.tensor(in_turn, dtype=torch.int64, device=device)
            self.by_rank_W = torch.tensor(addresses, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        return self.local.numel()

    def view(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """This rank's bytes from `start` on, which must be a multiple of the dtype's size."""
        return self._cut(self.local, -1, start, shape, dtype)

    def peer_view(self, peer: int, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Those of rank `peer`, through NVLink."""
        return self._cut(self._everyone[peer], peer, start, shape, dtype)

    def _cut(self, memory: Tensor, peer: int, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Kept, since making one takes the host microseconds in each step."""
        key = peer, start, shape, dtype
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            with torch.inference_mode(False):  # what is made in it could be filled in it only
                found = memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            self._views[key] = found
        return found

    def check_ended(self, rank: int, sequence: int) -> None:
        """Raise RankFailure where a step has told the others of itself and not ended: its number would be the next
        one's too, and ranks would take what they have of that step for the next one's."""
        if self.open:
            cause = (
                "an earlier step raised after its rows had been sent: ranks no longer agree on which step they are in"
            )
            raise RankFailure(rank, "nvlink, rows", sequence, f"{cause}; make a new process group")

    def problem(self) -> tuple[int, int, int] | None:
        """(phase, peer, step) of a wait that was given up, phases counted from 0. What was computed since is wrong."""
        phase, peer, step, _ = self.failed.tolist()
        return (phase - 1, peer, step) if phase else None


class Aside:
    """Copies of one step beside what its stream computes. Contiguous ones between GPUs are done by copy engines, which
    take no multiprocessor from the computation. On a CPU they are done at once. `used`: there were any."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.used = device, False
        self._busy: dict[torch.cuda.Stream, None] = {}
        self._kept: list[tuple[Tensor, Tensor]] = []

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], in_turn: bool = False) -> None:
        """Each (target, source), when all that was launched before on the current stream is done; `in_turn`: each one
        when those before it are there. Until `join`, nothing may write to the sources."""
        self.used = True
        if self._device.type == "cpu":
            for target, source in pairs:
                target.copy_(source)
            return
        self._kept += pairs  # memory that goes back to the allocator would be given to what is computed meanwhile
        ready, streams = torch.cuda.current_stream(self._device).record_event(), _streams_of(self._device)
        for number, (target, source) in enumerate(pairs):
            stream = streams[0 if in_turn else number % STREAMS]
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
            self._busy[stream] = None

    def join(self) -> None:
        """What is launched on the current stream from here on comes after all of them. A capture can't end without."""
        for stream in self._busy:
            torch.cuda.current_stream(self._device).wait_stream(stream)
        self._busy.clear()
        self._kept.clear()


class _Own(threading.local):
    """A thread's streams: while one thread captures, another one's copies must not get into its graph."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, list[torch.cuda.Stream]] = {}


_own = _Own()


def _streams_of(device: torch.device) -> list[torch.cuda.Stream]:
    streams = _own.by_device.get(device)
    if streams is None:
        streams = _own.by_device[device] = [torch.cuda.Stream(device, priority=-1) for _ in range(STREAMS)]
    return streams


def without_multicast() -> None:
    """For torch's symmetric memory, before any is made: nothing here is sent to all at once."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")


def _met(nbytes: int, group: dist.ProcessGroup, device: torch.device) -> tuple[Tensor, Any]:
    """This rank's zeros, and torch's handle on everybody's."""
    without_multicast()
    import torch.distributed._symmetric_memory as memory

    local = memory.empty(nbytes, dtype=torch.uint8, device=device)
    local.zero_()
    torch.cuda.synchronize(device)  # before a peer can write there
    try:
        return local, memory.rendezvous(local, group)
    except dist.DistError:  # of ranks that do not answer, whatever GPUs they have
        raise
    except RuntimeError as error:
        why = str(error).strip().splitlines()[0][:200]
        reason = f"needs GPUs of one host that reach each other: {why}"
        raise UnsupportedError("memory that all ranks share", [reason]) from error
