"""Which experts a token goes to: the routers of the supported models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_dist.errors import ConfigError
from moe_dist.model.spec import MoESpec

OF_PLAIN_TENSORS: Any = Tensor.__torch_dispatch__  # nn.Parameter has it too
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Routing:
    """`ids_TK` int32, global expert ids, -1 for none; `weights_TK` float32, of no account where the id is -1."""

    ids_TK: Tensor
    weights_TK: Tensor

    @property
    def tokens(self) -> int:
        return self.ids_TK.shape[0]

    def legal(self, num_experts: int) -> Tensor:
        """Which places hold an expert, bool [T, K]."""
        return (self.ids_TK >= 0) & (self.ids_TK < num_experts)

    def rows(self, start: int, stop: int) -> Routing:
        return Routing(self.ids_TK[start:stop], self.weights_TK[start:stop])

    def to(self, device: torch.device | str) -> Routing:
        return Routing(self.ids_TK.to(device), self.weights_TK.to(device))


def route(logits_TE: Tensor, spec: MoESpec, bias_E: Tensor | None = None) -> Routing:
    """Router logits to top-k experts and their weights, in float32 as the models do it.

    softmax (Qwen3-MoE, Mixtral): top-k of the probabilities, divided by their sum if `renormalize`, which is the
    softmax of the top k logits (gpt-oss).
    sigmoid (DeepSeek-V3 `noaux_tc`, Kimi-K2, GLM-4.x): likewise of the scores of each expert alone. Where nothing is
    added to these, the top-k is that of the logits (Llama 4): from 17 on float32 has one sigmoid for all of them.
    With a correction bias (these, and ERNIE 4.5's softmax): top-k of score + `bias_E`, weights are the scores without
    the bias. With groups, only the `top_groups` best groups may be chosen. Under sigmoid a group is as good as the sum
    of its two best biased scores (DeepSeek-V3 technical report, arXiv 2412.19437, section 2.1.2), under softmax as its
    best score (DeepSeek-V2 `group_limited_greedy`, arXiv 2405.04434, section 2.2.2). Weights are scaled by
    `routed_scaling` last.

    An expert whose logit or bias is -inf is no choice. Places that no other expert can fill get id -1 and weight 0.
    A score that is NaN is chosen and makes its weight NaN, so that the output shows it. Raises ConfigError for logits
    or a bias that are no dense tensors of floats, of the wrong shape, or on two devices and, on a CPU, for a bias that
    is NaN or +inf; `Router` looks at it on every device.
    """
    check_floats("logits", logits_TE)
    if logits_TE.ndim != 2 or logits_TE.shape[1] != spec.num_experts:
        raise ConfigError("logits", tuple(logits_TE.shape), "one column per expert", f"[tokens, {spec.num_experts}]")
    if spec.correction_bias != (bias_E is not None):
        raise ConfigError("bias", "given" if bias_E is not None else None, f"correction_bias is {spec.correction_bias}")
    if bias_E is not None:
        check_bias(bias_E, spec, values=logits_TE.device.type == "cpu")
        if bias_E.device != logits_TE.device:
            raise ConfigError("router.bias.device", bias_E.device, "not the device of the logits", logits_TE.device)
    logits = logits_TE.float()
    scores = logits.softmax(-1) if spec.scoring == "softmax" else logits.sigmoid()
    choice = scores if bias_E is None else scores + bias_E.float()
    if spec.scoring == "sigmoid" and bias_E is None and spec.num_groups == 1:
        choice = logits
    choice = choice.masked_fill(logits == float("-inf"), float("-inf"))
    if spec.num_groups > 1:
        choice = _mask_groups(choice, spec.num_groups, spec.top_groups, best=2 if spec.scoring == "sigmoid" else 1)
    chosen, ids = choice.topk(spec.top_k, dim=-1)
    empty = chosen == float("-inf")
    weights = torch.where(chosen.isnan(), chosen, scores.gather(-1, ids)).masked_fill(empty, 0.0)
    if spec.renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    return Routing(ids.to(torch.int32).masked_fill(empty, -1), weights * spec.routed_scaling)


def check_bias(bias_E: Tensor, spec: MoESpec, values: bool, masks: bool = True, field: str = "router.bias") -> None:
    """Raise ConfigError, which names `field`, for a bias that is no dense tensor of floats [E] and, if `values`, for
    one that is NaN, +inf or, unless it `masks`, -inf in float32. Looking at values makes the host wait for a GPU."""
    check_floats(field, bias_E)
    if tuple(bias_E.shape) != (spec.num_experts,):
        raise ConfigError(field, tuple(bias_E.shape), "one value per expert", f"[{spec.num_experts}]")
    if not values:
        return
    bad = ~bias_E.float().isfinite() & ~((bias_E == float("-inf")) & masks)
    if bool(bad.any()):
        expert = int(bad.nonzero()[0, 0])
        rule = f"is the bias of expert {expert}, which every token or none would go to"
        raise ConfigError(field, float(bias_E[expert]), rule, "finite values")


def check_own_memory(field: str, tensor: Tensor) -> None:
    """Raise ConfigError for a tensor that only stands for others, as a DTensor, a collective's result that has not come
    and what a trace is made with do: a kernel would be given the address 0."""
    kind: Any = type(tensor)
    if kind.__torch_dispatch__ is not OF_PLAIN_TENSORS:
        legal = "a plain torch.Tensor: to_local() of a DTensor, wait() of an AsyncCollectiveTensor"
        raise ConfigError(field, kind.__name__, "stands for other tensors and has no memory of its own", legal)


def check_floats(field: str, tensor: Tensor, device: torch.device | None = None) -> None:
    """Raise ConfigError unless it is a dense tensor of floats of two bytes or more, on a device where values lie, which
    is `device` if given."""
    if not isinstance(tensor, Tensor):
        raise ConfigError(field, type(tensor).__name__, "is no tensor", "a torch.Tensor")
    check_own_memory(field, tensor)
    if tensor.dtype not in WEIGHT_DTYPES:
        legal = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
        raise ConfigError(f"{field}.dtype", tensor.dtype, "wrong dtype", legal)
    if tensor.layout != torch.strided:
        raise ConfigError(f"{field}.layout", tensor.layout, "must be a dense tensor", torch.strided)
    if tensor.is_meta or (device is not None and tensor.device != device):
        rule = "holds no values" if tensor.is_meta else "not the router's device"
        raise ConfigError(f"{field}.device", tensor.device, rule, device or ("cpu", "cuda"))


def _mask_groups(choice_TE: Tensor, num_groups: int, top_groups: int, best: int) -> Tensor:
    """-inf outside of the `top_groups` groups whose `best` highest scores sum highest."""
    grouped = choice_TE.view(len(choice_TE), num_groups, choice_TE.shape[1] // num_groups)
    highest = grouped.topk(best, dim=-1).values
    # Of two groups with a single legal expert the better one is meant, not either: -inf would make them equal.
    group_scores = highest.where(highest != float("-inf"), _below_all(choice_TE)[:, None, None]).sum(-1)
    kept = group_scores.topk(top_groups, dim=-1).indices
    mask = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, kept, True)
    return grouped.masked_fill(~mask[..., None], float("-inf")).flatten(-2)


def _below_all(choice_TE: Tensor) -> Tensor:
    """For each token a number [T] that stands for -inf: with it and any score a sum is less than that of any two."""
    finite = choice_TE.isfinite()
    lowest = choice_TE.where(finite, float("inf")).amin(-1)
    highest = choice_TE.where(finite, float("-inf")).amax(-1)
    below = lowest - 2 * (highest - lowest) - 1e-3 * lowest.abs() - 1
    return below.where(finite.any(-1), 0.0).clamp_min(torch.finfo(below.dtype).min)
