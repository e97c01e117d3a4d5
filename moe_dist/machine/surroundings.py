"""Independence of what a program has set around a call: autocast, the precision of products, the current GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

PLAIN = ("none", "ieee")  # precisions of float32 products
NOTHING = nullcontext()


def settled(device: torch.device) -> AbstractContextManager[None]:
    """Inside, matrix products of float32 are those of float32, and kernels go to `device`, whatever the caller has set:
    autocast, TF32 or bf16 for float32 products, another current GPU. Costs 2 us where nothing of that is set."""
    kind = device.type
    precision = _matmul(kind).fp32_precision
    elsewhere = kind == "cuda" and torch.cuda.current_device() != device.index
    if precision in PLAIN and not elsewhere and not torch.is_autocast_enabled(kind):
        return NOTHING
    return _settled(device)


@contextmanager
def _settled(device: torch.device) -> Iterator[None]:
    matmul = _matmul(device.type)
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if (before := matmul.fp32_precision) not in PLAIN:
            matmul.fp32_precision = "ieee"
            stack.callback(setattr, matmul, "fp32_precision", before)
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def _matmul(kind: str) -> Any:
    backend: Any = torch.backends.cuda if kind == "cuda" else torch.backends.mkldnn
    return backend.matmul


def unaffected(function: Callable[P, R]) -> Callable[P, R]:
    """For functions that make or change weights, wherever they lie: without autocast, which joins tensors in bf16 and
    refuses FP8, and without a record for gradients."""

    @wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return alone
