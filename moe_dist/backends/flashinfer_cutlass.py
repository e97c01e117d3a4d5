"""Backend `flashinfer_cutlass`: FlashInfer's CUTLASS fused MoE for Hopper (SM90).

Its expert-parallel arguments are not used: it takes local slots, with -1 for pairs that are not here, as ids of a layer
that consists of the local experts alone. That expresses every placement: uneven expert counts, TP×EP, replicas.
"""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import torch
from torch import Tensor

from moe_dist.backends.base import Backend, Problem
from moe_dist.backends.flashinfer_build import build_state, ensure_built
from moe_dist.errors import ConfigError
from moe_dist.kernels import quantize_rows
from moe_dist.model.quantization import QuantizedRows
from moe_dist.model.sizes import power_of_2
from moe_dist.model.spec import BLOCK, MoESpec
from moe_dist.model.weights import ExpertWeights
from moe_dist.oracle.numerics import Numerics
from moe_dist.step import Sink, Step, Support, TokenRows

ACTIVATIONS = {"swiglu": "Swiglu", "relu2": "Relu2"}
QUANT_KINDS = ("none", "fp8_block", "fp8_tensor_static")
ALIGNMENT = 16  # bytes of a TMA row


class FlashInferCutlass(Backend):
    """[up; gate] weights, turned in place in `prepare`; bf16 rows, or FP8 rows with one static scale.

    With one scale per tensor FlashInfer has one scale for gate and up together. Where theirs differ, up's is moved
    behind the activation, which is linear in up: the codes of GEMM2's input stay exactly the same.
    """

    capturable = True
    deterministic = True  # the fused finalize, which adds with atomics, is not used
    sums = frozenset({"bf16"})  # what the library writes
    gate_first = False

    @classmethod
    def available(cls, device: str) -> Support:
        if device != "cuda" or not torch.cuda.is_available():
            return Support(False, "needs an NVIDIA Hopper GPU (SM90)")
        if torch.cuda.get_device_capability() != (9, 0):
            return Support(False, f"needs SM90, this GPU is SM{''.join(map(str, torch.cuda.get_device_capability()))}")
        return build_state()

    @classmethod
    def numerics_of(cls, spec: MoESpec) -> Numerics:
        """With one scale per tensor the activation is quantized without a stop at bf16, and GEMM1 keeps its FP8 sums in
        the tensor cores' fast accumulators."""
        if spec.quant == "fp8_tensor_static":
            return Numerics(bf16_gemm1=True, fast_accumulation=True)
        return Numerics(bf16_gemm1=True, bf16_activation=True, reciprocal=spec.quant == "fp8_block")

    @classmethod
    def payloads(cls, spec: MoESpec) -> frozenset[str]:
        """Under fp8_block it quantizes bf16 rows itself."""
        return frozenset({"none", "bf16"} | ({"fp8"} if spec.quant == "fp8_tensor_static" else set()))

    @classmethod
    def supports(cls, problem: Problem) -> Support:
        spec, width, H = problem.spec, problem.width, problem.spec.hidden
        if spec.activation == "swigluoai" or spec.expert_bias:
            reason = "its library's clamped SwiGLU and biases were never checked against the oracle on a GPU"
            return Support(False, f"does not compute swigluoai or experts with biases: {reason}")
        if spec.activation not in ACTIVATIONS:
            return Support(False, f"computes {', '.join(ACTIVATIONS)}, not {spec.activation}")
        if spec.quant not in QUANT_KINDS or spec.dtype != "bf16":
            return Support(False, f"takes bf16, fp8_block and fp8_tensor_static, not {spec.quant_label}")
        if problem.capability != (9, 0):
            return Support(False, f"needs compute capability 9.0, not {problem.capability}")
        if spec.quant == "fp8_block" and (H % BLOCK or width % BLOCK):
            # Seen on an H200: a slice of 192 or a hidden size of 2880 gives silently wrong numbers.
            return Support(False, f"fp8_block needs hidden ({H}) and slices ({width}) in whole blocks of {BLOCK}")
        step = ALIGNMENT // (1 if spec.quantized else spec.torch_dtype.itemsize)
        if H % step or width % step:
            return Support(False, f"needs hidden ({H}) and slices ({width}) in multiples of {step}")
        return Support(True)

    @classmethod
    def build(cls) -> None:
        ensure_built()

    def prepare(self, weights: ExpertWeights) -> None:
        """Turns `weights` to [up; gate] in place. Builds FlashInfer's module if that was not done (many minutes)."""
        ensure_built()
        weights.turn(gate_first=False)
        self._weights = weights
        self._tuned: set[int] = set()
        self._empty = weights.num_experts == 0 or weights.width == 0
        self._scales = self._quant_scales(weights)
        if not self._empty:
            from flashinfer.fused_moe import cutlass_fused_moe
            from flashinfer.fused_moe.core import ActivationType
            from flashinfer.utils import device_support_pdl

            self._call: Any = cutlass_fused_moe
            self._fixed = {
                "quant_scales": self._scales,
                "use_deepseek_fp8_block_scale": self.spec.quant == "fp8_block",
                "activation_type": getattr(ActivationType, ACTIVATIONS[self.spec.activation]),
                "use_fused_finalize": False,
                "enable_pdl": device_support_pdl(weights.w13_eFH.device),  # it would ask the driver in every call
                # Under fp8_block there is nothing to tune: its tuner would look twice and answer with the default, -1.
                "profile_ids": [-1, -1] if self.spec.quant == "fp8_block" else None,
            }

    def _quant_scales(self, weights: ExpertWeights) -> list[Tensor]:
        if weights.s13 is None or weights.s2 is None:
            return []
        if weights.kind == "fp8_block":
            return [weights.s13, weights.s2]
        if weights.a13 is None or weights.a2 is None:
            raise ConfigError("weights.a13", None, "fp8_tensor_static needs static activation scales")
        first = weights.s13[:, -1].contiguous()  # gate's, or the only one of a layer without gate
        ratio = weights.s13[:, 0] / first  # up's over gate's
        return [
            first * weights.a13,
            (ratio / weights.a2).contiguous(),
            (weights.s2[:, 0] * weights.a2).contiguous(),
            weights.a13,
        ]

    def forward(self, step: Step, rows: TokenRows, sink: Sink) -> None:
        if self._weights.gate_first and self.spec.gated:
            raise RuntimeError("another backend has turned these weights; prepare this one again")
        if len(rows) == 0 or self._empty:  # the library refuses zero rows; the collectives around still run
            sink.put_zeros()
            return
        y_RH = sink.whole(step)
        with step.stages("quantize"):
            x = self._inputs(step, rows)
        # The whole fused operation: its parts can't be told apart.
        with step.stages("gemm1"), self._tactics(len(rows)):
            self._fused(x, rows, y_RH)
        sink.put_all(y_RH)

    def tune(self, step: Step, rows: TokenRows) -> None:
        """FlashInfer profiles its tactics for this many rows, rounded up to a power of two. Without that it takes a
        default that was up to six times slower on an H200. Under fp8_block it has none to choose from."""
        count = len(rows)
        if self.spec.quant == "fp8_block" or self._empty or count == 0 or power_of_2(count) in self._tuned:
            return
        from flashinfer import autotune
        from flashinfer.jit.core import logger

        self._tuned.add(power_of_2(count))
        level = logger.level
        logger.setLevel(logging.ERROR)  # it logs start and end, and draws a bar per GEMM and rank
        quiet, tuning = io.StringIO(), autotune(True, tuning_buckets=(power_of_2(count),), round_up=True)
        try:
            with contextlib.redirect_stderr(quiet), tuning:
                y_RH = step.workspace.take((count, self.spec.hidden), torch.bfloat16)
                self._fused(self._inputs(step, rows), rows, y_RH)
        finally:
            logger.setLevel(level)

    def _tactics(self, count: int) -> contextlib.AbstractContextManager[Any]:
        """The tactics found for this many rows. Where none were, FlashInfer warns and takes its default."""
        if power_of_2(count) not in self._tuned:
            return contextlib.nullcontext()
        from flashinfer import autotune

        return autotune(False, tuning_buckets=(power_of_2(count),), round_up=True)  # type: ignore[no-any-return]

    def _fused(self, x: Tensor, rows: TokenRows, y_RH: Tensor) -> None:
        self._call(
            x,
            rows.slots_RK,
            rows.weights_RK,
            self._weights.w13_eFH,
            self._weights.w2_eHi,
            torch.bfloat16,
            output=y_RH,
            **self._fixed,
        )

    def _inputs(self, step: Step, rows: TokenRows) -> Tensor:
        if isinstance(rows.x, QuantizedRows):
            return rows.x.values_RH
        if self.spec.quant == "fp8_tensor_static":
            return quantize_rows(rows.x, self.spec.quant, self._weights.a13, take=step.workspace.take).values_RH
        return rows.x.contiguous()
