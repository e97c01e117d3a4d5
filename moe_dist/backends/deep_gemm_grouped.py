"""Backend `deep_gemm`: the package's grouped FP8 GEMMs, with our own kernels around them; there to be compared with."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moe_dist.backends.base import Backend, Problem
from moe_dist.backends.own import HOPPER, on_hopper
from moe_dist.reference import Numerics
from moe_dist.rows import Support, TokenRows
from moe_dist.spec import BLOCK, MoESpec
from moe_dist.weights import ExpertWeights

PACKAGE = "sgl-deep-gemm"


@cache
def installed() -> Support:
    """Whether the package is there and its compiled part loads beside this torch."""
    if find_spec("deep_gemm") is None:
        return Support(False, f"deep_gemm is not installed (pip install {PACKAGE})")
    try:
        import deep_gemm
    except Exception as error:  # a compiled module that does not fit raises what it likes
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        return Support(False, f"the installed deep_gemm does not load with torch {torch.__version__}: {why}")
    if not hasattr(deep_gemm, "m_grouped_fp8_gemm_nt_contiguous"):
        return Support(False, "the installed deep_gemm has no m_grouped_fp8_gemm_nt_contiguous")
    try:
        return Support(True, f"{PACKAGE} {version(PACKAGE)}")
    except PackageNotFoundError:
        return Support(True, "deep_gemm")


class DeepGemm(Backend):
    """fp8_block. Its kernels are compiled for each shape at the first call (seconds)."""

    capturable = True
    deterministic = True

    @classmethod
    def available(cls, device: str) -> Support:
        hopper = on_hopper(device)
        return installed() if hopper.ok else hopper

    @classmethod
    def numerics_of(cls, spec: MoESpec) -> Numerics:
        return Numerics(bf16_gemm1=True)

    @classmethod
    def payloads(cls, spec: MoESpec) -> frozenset[str]:
        return frozenset({"none", "bf16"} | ({"fp8"} if spec.quantized else set()))

    @classmethod
    def supports(cls, problem: Problem) -> Support:
        spec, width = problem.spec, problem.width
        if spec.quant != "fp8_block":
            return Support(False, f"computes fp8_block, not {spec.quant_label}")
        if problem.capability != HOPPER:
            return Support(False, f"needs compute capability 9.0, not {problem.capability}")
        if spec.hidden % BLOCK or width % BLOCK:
            return Support(False, f"needs hidden ({spec.hidden}) and slices ({width}) in whole blocks of {BLOCK}")
        return installed()

    def prepare(self, weights: ExpertWeights) -> None:
        self._weights = weights
        self._empty = weights.num_experts == 0 or weights.width == 0

    def forward(self, rows: TokenRows) -> Tensor:
        count = rows.slots_RK.shape[0]
        if count == 0 or self._empty:
            shape = count, self.spec.hidden
            return torch.zeros(shape, dtype=self.out_dtype, device=rows.slots_RK.device)
        from moe_dist.kernels.triton.padded import PaddedStep

        step = PaddedStep(rows.slots_RK.contiguous(), self._weights, grouped_gemm)
        return step.run(rows.x, rows.weights_RK, self.spec.activation, self.out_dtype, self.stages)


def grouped_gemm(rows: tuple[Tensor, Tensor], weights: tuple[Tensor, Any], out: Tensor, experts: Tensor) -> None:
    """out = rows · weightsᵀ, each row by its own expert's; see kernels/triton/padded.py."""
    import deep_gemm

    codes, scales = rows
    scales = deep_gemm.get_mn_major_tma_aligned_tensor(scales)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous((codes, scales), weights, out, experts)
