"""Makes Triton's CPU interpreter right about bf16 and FP8. Import it after TRITON_INTERPRET=1 is set, before a kernel.

As it comes, the interpreter does bf16 and FP8 casts through numpy types that it does not have: fp32 to FP8 rounds
wrongly and bf16 stays bits. Arithmetic on bf16 values is still wrong: kernels convert to fp32 after each load.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

NARROW = {
    "fp8e4nv": (torch.float8_e4m3fn, np.uint8, torch.uint8),
    "fp8e5": (torch.float8_e5m2, np.uint8, torch.uint8),
    "bf16": (torch.bfloat16, np.uint16, torch.uint16),
}
WIDE = {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}


def as_float32(data: np.ndarray, dtype: Any) -> np.ndarray:
    """The values that raw interpreter data stands for."""
    data = np.ascontiguousarray(data)
    if dtype.name not in NARROW:
        return data.astype(np.float32)
    narrow, raw, _ = NARROW[dtype.name]
    return torch.from_numpy(data.view(raw).copy()).view(narrow).float().numpy()


def convert_float(data: np.ndarray, source: Any, target: Any, _: Any = None) -> np.ndarray:
    """Raw data of one float type to raw data of another, rounded as torch rounds."""
    values = as_float32(data, source)
    if target.name in NARROW:
        narrow, _, raw = NARROW[target.name]
        return torch.from_numpy(np.array(values)).to(narrow).view(raw).numpy().reshape(np.shape(data))
    wide = WIDE[target.name]
    return values.astype(wide).view(f"uint{8 * np.dtype(wide).itemsize}").reshape(np.shape(data))


def _dot(self: Any, a: Any, b: Any, accumulator: Any, precision: Any, most: Any) -> Any:
    if not a.dtype.scalar.is_floating():
        return _plain_dot(self, a, b, accumulator, precision, most)
    product = np.matmul(as_float32(a.data, a.dtype.scalar), as_float32(b.data, b.dtype.scalar))
    return interpreter.TensorHandle(product.astype(accumulator.data.dtype) + accumulator.data, accumulator.dtype.scalar)


def _cast(self: Any, value: Any, dtype: Any) -> Any:
    source, target = value.dtype.scalar, dtype.scalar
    if source.name not in NARROW and target.name not in NARROW:
        return _plain_cast(self, value, dtype)
    if not target.is_floating():
        raw = as_float32(value.data, source).astype(interpreter._get_np_dtype(dtype))
        return interpreter.TensorHandle(raw, target)
    if not source.is_floating():
        value, source = interpreter.TensorHandle(value.data.astype(np.float32), tl.float32), tl.float32
    return interpreter.TensorHandle(
        convert_float(value.data, source, target).view(interpreter._get_np_dtype(dtype)), target
    )


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """Rounded once: float64 holds the product of two float32 values."""
    with np.errstate(over="ignore", invalid="ignore"):  # as on a GPU: infinity or NaN
        found = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(found.astype(x.data.dtype), z.dtype.scalar)


def _call(self: Any, *arguments: Any, **named: Any) -> Any:
    """A kernel calls another function. As it comes, the interpreter patches Triton's language anew each time, which
    takes longer than all the rest; for the functions of one module once is enough."""
    if self.fn.__module__ not in _patched_for:
        _patched_for.add(self.fn.__module__)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*arguments, **named)


_patched_for: set[str] = set()
_plain_dot = interpreter.InterpreterBuilder.create_dot
_plain_cast = interpreter.InterpreterBuilder.cast_impl
interpreter._convert_float = convert_float
interpreter.InterpreterBuilder.create_dot = _dot
interpreter.InterpreterBuilder.cast_impl = _cast
interpreter.InterpreterBuilder.create_fma = _fma
interpreter.InterpretedFunction.__call__ = _call
