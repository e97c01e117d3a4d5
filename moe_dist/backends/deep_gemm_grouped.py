"""Backend `deep_gemm`: the package's grouped FP8 GEMMs, with our own kernels around them; there to be compared with."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_dist.backends.base import Problem
from moe_dist.backends.own import OwnPipelines, on_hopper
from moe_dist.machine.machine import HOPPER
from moe_dist.model.spec import BLOCK, MoESpec
from moe_dist.oracle.numerics import Numerics
from moe_dist.step import Step, Support, TokenRows

if TYPE_CHECKING:
    from moe_dist.kernels.triton.padded import PaddedPipeline

PACKAGE = "sgl-deep-gemm"
ACTIVATIONS = ("swiglu", "geglu", "relu2")


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
    for name in ("m_grouped_fp8_gemm_nt_contiguous", "fp8_m_grouped_gemm_nt_masked"):
        if not hasattr(deep_gemm, name):
            return Support(False, f"the installed deep_gemm has no {name}")
    try:
        return Support(True, f"{PACKAGE} {version(PACKAGE)}")
    except PackageNotFoundError:
        return Support(True, "deep_gemm")


class DeepGemm(OwnPipelines):
    """fp8_block. Its kernels are compiled for each shape at the first call (seconds)."""

    @classmethod
    def available(cls, device: str) -> Support:
        hopper = on_hopper(device)
        return installed() if hopper.ok else hopper

    @classmethod
    def numerics_of(cls, spec: MoESpec) -> Numerics:
        return Numerics(bf16_gemm1=True)

    @classmethod
    def supports(cls, problem: Problem) -> Support:
        spec, width = problem.spec, problem.width
        if refusal := cls.refused(spec, ACTIVATIONS):
            return refusal
        if spec.quant != "fp8_block":
            return Support(False, f"computes fp8_block, not {spec.quant_label}")
        if problem.capability != HOPPER:
            return Support(False, f"needs compute capability 9.0, not {problem.capability}")
        if spec.hidden % BLOCK or width % BLOCK:
            return Support(False, f"needs hidden ({spec.hidden}) and slices ({width}) in whole blocks of {BLOCK}")
        return Support(True)

    def pipeline(self, step: Step, rows: TokenRows) -> PaddedPipeline:
        from moe_dist.kernels.triton.padded import PaddedPipeline

        return PaddedPipeline(step, rows, self._weights, contiguous_gemm, masked_gemm)


def contiguous_gemm(rows: tuple[Tensor, Tensor], weights: tuple[Tensor, Any], out: Tensor, experts: Tensor) -> None:
    """out = rows · weightsᵀ, each row by its own expert's; see kernels/triton/padded.py."""
    import deep_gemm

    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(_aligned(rows), weights, out, experts)


def masked_gemm(
    rows: tuple[Tensor, Tensor], weights: tuple[Tensor, Any], out: Tensor, counts: Tensor, expected: int
) -> None:
    """The same for the first `counts` rows of each expert's tile; `expected` of them, as a hint."""
    import deep_gemm

    deep_gemm.fp8_m_grouped_gemm_nt_masked(_aligned(rows), weights, out, counts, expected)


def _aligned(rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """With the scales as DeepGEMM loads them."""
    import deep_gemm

    codes, scales = rows
    return codes, deep_gemm.get_mn_major_tma_aligned_tensor(scales)
