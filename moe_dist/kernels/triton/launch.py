"""Launching a kernel without what costs a small kernel's time many times over on the host: Triton's own search for the
compiled one, and views of tensors as plain words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moe_dist.errors import UnsupportedError

MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # of a grid, by its dimensions: CUDA's own limits

_compiled: dict[Any, Any] = {}
_compile_only = False
_idle = False


@triton.jit
def as_bits(pointer, WORDS: tl.constexpr = True):
    """The same address as that of 32-bit words, or of bytes."""
    return pointer.to(tl.pointer_type(tl.int32 if WORDS else tl.uint8), bitcast=True)


@contextmanager
def compiling() -> Iterator[None]:
    """Inside, `launch` compiles and does not run: tensors may be on the device `meta`."""
    global _compile_only
    _compile_only = True
    try:
        yield
    finally:
        _compile_only = False


@contextmanager
def idle() -> Iterator[None]:
    """Inside, nothing is compiled or run: to see what is taken from a workspace."""
    global _idle
    _idle = True
    try:
        yield
    finally:
        _idle = False


def is_idle() -> bool:
    return _idle


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Any, ...],
    integers: tuple[int, ...],
    constants: tuple[Any, ...] = (),
    **options: Any,
) -> None:
    """kernel[grid](*tensors, *integers, *constants, **options), for kernels whose parameters come in that order. The
    last tensor may be a TMA descriptor, and one between the first and the last None, which Triton compiles as a
    constant.

    The key holds all that Triton compiles differently for: constants, options by name, dtypes, whether an address or
    integer is a multiple of 16, whether an integer is 1 or needs 64 bits.

    Raises UnsupportedError for a grid that no GPU takes: what grows with tokens belongs into the first dimension.
    """
    if grid[0] > MOST_PROGRAMS[0] or grid[1] > MOST_PROGRAMS[1] or grid[2] > MOST_PROGRAMS[2]:
        what, most = f"a step of this size (kernel {kernel.fn.__name__})", " x ".join(map(str, MOST_PROGRAMS))
        raise UnsupportedError(what, [f"its grid of {' x '.join(map(str, grid))} programs is more than {most}"])
    if _idle:
        return
    if _compile_only:
        kernel.warmup(*tensors, *integers, *constants, grid=grid, **options)
        return
    plain, last = tensors, tensors[-1]
    described: tuple[Any, ...] = ()
    if not isinstance(last, Tensor):
        plain, described = tensors[:-1], (last.base.dtype, *last.block_shape)
    key = (
        kernel.fn,
        plain[0].device.index,
        constants,
        *options.items(),
        *[None if tensor is None else tensor.dtype for tensor in plain],
        *[tensor is None or tensor.data_ptr() & 15 == 0 for tensor in plain],
        *described,
        *[-1 if value >> 31 else 1 if value == 1 else 16 * (value & 15 == 0) for value in integers],
    )
    compiled = _compiled.get(key)
    if compiled is None:
        # None comes back in Triton's interpreter, where there is nothing to keep.
        compiled = kernel[grid](*tensors, *integers, *constants, **options)
        if compiled is not None:
            _compiled[key] = compiled
        return
    compiled[grid](*tensors, *integers, *constants)
