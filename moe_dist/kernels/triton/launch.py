"""Launching a kernel without Triton's own search for the compiled one, which costs a small kernel's time many times
over on the host."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_compiled: dict[Any, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    integers: tuple[int, ...],
    constants: tuple[Any, ...] = (),
    **options: Any,
) -> None:
    """kernel[grid](*tensors, *integers, *constants, **options), for kernels whose parameters come in that order.

    The key holds all that Triton compiles differently for: constants and options, dtypes, whether an address or integer
    is a multiple of 16, whether an integer is 1 or needs 64 bits.
    """
    key = (
        kernel.fn,
        tensors[0].device.index,
        constants,
        *options.values(),
        *((tensor.dtype, tensor.data_ptr() & 15 == 0) for tensor in tensors),
        *(-1 if value >> 31 else 1 if value == 1 else 16 * (value & 15 == 0) for value in integers),
    )
    compiled = _compiled.get(key)
    if compiled is None:
        # None comes back in Triton's interpreter, where there is nothing to keep.
        compiled = kernel[grid](*tensors, *integers, *constants, **options)
        if compiled is not None:
            _compiled[key] = compiled
        return
    compiled[grid](*tensors, *integers, *constants)
