"""What an experts module of transformers computes, read from its flags and tensors. Anything that no layer here
computes is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.errors import UnsupportedError
from moe_dist.integrations.transformers.version import FP8 as FP8_MODULE
from moe_dist.integrations.transformers.version import MOE, lacking, needed, optional
from moe_dist.model.quantization import FP8
from moe_dist.model.spec import BLOCK, MoESpec, QuantKind

# Each flag, the value that it must have, and what another one means. `has_gate` may have either.
FLAGS = (
    ("has_bias", False, "its experts have biases"),
    ("is_transposed", False, "its weights are transposed ([E, H, 2I] and [E, I, H])"),
    ("is_concatenated", True, "its rows of gate and up are interleaved"),
    ("has_post_expert_norm", False, "it normalizes each expert's output"),
)
NEWEST = "has_post_expert_norm"  # came with the feature: a version without the flag lets no such module have functions
CLAMPS = ("swiglu_alpha", "swiglu_limit", "limit", "gate_softcap", "up_softcap")  # of FP8Experts, None for none
PROBES = (-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0)
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
SUPPORTED = "bf16, float32 and FP8 experts with silu or tanh-gelu gates, or relu² without a gate"
FIRST, SECOND, SCALE, INPUT = ("gate_up_proj", "up_proj"), "down_proj", "_scale_inv", "_activation_scale"


@dataclass(frozen=True)
class Form:
    """Of the experts that a module holds: `num_experts` of them, with `first` the name of gate_up_proj or up_proj."""

    first: str
    hidden: int
    intermediate: int
    num_experts: int
    activation: str
    quant: QuantKind
    dtype: str

    def spec(self, name: str, top_k: int, num_experts: int | None = None, quant: QuantKind | None = None) -> MoESpec:
        """The layer of these experts, or of `num_experts` of which these are some. Its router is not looked at: what
        transformers computes of it comes with every call."""
        return MoESpec(
            name=name[:300] or "experts", hidden=self.hidden, intermediate=self.intermediate, top_k=top_k,
            num_experts=num_experts or self.num_experts, activation=self.activation, quant=quant or self.quant,
            dtype="fp32" if self.dtype == "fp32" else "bf16",
        )  # fmt: skip


def is_experts(module: nn.Module) -> bool:
    """Whether transformers would let `experts_implementation` choose how it runs."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", SECOND))


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Its own parameters by name, without gradients; no copies."""
    return {name: tensor.detach() for name, tensor in module._parameters.items() if tensor is not None}


def check_structure(module: Any, name: str = "") -> None:
    """Raise UnsupportedError, with every reason, for a module that computes something else, and InstallationError where
    this transformers lacks a flag. Values and dtypes are not looked at, so they may be on meta."""
    for flag in ("has_gate", *(each[0] for each in FLAGS)):
        if not hasattr(module, flag) and flag != NEWEST:
            raise lacking(f"flag {flag} on {type(module).__name__}")
    reasons = [why for flag, wanted, why in FLAGS if getattr(module, flag, wanted) is not wanted]
    fp8 = optional(FP8_MODULE, "FP8Experts")
    if fp8 is not None and isinstance(module, fp8):
        set_ = [each for each in CLAMPS if getattr(module, each, None) is not None]
        reasons += [f"its activation is clamped ({', '.join(set_)})"] * bool(set_)
    elif module.has_gate and type(module)._apply_gate is not needed(MOE, "_default_apply_gate"):
        reasons.append("it has an _apply_gate of its own")
    if not hasattr(module, "act_fn"):
        reasons.append("it has no act_fn")
    elif activation_of(module) is None:
        name_of = getattr(module.act_fn, "__name__", type(module.act_fn).__name__)
        reasons.append(f"its activation {name_of} {'with' if module.has_gate else 'without'} a gate")
    first = FIRST[0] if module.has_gate else FIRST[1]
    known = {each + end for each in (first, SECOND) for end in ("", SCALE, INPUT)}
    strange = sorted(set(tensors_of(module)) - known) + sorted(dict(module.named_buffers(recurse=False)))
    reasons += [f"its tensor {each} is not known here" for each in strange]
    missing = [each for each in (first, SECOND) if each not in tensors_of(module)]
    reasons += [f"it has no {each}" for each in missing]
    inner = [each for each, child in module.named_children() if any(True for _ in child.parameters())]
    reasons += [f"its part {each} has weights of its own" for each in inner]
    if reasons:
        raise UnsupportedError(_titled(module, name), reasons, SUPPORTED)


def activation_of(module: Any) -> str | None:
    """Found by what it computes on a few numbers, since the same function has several names. None: none of ours."""
    x = torch.tensor(PROBES, dtype=torch.float32, device="cpu")
    candidates = {
        "swiglu": nn.functional.silu(x),
        "geglu": nn.functional.gelu(x, approximate="tanh"),
    } if module.has_gate else {"relu2": x.relu().square()}  # fmt: skip
    with torch.no_grad(), torch.device("cpu"):
        found = module.act_fn(x)
    return next((name for name, values in candidates.items() if torch.allclose(found, values, atol=1e-6)), None)


def form_of(module: Any, tensors: Mapping[str, Tensor], name: str = "") -> Form:
    """Of a module that `check_structure` has passed, with these tensors of it. Raises UnsupportedError."""
    first = FIRST[0] if module.has_gate else FIRST[1]
    one, two = tensors[first], tensors[SECOND]
    (experts, rows, hidden), width = one.shape, two.shape[-1]
    reasons = []
    if two.shape[:2] != (experts, hidden) or rows != (2 * width if module.has_gate else width):
        reasons.append(f"{first} is {list(one.shape)} and {SECOND} {list(two.shape)}, which do not belong together")
    if one.is_meta or two.is_meta:
        reasons.append("its weights are not here (on meta, or offloaded)")
    quant: QuantKind = "none"
    if one.dtype == two.dtype == FP8:
        quant, why = _fp8_kind(module, tensors, first, width)
        reasons += [why] * bool(why)
    elif one.dtype != two.dtype or one.dtype not in DTYPES:
        reasons.append(f"its weights are {one.dtype} and {two.dtype}")
    if reasons:
        raise UnsupportedError(_titled(module, name), reasons, SUPPORTED)
    dtype, activation = DTYPES.get(one.dtype, "bf16"), activation_of(module) or ""
    return Form(first, hidden, width, experts, activation, quant, dtype)


def _fp8_kind(module: Any, tensors: Mapping[str, Tensor], first: str, width: int) -> tuple[QuantKind, str]:
    """Of FP8 weights, and what speaks against them. transformers gives tokens a scale for each row and 128 columns
    where weights have blocks, a scale for each row where a matrix has one, or a static one."""
    block = module.block_size
    scales = [tensors.get(each + SCALE) for each in (first, SECOND)]
    if any(scale is None for scale in scales):
        return "fp8_block", "its FP8 weights have no scales"
    static = module.activation_scheme == "static"
    halves = 2 if module.has_gate else 1
    if block is None:
        wanted = [halves, 1]
        if [scale.shape[1] for scale in scales if scale is not None] != wanted:
            return "fp8_channel", f"its scales are {[list(s.shape) for s in scales if s is not None]}, not one a matrix"
        return ("fp8_tensor_static" if static else "fp8_channel"), ""
    if tuple(block) != (BLOCK, BLOCK):
        return "fp8_block", f"its blocks are {tuple(block)}, not ({BLOCK}, {BLOCK})"
    if static:
        return "fp8_block", "it has blocks of weights and static scales of tokens"
    found = scales[0].shape[1] if scales[0] is not None else 0
    if found != halves * -(-width // BLOCK):
        return "fp8_block", f"a block of its scales covers rows of gate and of up (intermediate size {width})"
    return "fp8_block", ""


def _titled(module: nn.Module, name: str) -> str:
    return f"{name + ', a ' if name else ''}{type(module).__name__} of transformers"
