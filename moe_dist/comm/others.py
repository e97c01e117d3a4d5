"""What a process group of somebody else's is: its ranks, backends, devices and timeout."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.errors import ConfigError


def real_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """With None for the default one, which is not to be held: an object of it that lives until exit can abort gloo."""
    return dist.group.WORLD if group is None else group  # type: ignore[return-value]


def known_elsewhere(group: dist.ProcessGroup | None) -> str:
    """For the end of a message: which ranks of all those of a group are, where they have other numbers. Nothing for a
    group that was destroyed."""
    if group is None or not dist.is_initialized():
        return ""
    try:
        everywhere = dist.get_process_group_ranks(group)
    except (KeyError, ValueError, RuntimeError):  # by releases of torch
        return ""
    own = range(len(everywhere))
    if everywhere == list(own):
        return ""
    return f"; ranks of a group: {_and(own)} are {_and(everywhere)} of all"


def _and(numbers: Sequence[int]) -> str:
    return " and ".join(filter(None, (", ".join(map(str, numbers[:-1])), str(numbers[-1]))))


def rank_in(group: Any) -> int:
    """Raises ConfigError where this process has none in it."""
    legal = (
        "a ProcessGroup that this process is in, as get_group() of a DeviceMesh gives it, or None for the default one"
    )
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ConfigError("process group", "another's", "this process is not in it", legal)
    if not (group is None or isinstance(group, dist.ProcessGroup)):
        raise ConfigError("process group", group, f"it is of type {type(group).__name__}", legal)
    try:
        return dist.get_rank(group)
    except ValueError:
        raise ConfigError("process group", "an old one", "it was destroyed", legal) from None


def device_of(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError("device", device, f"is none: {str(error).splitlines()[0]}", ("cpu", "cuda")) from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", str(found), "this process has no CUDA device", ("cpu",))
    return found


def with_index(device: torch.device | str) -> torch.device:
    """A GPU is named with its number: tensors on it are."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def backends_of(group: dist.ProcessGroup | None) -> dict[str, str]:
    """Device type to the name of the backend that serves it."""
    pairs = (pair.partition(":") for pair in dist.get_backend_config(group).split(","))
    return {device: backend for device, _, backend in pairs}


def timeout_of(group: dist.ProcessGroup | None, device: torch.device) -> float:
    """The group's own, in seconds."""
    real = group if group is not None else dist.group.WORLD
    options = getattr(real._get_backend(device), "options", None)  # type: ignore[union-attr]
    timeout: timedelta = getattr(options, "_timeout", dist.distributed_c10d.default_pg_timeout)
    return timeout.total_seconds()
