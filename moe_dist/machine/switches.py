"""Switches in the environment that all ranks must have alike, and the debug mode, which is one of them."""

from __future__ import annotations

import os

from moe_dist.errors import ConfigError

DEBUG = "MOE_DIST_DEBUG"
ON, OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
# By these NCCL picks, on each rank by itself, how a collective runs: ranks that differ wait for each other.
NCCL_SWITCHES = (
    "NCCL_ALGO", "NCCL_PROTO", "NCCL_NTHREADS", "NCCL_NET", "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_SHM_DISABLE",
    "NCCL_NVLS_ENABLE", "NCCL_CUMEM_ENABLE",
)  # fmt: skip
NUMERIC_SWITCHES = ("NVIDIA_TF32_OVERRIDE", "TRITON_INTERPRET")  # equal inputs would give other bits


def debug_asked_for() -> bool:
    """Raises ConfigError for a value that says neither yes nor no."""
    value = os.environ.get(DEBUG, "")
    if value.lower() in ON or value.lower() in OFF:
        return value.lower() in ON
    raise ConfigError(DEBUG, value, "switches the debug mode on or off", (*ON, *OFF[1:]))


def switches(device: str) -> dict[str, str]:
    """Those that matter on this kind of device, by name, as they are set, legal or not; what is not set is "not
    set"."""
    names = (*NUMERIC_SWITCHES, *(NCCL_SWITCHES if device == "cuda" else ()))
    debug = os.environ.get(DEBUG, "").lower()
    debug = "on" if debug in ON else "off" if debug in OFF else debug
    return {DEBUG: debug} | {name: os.environ.get(name, "not set") for name in names}
