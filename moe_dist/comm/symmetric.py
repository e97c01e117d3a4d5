"""Memory of the same size on every rank of a host, which each of them reads and writes through NVLink."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.errors import UnsupportedError
from moe_dist.model.sizes import cdiv

GRAIN = 1 << 20  # bytes: steps of slightly more tokens don't need new memory each time


class Symmetric:
    """`nbytes` of each rank. `local`: this rank's own, uint8, zero at first, and as 32-bit `words`. `addresses_W`:
    where each rank's begin as this rank sees them, int64 on the device. `failed`: int32 [4] that the host can read
    without waiting; a launch that gives up waiting for a peer leaves there what for (see `problem`)."""

    def __init__(self, nbytes: int, group: dist.ProcessGroup | None, device: torch.device) -> None:
        """Collective in `group`; None: this rank is alone. Raises UnsupportedError where GPUs can't reach each other.
        Not during a capture."""
        nbytes = cdiv(nbytes, GRAIN) * GRAIN
        with torch.inference_mode(False):
            if group is None:
                self.local = torch.zeros(nbytes, dtype=torch.uint8, device=device)
                addresses = [self.local.data_ptr()]
            else:
                self.local, self._handle = _met(nbytes, group, device)
                addresses = [int(pointer) for pointer in self._handle.buffer_ptrs]
            self.words = self.local.view(torch.int32)
            self.failed = torch.zeros(4, dtype=torch.int32, device="cpu", pin_memory=True)
            self.addresses_W = torch.tensor(addresses, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        return self.local.numel()

    def view(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """This rank's bytes from `start` on, which must be a multiple of the dtype's size."""
        count = dtype.itemsize
        for size in shape:
            count *= size
        return self.local[start : start + count].view(dtype).view(shape)

    def problem(self) -> tuple[int, int, int] | None:
        """(phase, peer, step) of a wait that was given up, phases counted from 0. What was computed since is wrong."""
        phase, peer, step, _ = self.failed.tolist()
        return (phase - 1, peer, step) if phase else None


def _met(nbytes: int, group: dist.ProcessGroup, device: torch.device) -> tuple[Tensor, Any]:
    """This rank's zeros, and torch's handle on everybody's."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # nothing here is sent to all at once
    import torch.distributed._symmetric_memory as memory

    local = memory.empty(nbytes, dtype=torch.uint8, device=device)
    local.zero_()
    torch.cuda.synchronize(device)  # before a peer can write there
    try:
        return local, memory.rendezvous(local, group)
    except RuntimeError as error:
        why = str(error).strip().splitlines()[0][:200]
        reason = f"needs GPUs of one host that reach each other: {why}"
        raise UnsupportedError("memory that all ranks share", [reason]) from error
