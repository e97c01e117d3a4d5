"""The end of a group's processes."""

from __future__ import annotations

import time
from collections.abc import Iterable

from moe_dist.runtime.pulse import Peer

LEAVE_S = 0.5  # for ranks that Ray has told to end
KILLED_S = 20.0  # for the kernel to end a process: it gives a large one's memory back first, on a busy machine late


def ended(peers: Iterable[Peer], within_s: float) -> list[int]:
    """End these ranks' processes, all of this machine, and return the ranks of those that are still there so long
    later. Ray tells a rank to end in its own time, and never reaches a stopped one."""
    left, deadline = [], time.monotonic() + LEAVE_S
    for peer in peers:
        if peer.sight().stopped or not peer.gone(deadline - time.monotonic()):
            peer.kill()
            left.append(peer)
    deadline = time.monotonic() + within_s
    return [peer.rank for peer in left if not peer.gone(deadline - time.monotonic())]
