"""One Comm for all layers on a process group: under NCCL each has a group of gloo beside it, which costs sockets and
time."""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from moe_dist.comm import Comm
from moe_dist.comm.others import real_group

_comms: WeakValueDictionary[tuple[int, str, float | None], Comm] = WeakValueDictionary()


def comm_of(group: dist.ProcessGroup | None, device: torch.device | str, timeout_s: float | None) -> Comm:
    """That of the layers that there are, or a new one: collective then, as Comm.from_group, and it raises as that. None
    is the default group, whichever there is now."""
    real = real_group(group)
    key = (id(real), str(device), timeout_s)
    found = _comms.get(key)
    if found is None or not found.is_of(real):  # the id of a group that is gone may be another's by now
        found = _comms[key] = Comm.from_group(device, group, timeout_s)
    return found
