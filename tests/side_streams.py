"""Streams of a GPU for tests without one, on which copies are done as late as the code under test allows.

What a rank launches on its own stream is done at once. A copy on a side stream is done when its own stream waits for
that one, or when a test says so. Ranks are threads, of which one runs at a time.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)


class SideStream:
    """Copies in their order. `seen`: how many launches of its rank's own stream it comes after. `idle`: it does its
    copies at once."""

    def __init__(self, own: OwnStream, idle: bool) -> None:
        self.own, self.idle, self.seen = own, idle, 0
        self.copies: deque[tuple[torch.Tensor, torch.Tensor]] = deque()

    def wait_event(self, launched: int) -> None:
        self.seen = max(self.seen, launched)

    def add(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert self.seen == self.own.launched, "a copy may begin before what was launched before it is done"
        self.copies.append((target, source))
        if self.idle:
            self.copy_one()

    def copy_one(self) -> None:
        target, source = self.copies.popleft()
        target.copy_(source)


class OwnStream:
    """What computes. An event on it is the number of launches before."""

    def __init__(self) -> None:
        self.launched = 0
        self.sides: list[SideStream] = []

    @property
    def joined(self) -> bool:
        """Whether nothing is under way beside it."""
        return not any(side.copies for side in self.sides)

    def record_event(self) -> int:
        return self.launched

    def wait_stream(self, side: SideStream) -> None:
        while side.copies:
            side.copy_one()


class Into(TorchFunctionMode):
    """Inside, what is copied goes to a side stream."""

    def __init__(self, side: SideStream) -> None:
        super().__init__()
        self.side = side

    def __torch_function__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        if function is torch.Tensor.copy_:
            self.side.add(*given[:2])
            return given[0]
        return function(*given, **(named or {}))


class Turns:
    """`world` ranks, each a thread that hands over at each `pause`. Who goes on is drawn. `copies`: "late" are those
    that nobody does as long as any rank can go on; others are done "at once", or "at any time"."""

    def __init__(self, world: int, seed: int = 0, copies: str = "late") -> None:
        self.world, self.rank = world, 0
        self._idle, self._often = copies == "at once", 0.3 if copies == "at any time" else 0.0
        self.streams = [OwnStream() for _ in range(world)]
        self._chance, self._failed = random.Random(seed), None
        self._may_go = [lambda: True] * world
        self._go, self._back = [threading.Semaphore(0) for _ in range(world)], threading.Semaphore(0)
        self._running = set(range(world))

    @property
    def stream(self) -> OwnStream:
        """Of the rank whose turn it is."""
        return self.streams[self.rank]

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """For the streams of torch.cuda."""
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.stream)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None, priority=0: self._side())
        monkeypatch.setattr(torch.cuda, "stream", Into)

    def _side(self) -> SideStream:
        side = SideStream(self.stream, self._idle)
        self.stream.sides.append(side)
        return side

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        """The others go on. This rank does not before `until` holds."""
        rank = self.rank
        self._may_go[rank] = until
        self._back.release()
        self._go[rank].acquire()

    def play(self, work: Callable[[int], None]) -> None:
        """`work` of each rank until all have done theirs. Raises what one of them raises."""
        for rank in range(self.world):
            threading.Thread(target=self._play, args=(work, rank), daemon=True).start()
        while self._running and self._failed is None:
            ready = [rank for rank in sorted(self._running) if self._may_go[rank]()]
            busy = [side for stream in self.streams for side in stream.sides if side.copies]
            if not ready and not busy:
                raise AssertionError(f"ranks {sorted(self._running)} wait for what nobody does")
            if busy and (not ready or self._chance.random() < self._often):
                self._chance.choice(busy).copy_one()
                continue
            self.rank = self._chance.choice(ready)
            self._go[self.rank].release()
            self._back.acquire()
        if self._failed is not None:
            raise self._failed

    def _play(self, work: Callable[[int], None], rank: int) -> None:
        self._go[rank].acquire()
        try:
            work(rank)
        except BaseException as error:  # is the test's, in whose thread it is raised
            self._failed = error
        self._running.discard(rank)
        self._back.release()
