"""A rank's end of a process group: what every operation on it has, which is a number, a limit in time and an error with
its name."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moe_dist.comm.greeting import facts_of_process
from moe_dist.comm.guard import Form, check_form
from moe_dist.comm.others import known_elsewhere, real_group
from moe_dist.comm.symmetric import Symmetric
from moe_dist.comm.teller import Teller
from moe_dist.comm.user import user_of
from moe_dist.errors import ConfigError, MoeDistError, RankFailure
from moe_dist.machine.switches import debug_asked_for

R = TypeVar("R")


class Bounded:
    """`sequence` counts this rank's collectives."""

    def __init__(
        self,
        rank: int,
        world: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
        cpu_group: dist.ProcessGroup | None,
        timeout_s: float,
    ) -> None:
        self.rank, self.world, self.device = rank, world, device
        self._group, self._cpu_group, self._timeout_s = group, cpu_group, timeout_s
        self._user = user_of(group, world)
        self._teller = Teller(rank, world, cpu_group, timeout_s)
        self._real = weakref.ref(real_group(group)) if world > 1 and dist.is_initialized() else None
        self.sequence = 0
        self.shared: Symmetric | None = None  # what `window` made last
        self.kept: dict[Hashable, Any] = {}  # what `keep` made, by key
        self.noted: Callable[[str, int], None] | None = None  # told (op, number) as one begins, ("", ...) after it

    @property
    def timeout_s(self) -> float:
        """What bounds every collective."""
        return self._timeout_s

    def is_of(self, group: dist.ProcessGroup) -> bool:
        """Whether it uses this very process group."""
        return self._real is not None and self._real() is group

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

    def begin_step(self) -> None:
        """Count a step of a layer of this process group, whatever becomes of it. Raises as `check_window`."""
        self.check_window()
        self._user.steps += 1

    def number_layer(self) -> int:
        """Count a layer that is made on this process group; ranks make them in one order."""
        self._user.layers += 1
        return self._user.layers

    def check_window(self) -> None:
        """Raise RankFailure where a launch has given up waiting for a peer's writes; what came since is wrong."""
        problem = self.shared and self.shared.problem()
        if problem:
            phase, peer, step = problem
            operation = f"nvlink, {('rows', 'sums', 'copied rows')[phase]}"
            cause = f"rank {self.rank} waited {self._timeout_s:g} s for its flag of step {step}"
            raise RankFailure(peer, operation, self.sequence, cause)  # steps have numbers of their own

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

    def guard(self) -> None:
        """From now on the ranks of this process group, which all call this, look at each collective before it starts:
        RankFailure that names both sides instead of a hang or of each other's bytes. Costs a small collective on the
        CPU for each; one that is captured into a CUDA graph is not looked at."""
        self._user.guarded = True

    def _greet(self) -> None:
        """Once for a process group: its processes must be alike."""
        if self.world > 1 and not self._user.greeted:
            self._teller.compare(facts_of_process(self.device))
            # A switch that has no legal value is refused behind this: on all ranks alike, or it was told.
            self._user.greeted, self._user.guarded = True, debug_asked_for() or self._user.guarded

    @property
    def captures(self) -> bool:
        """Whether what is launched now is recorded into a CUDA graph."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _run(self, op: str, call: Callable[[], R], form: Callable[[], Form] = Form) -> R:
        self.check_thread()
        self.check_window()
        self.sequence += 1
        if self.noted:
            self.noted(op, self.sequence)
        try:
            self._check_group()
            self._greet()
            if self.world > 1 and self._user.guarded and not self.captures:
                check_form(self._teller, op, self.sequence, form())
            result = call()
        except MoeDistError:
            raise
        except Exception as error:
            raise RankFailure(self.rank, op, self.sequence, short(error) + known_elsewhere(self._group)) from error
        finally:
            if self.noted:
                self.noted("", self.sequence)
        self.check_thread()  # one that came meanwhile may have taken part
        return result


def short(error: Exception) -> str:
    """The first line of a library's message, without its C++ stack."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
