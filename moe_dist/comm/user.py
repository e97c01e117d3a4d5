"""Who uses a process group: one thread at a time."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any

import torch.distributed as dist

SETTLED_AFTER_S = 5.0  # a second thread that comes later can't have been taken for the first one on another rank


class User:
    """The thread that uses a process group, since when, and whether another one came as soon; how many layers were made
    on the group and how many steps they began, through whichever Comm. `greeted`: its ranks have found that their
    processes are alike; `guarded`: they look at each collective before it starts."""

    def __init__(self) -> None:
        self.steps = self.layers = 0
        self.greeted = self.guarded = False
        self.thread: int | None = None
        self.since, self.contended = 0.0, False

    def admits(self) -> bool:
        thread, now = threading.get_ident(), time.monotonic()
        if self.thread is None:
            self.thread, self.since = thread, now
        if self.thread != thread and now - self.since < SETTLED_AFTER_S:
            self.contended = True
        return self.thread == thread and not self.contended

    def take_over(self) -> None:
        self.thread, self.since, self.contended = threading.get_ident(), time.monotonic(), False


_users: weakref.WeakKeyDictionary[Any, User] = weakref.WeakKeyDictionary()


def user_of(group: dist.ProcessGroup | None, world: int) -> User:
    """One for all that use a group."""
    if world == 1 or not dist.is_initialized():
        return User()
    return _users.setdefault(dist.group.WORLD if group is None else group, User())
