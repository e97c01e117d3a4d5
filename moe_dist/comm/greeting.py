"""What processes must have alike before any of them waits for another: versions of what they talk with, switches."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from moe_dist.machine.switches import switches


def facts_of_process(device: torch.device) -> dict[str, str]:
    """By name, in words."""
    facts = {"device": device.type, "torch": torch.__version__, "moe_dist": _own_version()}
    if device.type == "cuda":
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # as loaded
    return facts | {f"environment.{name}": value for name, value in switches(device.type).items()}


def _own_version() -> str:
    try:
        return version("moe_dist")
    except PackageNotFoundError:
        return "not installed"
