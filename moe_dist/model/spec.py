"""What is to be computed and on what grid: frozen, validated, and the one home of every divisibility rule."""

from __future__ import annotations

from hashlib import sha256
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.messages.counts import count_of
from moe_dist.model.refused import as_config_error, legal
from moe_dist.model.sizes import cdiv

BLOCK = 128  # edge of a weight's scale block and length of an activation's scale group, as in DeepSeek-V3
PARTIAL_GRANULARITY = 16  # TP slices of weights without blocks: 16 columns, what FP8 tensor cores can address

ACTIVATIONS = ("swiglu", "geglu", "relu2", "swigluoai")
GATED_ACTIVATIONS = ("swiglu", "geglu", "swigluoai")
QUANT_KINDS = ("none", "fp8_block", "fp8_tensor_static", "fp8_tensor_dynamic", "fp8_channel")
TOKEN_LAYOUTS = ("replicated", "sharded")
TOKEN_SPLITS = ("even", "ragged", "one_rank")

# Bounds on every number. No model, machine or run comes near them; what lies beyond is a slip of the keyboard, and
# would take gigabytes or hours before anything noticed. Integers are integers: true, 1.0 and "8" are none.
WIDEST = 1 << 20  # columns of a matrix
MOST_EXPERTS = 1 << 17
MOST_WEIGHTS = 1 << 46  # elements of one layer: 6,000 times DeepSeek-V3's
MOST_RANKS = 1 << 12
MOST_TOKENS = 1 << 24
# Of the factor on the routed sum. Beyond, float32 and bf16 lose the output, and zeros agree with zeros.
LEAST_SCALING, MOST_SCALING = 1e-6, 1e6
LEAST_SEED, MOST_SEED = -(1 << 63), (1 << 63) - 1  # 64 bits
LONGEST_NAME = 300
MAPPED = "@"  # in the label of a placement that has a map of experts
LONGEST_WAIT_S = 7 * 86400.0

