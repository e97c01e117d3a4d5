"""Compiling many configs of the fused MoE at once, in processes of their own: one after the other they take seconds
each, far longer than they run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch

from moe_dist.machine.machine import cores
from moe_dist.model.quantization import FP8, QuantizedRows, scale_columns
from moe_dist.model.spec import MoESpec
from moe_dist.model.weights import ExpertWeights


def precompile(wanted: Iterable[tuple[MoESpec, int, int, int, bool, dict[str, Any]]]) -> Iterator[int]:
    """Fill Triton's cache with the kernels of each (spec, slice width, experts here, rows, whether rows come quantized,
    config); yields how many are done. One that can't be compiled is left to whoever runs it: its error comes there."""
    processes = max(1, cores() - 1)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        waiting = [pool.submit(_compile, *one) for one in wanted]
        for done, future in enumerate(as_completed(waiting), 1):
            future.exception()
            yield done


def _compile(spec: MoESpec, width: int, experts: int, rows: int, quantized: bool, config: dict[str, Any]) -> None:
    from moe_dist.kernels.triton.fused_moe import Config, fused_moe
    from moe_dist.kernels.triton.launch import compiling

    def shaped(columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=dtype, device="meta")

    weights = ExpertWeights.empty(spec, experts, width, "meta")
    x: Any = shaped(spec.hidden, torch.bfloat16)
    if quantized:
        columns = scale_columns(spec.quant, spec.hidden)
        x = QuantizedRows(shaped(spec.hidden, FP8), shaped(columns, torch.float32) if columns else None)
    slots, routed = shaped(spec.top_k, torch.int32), shaped(spec.top_k, torch.float32)
    with compiling():
        fused_moe(x, slots, routed, weights, spec.activation, Config(**config), torch.bfloat16)
