"""Where a backend rounds, and how far its results may therefore be off."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Numerics:
    """Where a backend rounds, beyond the FP8 quantization that the spec prescribes. The oracle follows."""

    bf16_gemm1: bool = False  # GEMM1's output is rounded to bf16 before the activation
    bf16_activation: bool = False  # the activation's output is rounded to bf16 before it is quantized
    # Codes are x · (1 / amax · 448) instead of x / (amax / 448). bf16 values lie on ties of E4M3 so often that the last
    # bit of the scale decides some 0.1 % of the codes, and each is worth up to 6 % of its value. A kernel's
    # approximate division differs in that bit.
    reciprocal: bool = False
    # FP8 products are summed in the tensor cores' own accumulators without being moved to float32 every 128 columns:
    # 0.1 to 0.2 % of error that no formula follows (seen on an H200), which moves GEMM2's input across E4M3 steps. Of
    # 7,168 columns that was worth 1.8 % on H200s, and 2 % by count if 14 bits are kept (tests/unit/test_reference.py).
    fast_accumulation: bool = False
    # All of GEMM2's input has one scale, from the largest of values that were rounded to bf16. Another order of
    # summing can round that one the other way, and a bf16 step of the scale moves codes everywhere: worth 1 to 3 %
    # (tests/unit/test_reference.py).
    bf16_maximum: bool = False
    gemm2_group: int = 128  # columns of GEMM2's input that share a scale under fp8_block
    # Those scales are powers of two, the next one above amax / 448. So the codes depend on how large the values are. A
    # group's largest value, which has the largest code otherwise, may lie between two: worth 1 to 2 % of few tokens.
    gemm2_power_of_2: bool = False
    gemm2_weighted: bool = False  # a pair's weight is in GEMM2's input before that is quantized, not in its output

    @property
    def tolerance(self) -> float:
        """Relative L2 error allowed against the oracle."""
        if self.bf16_maximum:
            return 3e-2
        if self.fast_accumulation or self.reciprocal:
            return 2.5e-2
        return 1.5e-2 if self.gemm2_power_of_2 else 1e-2

    @property
    def token_tolerance(self) -> float:
        """The same of a single token, the worst of many: a lost or swapped pair is worth more. Measured on H200s: up to
        0.03 at the strict tolerance, up to 0.04 at the wider ones."""
        return 0.1 if self.tolerance <= 1.5e-2 else 0.15