Size = Annotated[int, Field(strict=True, ge=1, le=WIDEST)]
Experts = Annotated[int, Field(strict=True, ge=1, le=MOST_EXPERTS)]
Ranks = Annotated[int, Field(strict=True, ge=1, le=MOST_RANKS)]
Tokens = Annotated[int, Field(strict=True, ge=1, le=MOST_TOKENS)]
Index = Annotated[int, Field(strict=True, ge=-MOST_EXPERTS, le=MOST_EXPERTS)]  # which exist, a placement says
Seed = Annotated[int, Field(strict=True, ge=LEAST_SEED, le=MOST_SEED)]
Seconds = Annotated[float, Field(strict=True, gt=0, le=LONGEST_WAIT_S, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]

Activation = Annotated[str, Field(json_schema_extra=legal(lambda: ACTIVATIONS))]  # another one is not supported
QuantKind = Literal["none", "fp8_block", "fp8_tensor_static", "fp8_tensor_dynamic", "fp8_channel"]
TokenLayout = Literal["replicated", "sharded"]
TokenSplit = Literal["even", "ragged", "one_rank"]


class Section(BaseModel):
    """Base of every config section: immutable, unknown keys are errors, every error is a ConfigError."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    section: ClassVar[str] = ""

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise as_config_error(error, type(self), self.section) from None
        except TypeError as error:  # of a section inside, which pydantic makes in the same way
            if "keywords must be strings" not in str(error):
                raise
            raise ConfigError(
                self.section, data, "a section in it has keys that are no names", "names as keys"
            ) from None

    def with_changes(self, /, **changes: Any) -> Any:
        """A validated copy (pydantic's own model_copy does not validate)."""
        return type(self)(**{**self.model_dump(exclude_unset=True), **changes})


class MoESpec(Section):
    """One MoE layer: its sizes, its router and its number format.

    `intermediate` is the width of one expert's hidden layer before any slicing. `quant` none keeps weights and
    activations in `dtype`; every fp8 kind quantizes both GEMM inputs to E4M3 and keeps `dtype` bf16 outside.
    `shared_gate`: the model multiplies its shared expert's output by a sigmoid of the token (Qwen2-MoE, Qwen3-Next).
    `token_gate`: this is such a shared expert by itself, as `shared_spec` makes it; no layer of routed experts has one.
    `expert_bias`: both matrices of an expert have biases, and `router_bias`: the router's logits have one (gpt-oss).
    `weights_on_input`: a token's weight multiplies what goes into its expert instead of what comes out, and a shared
    expert gets the token as it came (Llama 4; Llama4TextMoe in modeling_llama4.py of transformers, vLLM's
    apply_router_weight_on_input).
    """

    section: ClassVar[str] = "model"

    name: Name = "custom"
    hidden: Size
    intermediate: Size
    num_experts: Experts
    top_k: Experts
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: Flag = True
    correction_bias: Flag = False
    router_bias: Flag = False
    num_groups: Experts = 1
    top_groups: Experts = 1
    routed_scaling: float = Field(default=1.0, strict=True, ge=LEAST_SCALING, le=MOST_SCALING, allow_inf_nan=False)
    activation: Activation = "swiglu"
    expert_bias: Flag = False
    weights_on_input: Flag = False
    quant: QuantKind = "fp8_block"
    dtype: Literal["bf16", "fp32"] = "bf16"
    shared_experts: Literal["none", "replicated", "tp"] = "none"
    shared_intermediate: int = Field(default=0, strict=True, ge=0, le=WIDEST)
    shared_gate: Flag = False
    token_gate: Flag = False

    @field_validator("activation")
    @classmethod
    def _known_activation(cls, value: str) -> str:
        if value not in ACTIVATIONS:
            raise UnsupportedError(f"model.activation = {value!r}", ["no backend computes it"], ACTIVATIONS)
        return value

    @model_validator(mode="after")
    def _rules(self) -> MoESpec:
        if self.top_k > self.num_experts:
            raise ConfigError(
                "model.top_k", self.top_k, "must not exceed model.num_experts", f"1 to {self.num_experts}"
            )
        weights = self.num_experts * self.hidden * (self.w13_rows(self.intermediate) + self.intermediate)
        if weights > MOST_WEIGHTS:
            sizes = f"{self.num_experts} × {self.intermediate} × {self.hidden}"
            rule = f"experts × intermediate × hidden make a layer of {weights:,} weights"
            raise ConfigError("model", sizes, rule, f"at most {MOST_WEIGHTS:,}")
        if self.quant != "none" and self.dtype != "bf16":
            raise ConfigError("model.dtype", self.dtype, f"quant {self.quant} works on bf16 activations", ("bf16",))
        if self.shared_experts != "none" and self.shared_intermediate < 1:
            raise ConfigError(
                "model.shared_intermediate", self.shared_intermediate,
                f"shared_experts {self.shared_experts} needs the width of the shared expert", "1 and more",
            )  # fmt: skip
        if self.shared_gate and self.shared_intermediate < 1:
            rule = "is of a shared expert, and without its width (model.shared_intermediate) there is none"
            raise ConfigError("model.shared_gate", True, rule, (False,))
        if self.shared_experts == "tp" and self.shared_gate:
            reason = "the model multiplies its shared expert by a sigmoid of the token, which its own rank computes"
            raise UnsupportedError("model.shared_experts = 'tp'", [reason], ("none", "replicated"))
        if self.weights_on_input and self.top_k != 1:
            rule = f"a token goes into its expert times its weight, and with top_k {self.top_k} it has several of both"
            raise ConfigError("model.weights_on_input", True, rule, (False,))
        if self.shared_experts == "tp" and self.weights_on_input:
            reason = "the rows that cross ranks are tokens times their weights, and a shared expert takes them without"
            raise UnsupportedError("model.shared_experts = 'tp'", [reason], ("none", "replicated"))
        if self.shared_experts != "none" and self.expert_bias:
            reason = "no known model has one beside experts with biases (model.expert_bias)"
            raise UnsupportedError(f"model.shared_experts = {self.shared_experts!r}", [reason], ("none",))
        if self.token_gate and (self.num_experts, self.top_k) != (1, 1):
            rule = "is of a shared expert by itself, and this layer has several experts"
            raise ConfigError("model.token_gate", True, rule, (False,))
        self._group_rules()
        return self

    def _group_rules(self) -> None:
        if self.num_groups == 1:
            if self.top_groups != 1:
                raise ConfigError("model.top_groups", self.top_groups, "there is only one group", (1,))
            return
        divisors = [n for n in range(1, self.num_experts // 2 + 1) if self.num_experts % n == 0]
        if self.num_groups not in divisors:
            rule = f"must divide num_experts ({self.num_experts}) into groups of two experts or more"
            raise ConfigError("model.num_groups", self.num_groups, rule, divisors)
        group_size = self.num_experts // self.num_groups
        fewest = cdiv(self.top_k, group_size)
        if not fewest <= self.top_groups <= self.num_groups:
            rule = f"top_k = {self.top_k} experts must fit in the chosen groups of {group_size}"
            raise ConfigError("model.top_groups", self.top_groups, rule, f"{fewest} to {self.num_groups}")

    @property
    def gated(self) -> bool:
        return self.activation in GATED_ACTIVATIONS

    @property
    def quantized(self) -> bool:
        return self.quant != "none"

    @property
    def quant_label(self) -> str:
        """The format's name in tables and results: bf16, fp32 or the fp8 kind."""
        return self.dtype if self.quant == "none" else self.quant

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    @property
    def granularity(self) -> int:
        """TP slices of `intermediate` are whole multiples of this (the last one may end early)."""
        return BLOCK if self.quant == "fp8_block" else PARTIAL_GRANULARITY

    def w13_rows(self, width: int) -> int:
        """Rows of the first weight for a slice of `width`: [gate; up] if gated."""
        return 2 * width if self.gated else width

    def shared_spec(self) -> MoESpec:
        """The shared expert as a layer of one expert that every token picks with weight 1."""
        return MoESpec(
            name=f"{self.name}-shared", hidden=self.hidden, intermediate=self.shared_intermediate, num_experts=1,
            top_k=1, activation=self.activation, quant=self.quant, dtype=self.dtype, token_gate=self.shared_gate,
        )  # fmt: skip


class ParallelSpec(Section):
    """The grid: `tp` slices of every expert times `ep` groups of experts, world = tp × ep.

    `expert_map[e]` is the ep group that owns expert e; without it, groups own equal runs of experts. `replicas` gives
    an expert extra homes: {expert: [ep group, ...]}, beside the group that owns it anyway.
    """

    section: ClassVar[str] = "parallel"

    tp: Ranks = 1
    ep: Ranks = 1
    expert_map: Annotated[tuple[Index, ...], Field(max_length=MOST_EXPERTS)] = ()
    replicas: tuple[tuple[Index, tuple[Index, ...]], ...] = ()
    allow_empty_shards: Flag = False

    @field_validator("replicas", mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        """A mapping as pairs; what is none of both is left to the type check."""
        if not isinstance(value, dict):
            return value
        return tuple(
            (expert, tuple(groups) if isinstance(groups, list) else groups) for expert, groups in value.items()
        )

    @field_validator("replicas")
    @classmethod
    def _in_order(cls, value: tuple[tuple[int, tuple[int, ...]], ...]) -> tuple[tuple[int, tuple[int, ...]], ...]:
        return tuple(sorted(value))

    @property
    def world(self) -> int:
        return self.tp * self.ep

    @property
    def label(self) -> str:
        """TP4, EP4, TP2xEP2 or, on one rank, single; with +n for n extra copies of experts, and with @ and six digits
        of a hash that tell one map of experts and their copies from another."""
        parts = [f"TP{self.tp}"] * (self.tp > 1) + [f"EP{self.ep}"] * (self.ep > 1)
        copies = sum(len(groups) for _, groups in self.replicas)
        digits = sha256(repr((self.expert_map, self.replicas)).encode()).hexdigest()[:6]
        return (
            ("x".join(parts) or "single")
            + (f"+{copies}" if copies else "")
            + (f"{MAPPED}{digits}" if self.expert_map else "")
        )


class WorkloadSpec(Section):
    """What enters the layer: `tokens` over the whole group, where they lie, how many of them each rank has, and how the
    router spreads them. `trace` is the SHA-256 of a recorded routing's file: a case fills it in, and ranks refuse a
    file of another content."""

    section: ClassVar[str] = "workload"

    tokens: Tokens
    token_layout: TokenLayout = "sharded"
    token_split: TokenSplit = "even"
    skew: str = "uniform"
    seed: Seed = 0
    trace: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _rules(self) -> WorkloadSpec:
        if self.token_layout == "replicated" and self.token_split != "even":
            rule = "divides sharded tokens, and replicated ones are whole on every rank"
            raise ConfigError("workload.token_split", self.token_split, rule, "even, or token_layout sharded")
        return self


def slice_bounds(total: int, parts: int, granularity: int, field: str, allow_empty: bool) -> list[tuple[int, int]]:
    """Cut `total` into `parts` runs of whole granules, the wider ones first; only the last granule may be partial.

    768 over 4 with granularity 128 gives widths 256, 256, 128, 128. A run of width zero raises ConfigError unless
    `allow_empty`.
    """
    granules = cdiv(total, granularity)
    if parts > granules and not allow_empty:
        rule = (
            f"{total} has only {count_of(granules, 'slice')} of {granularity}, so a rank would hold nothing"
            " (allow_empty_shards=true permits that)"
        )
        raise ConfigError(field, parts, rule, f"1 to {granules}")
    counts = [granules // parts + (part < granules % parts) for part in range(parts)]
    stops = [min(total, granularity * sum(counts[: part + 1])) for part in range(parts)]
    return list(zip([0, *stops[:-1]], stops, strict=True))


def split_bounds(total: int, parts: int) -> list[tuple[int, int]]:
    """Cut `total` items into `parts` runs, ceil first, floor after: the split of experts and of token shards."""
    stops = [total // parts * (part + 1) + min(part + 1, total % parts) for part in range(parts)]
    return list(zip([0, *stops[:-1]], stops, strict=True))
