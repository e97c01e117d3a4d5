"""What the debug mode looks at beside what a CPU always does. The host waits for a GPU in each of these."""

from __future__ import annotations

from torch import Tensor

from moe_dist.errors import ConfigError
from moe_dist.model.routing import Routing


def check_repeats(routing: Routing) -> None:
    """Raise ConfigError for a token with one expert in two places, both with a weight. No top-k gives that. It is added
    up right, and it may need more scratch than a plan has counted."""
    ids_TK = routing.ids_TK
    counts_TK = (ids_TK >= 0) & (routing.weights_TK != 0)
    both_TKK = (ids_TK[:, :, None] == ids_TK[:, None, :]) & counts_TK[:, :, None] & counts_TK[:, None, :]
    again_TKK = both_TKK.tril(-1)
    if bool(again_TKK.any()):
        token, later, earlier = again_TKK.nonzero()[0].tolist()
        rule = f"of token {token}, place {later}, is its expert of place {earlier} again"
        raise ConfigError("routing.ids", int(ids_TK[token, later]), rule, "each expert once in a token")


def check_result(y_TH: Tensor, x_TH: Tensor) -> None:
    """Raise RuntimeError where a step makes NaN of finite tokens: in this mode all scratch begins as NaN, so somebody
    has read what this step did not write."""
    bad_T = y_TH.isnan().any(1)
    if bool(bad_T.any()) and bool(x_TH.isfinite().all()):
        count, token = int(bad_T.sum()), int(bad_T.nonzero()[0])
        raise RuntimeError(
            f"the layer's result is NaN at token {token}, the first of {count} such, though all of its tokens are "
            "finite: a kernel has read scratch that this step did not write (the debug mode fills it with 0xFF), or a "
            "weight is NaN or infinite (ExpertWeights.check_finite), or sums overflow"
        )
