"""How many times something may be started again after a failure. Who starts it asks each time, and the user is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Restarts:
    """At most `limit` of them. `said` gets what the user must be told; `called`: what one is called there."""

    limit: int
    said: Callable[[str], None]
    called: str = "restart"
    used: int = 0

    @property
    def left(self) -> int:
        return self.limit - self.used

    def take(self, after: object) -> bool:
        """Whether one was left: then it counts, and the user hears what it comes after and which one it is."""
        if not self.left:
            return False
        self.used += 1
        self.said(f"{after}; {self.called} {self.used} of {self.limit}")
        return True
