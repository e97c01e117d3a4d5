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
from moe_dist.model.weights import activate

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
BIAS = "_bias"
GPT_OSS = {"has_gate": True, "has_bias": True, "is_transposed": True, "is_concatenated": False}
FAR_PROBES = (-30.0, -8.0, -7.0, -1.0, 0.0, 2.0, 7.0, 8.0, 30.0)  # beyond every clamp


@dataclass(frozen=True)
class Form:
    """Of the experts that a module holds: `num_experts` of them, with `first` the name of gate_up_proj or up_proj.
    `in_turns`: as gpt-oss has them, transposed, with columns of gate and up in turns, and with biases."""

    first: str
    hidden: int
    intermediate: int
    num_experts: int
    activation: str
    quant: QuantKind
    dtype: str
    in_turns: bool = False

    def spec(self, name: str, top_k: int, num_experts: int | None = None, quant: QuantKind | None = None) -> MoESpec:
        """The layer of these experts, or of `num_experts` of which these are some. Its router is not looked at: what
        transformers computes of it comes with every call."""
        return MoESpec(
            name=name[:300] or "experts", hidden=self.hidden, intermediate=self.intermediate, top_k=top_k,
            num_experts=num_experts or self.num_experts, activation=self.activation, quant=quant or self.quant,
            dtype="fp32" if self.dtype == "fp32" else "bf16", expert_bias=self.in_turns,
        )  # fmt: skip


def is_experts(module: nn.Module) -> bool:
    """Whether transformers would let `experts_implementation` choose how it runs."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", SECOND))


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Its own parameters by name, without gradients; no copies."""
    return {name: tensor.detach() for name, tensor in module._parameters.items() if tensor is not None}


def is_in_turns(module: Any) -> bool:
    """Whether its weights lie as gpt-oss's and its gate computes what that one's does."""
    if any(getattr(module, flag, None) is not value for flag, value in GPT_OSS.items()):
        return False
    probes = torch.tensor(FAR_PROBES, dtype=torch.float32, device="cpu")
    gate, up = (values.flatten() for values in torch.meshgrid(probes, probes, indexing="ij"))
    try:
        with torch.no_grad(), torch.device("cpu"):
            found = module._apply_gate(torch.stack([gate, up], -1).flatten())
    except Exception:  # another family's, which may want what it likes
        return False
    wanted = activate(torch.cat([gate, up]), "swigluoai")
    return isinstance(found, Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-6)


def check_structure(module: Any, name: str = "", copied: bool = False) -> None:
    """Raise UnsupportedError, with every reason, for a module that computes something else, and InstallationError where
    this transformers lacks a flag. Values and dtypes are not looked at, so they may be on meta. `copied`: weights are
    not taken as they lie, so those of gpt-oss will do."""
    for flag in ("has_gate", *(each[0] for each in FLAGS)):
        if not hasattr(module, flag) and flag != NEWEST:
            raise lacking(f"flag {flag} on {type(module).__name__}")
    in_turns = copied and is_in_turns(module)
    as_gpt_oss = GPT_OSS if in_turns else {}
    reasons = [why for flag, wanted, why in FLAGS if getattr(module, flag, wanted) is not as_gpt_oss.get(flag, wanted)]
    fp8 = optional(FP8_MODULE, "FP8Experts")
    if fp8 is not None and isinstance(module, fp8):
        set_ = [each for each in CLAMPS if getattr(module, each, None) is not None]
        reasons += [f"its activation is clamped ({', '.join(set_)})"] * bool(set_)
    elif module.has_gate and not in_turns and type(module)._apply_gate is not needed(MOE, "_default_apply_gate"):
        reasons.append("it has an _apply_gate of its own")
    if in_turns:
        pass
    elif not hasattr(module, "act_fn"):
        reasons.append("it has no act_fn")
    elif activation_of(module) is None:
        name_of = getattr(module.act_fn, "__name__", type(module.act_fn).__name__)
        reasons.append(f"its activation {name_of} {'with' if module.has_gate else 'without'} a gate")
    first = FIRST[0] if module.has_gate else FIRST[1]
    known = {each + end for each in (first, SECOND) for end in (("", BIAS) if in_turns else ("", SCALE, INPUT))}
    strange = sorted(set(tensors_of(module)) - known) + sorted(dict(module.named_buffers(recurse=False)))
    reasons += [f"its tensor {each} is not known here" for each in strange]
    needed_ones = [each + end for each in (first, SECOND) for end in ("", BIAS)[: 1 + in_turns]]
    missing = [each for each in needed_ones if each not in tensors_of(module)]
    reasons += [f"it has no {each}" for each in missing]
    inner = [each for each, child in module.named_children() if any(True for _ in child.parameters())]
    reasons += [f"its part {each} has weights of its own" for each in inner]
    if reasons:
        other = "replace_experts, which lays weights out anew" if not copied and is_in_turns(module) else SUPPORTED
        raise UnsupportedError(_titled(module, name), reasons, other)


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
    in_turns = is_in_turns(module)
    if in_turns:
        one, two = one.transpose(1, 2), two.transpose(1, 2)
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
    activation = "swigluoai" if in_turns else activation_of(module) or ""
    return Form(first, hidden, width, experts, activation, quant, DTYPES.get(one.dtype, "bf16"), in_turns)


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
