"""Independence of what a program has set around a call: autocast, the precision of products, the current GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def settled(device: torch.device) -> Iterator[None]:
    """Inside, matrix products of float32 are those of float32, and kernels go to `device`, whatever the caller has set:
    autocast, TF32 or bf16 for float32 products, another current GPU. Nothing is entered that is not needed."""
    with ExitStack() as stack:
        kind = device.type
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        backend = torch.backends.cuda if kind == "cuda" else torch.backends.mkldnn
        if (before := backend.matmul.fp32_precision) not in ("none", "ieee"):
            backend.matmul.fp32_precision = "ieee"
            stack.callback(setattr, backend.matmul, "fp32_precision", before)
        if kind == "cuda" and torch.cuda.current_device() != device.index:
            stack.enter_context(torch.cuda.device(device))
        yield


def unaffected(function: Callable[P, R]) -> Callable[P, R]:
    """For functions that make or change weights, wherever they lie: without autocast, which joins tensors in bf16 and
    refuses FP8, and without a record for gradients."""

    @wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return alone
