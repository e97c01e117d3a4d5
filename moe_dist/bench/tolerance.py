"""How much error a row may have."""

from __future__ import annotations

import math
from collections.abc import Mapping

from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import MoESpec
from moe_dist.oracle.numerics import Numerics

# Relative L2 error against the exact float32 layer on dequantized weights: the cost of quantizing. One scale for a
# whole tensor costs more than one per group. Against the oracle, see reference.Numerics.
EXACT_TOLERANCE = {
    "none": 5e-3,
    "fp8_block": 5e-2,
    "fp8_channel": 5e-2,
    "fp8_tensor_static": 6e-2,
    "fp8_tensor_dynamic": 6e-2,
}
FP32_TOLERANCE = 1e-5  # nothing rounds but the order of sums
FP32_TOKEN_TOLERANCE = 1e-3
REPEAT_TOLERANCE = 1e-3  # of a later output against the first, where the backend gives equal bits in every run
WHOLE_TOLERANCE = 1e-4  # both sides are exact, in float32 and float64; one wrong column of one slice costs more


def within_tolerance(
    errors: Mapping[str, float | None],
    spec: MoESpec,
    numerics: Numerics,
    *,
    pairs: int,
    combine_dtype: str,
    deterministic: bool,
) -> bool | None:
    """Whether a row's errors (by the names in findings.ERRORS) are allowed; None if it was not checked. `pairs` are
    those of one layer; `deterministic`: the backend gives equal bits for equal inputs."""
    if spec.quant_label == combine_dtype == "fp32":
        oracle, exact, token = FP32_TOLERANCE, FP32_TOLERANCE, FP32_TOKEN_TOLERANCE
    else:
        most = numerics.tolerance, EXACT_TOLERANCE[spec.quant], numerics.token_tolerance
        oracle, exact, token = (margin(spec, pairs) * each for each in most)
    # Two outputs of other bits may both be off by what one may be.
    later = {"err_repeat": REPEAT_TOLERANCE if deterministic else 2 * token, "err_again": 2 * token}
    if not all(errors[name] is None or _within(errors[name], most) for name, most in later.items()):
        return False
    if errors["err_oracle"] is None:
        return None
    allowed = {"err_oracle": oracle, "err_exact": exact, "err_whole": WHOLE_TOLERANCE, "err_token": token}
    return all(_within(errors[name], most) for name, most in allowed.items())


def _within(error: float | None, most: float) -> bool:
    """What should have been measured and was not is out of tolerance, and so is NaN."""
    return error is not None and error <= most


def margin(spec: MoESpec, pairs: int) -> float:
    """By how much the tolerances are wider for so many (token, expert) pairs.

    An error is a mean over the numbers that were rounded. The mean is at some 0.8 of the tolerance and scatters as
    1/sqrt(N), with a longer tail where N is small. A token's pairs share its row, so N counts tokens times the narrower
    of the two GEMMs' inputs. No right layer of 77,000 random ones came nearer than 5 %, with sizes from 16 to 256 and 1
    to 16 tokens. From N = 6,900 on there is no margin.
    """
    numbers = max(1, cdiv(pairs, spec.top_k)) * min(spec.hidden, spec.intermediate)
    return max(1.0, 0.9 + 8 / math.sqrt(numbers) + 64 / numbers)
