"""Scratch that all layers and graphs of a thread share: what a step needs until it ends, and nobody after it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from moe_dist.errors import ConfigError
from moe_dist.model.sizes import cdiv

TensorSpec = tuple[tuple[int, ...], torch.dtype]  # a tensor's shape and dtype
Take = Callable[[tuple[int, ...], torch.dtype], Tensor]  # a new tensor of this shape and dtype, which holds anything

ALIGNMENT = 256  # bytes: what kernels load at once, and the allocator's own
GRAIN = 1 << 20  # bytes: the arena grows by whole ones, so that steps of slightly more tokens don't move it each time
POISON = 0xFF  # of each byte: NaN in every float format, -1 in signed integers
MOST_VIEWS = 4096  # of a workspace that are kept: steps of ever new sizes would otherwise collect them


class Workspace:
    """One arena of bytes. A step begins at its front and takes tensors one behind another; the next step begins at the
    front again. So a hundred layers need the scratch of the largest one.

    Steps of one thread on one device share it. They may run on different streams: a step waits for the one before it.
    What a step takes beyond the arena is allocated on its own, and before the next step the arena grows to hold it.
    A CUDA graph keeps the `arena` that it was captured with, though a larger one may replace it for later steps.

    `high_water`: the most bytes that any step took.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.thread = threading.get_ident()
        self.high_water = 0
        self._views: dict[tuple[int, tuple[int, ...], torch.dtype], Tensor] = {}
        self._flat: dict[torch.dtype, Tensor] = {}  # the arena as each dtype
        self._next, self._poisoned = 0, False
        self._stream: torch.cuda.Stream | None = None
        self.arena = self._allocated(0)

    @property
    def nbytes(self) -> int:
        """Of the arena."""
        return self.arena.numel()

    def begin(self, poisoned: bool = False) -> None:
        """A step begins: what earlier ones took may be overwritten. Not while another step of this thread runs. With
        `poisoned` all scratch of this step begins as POISON, except in a capture: what reads scratch that this step did
        not write to then shows, where it might have found what an earlier step left there."""
        self._next, self._poisoned = 0, False
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return  # a replay may come anywhere among other steps: `enter` orders it
        self.enter()
        if self.high_water > self.nbytes:
            self.reserve(self.high_water)
        self._poisoned = poisoned
        if poisoned:
            self.arena.fill_(POISON)

    def enter(self) -> None:
        """A step or the replay of a graph is about to be launched, by this thread on its current stream: wait for what
        the last one has launched on another stream. A thread that replays another one's graph takes its workspace
        over, and the other one gets a new one."""
        self.thread = threading.get_ident()
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def reserve(self, nbytes: int) -> None:
        """Room for steps of `nbytes`, at once instead of after the first of them. Raises ConfigError during capture."""
        if nbytes <= self.nbytes:
            return
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                raise ConfigError("workspace", nbytes, "can't grow while a CUDA graph is captured", f"{self.nbytes}")
            torch.cuda.synchronize(self.device)  # steps on any stream may still use the old one
        self._views.clear()
        self._flat.clear()
        self.arena = self._allocated(0)  # the old one may go before the new one comes
        self.arena = self._allocated(cdiv(nbytes, GRAIN) * GRAIN)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of this step, which holds anything."""
        start = self._next
        key = (start, shape, dtype)
        view = self._views.get(key)
        if view is None:
            return self._taken(key)
        self._next = start + cdiv(view.nbytes, ALIGNMENT) * ALIGNMENT
        if self._next > self.high_water:
            self.high_water = self._next
        return view

    def _taken(self, key: tuple[int, tuple[int, ...], torch.dtype]) -> Tensor:
        start, shape, dtype = key
        nbytes = math.prod(shape) * dtype.itemsize
        self._next = start + cdiv(nbytes, ALIGNMENT) * ALIGNMENT
        self.high_water = max(self.high_water, self._next)
        if self._next > self.nbytes:
            beside = torch.empty(shape, dtype=dtype, device=self.device)
            if self._poisoned:
                beside.view(torch.uint8).fill_(POISON)
            return beside
        if len(self._views) >= MOST_VIEWS:
            self._views.clear()
        if torch.is_inference_mode_enabled():  # a view made in it could be filled in it only
            with torch.inference_mode(False):
                view = self._view(key)
        else:
            view = self._view(key)
        self._views[key] = view
        return view

    def _view(self, key: tuple[int, tuple[int, ...], torch.dtype]) -> Tensor:
        """One operation, which is as quick as an allocation."""
        start, shape, dtype = key
        flat = self._flat.get(dtype)
        if flat is None:
            flat = self._flat[dtype] = self.arena.view(dtype)
        strides, stride = [], 1
        for size in reversed(shape):
            strides.append(stride)
            stride *= max(1, size)
        return flat.as_strided(shape, strides[::-1], start // dtype.itemsize)

    def _allocated(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)


class _Own(threading.local):
    """A thread's, which end with it."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, Workspace] = {}


_own = _Own()


def workspace_of(device: torch.device) -> Workspace:
    """This thread's on `device`. Threads have one each, because their steps may be under way at the same time."""
    workspace = _own.by_device.get(device)
    if workspace is None or workspace.thread != threading.get_ident():  # another thread has taken it over
        workspace = _own.by_device[device] = Workspace(device)
    return workspace


def fresh(device: torch.device) -> Take:
    """Tensors of their own, for work outside of any step."""
    return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device)


def bytes_of(specs: Iterable[TensorSpec]) -> int:
    """Of a workspace that such tensors are taken from."""
    return sum(cdiv(math.prod(shape) * dtype.itemsize, ALIGNMENT) * ALIGNMENT for shape, dtype in specs)
