"""A Hugging Face config.json as a MoESpec, and which layers of the model are MoE layers.

Keys that decide a number are required. Optional are those that some writers leave out because the model family knows
only one value: topk_method, scoring_func, moe_layer_freq, n_shared_experts, mlp_only_layers, decoder_sparse_step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from moe_dist.checkpoint.folder import CONFIG_LIMIT, folder, model_name, read_json, shown
from moe_dist.checkpoint.neutral import refuse_unread
from moe_dist.checkpoint.quantization import CONFIG_FILE, Quantization, read_other_files, read_quantizations
from moe_dist.errors import CheckpointError, ConfigError, MoeDistError, UnsupportedError
from moe_dist.model.spec import LEAST_SCALING, MOST_SCALING, MoESpec

HIDDEN_ACTS = {"silu": "swiglu"}
DTYPES: dict[str, Literal["bf16", "fp32"]] = {"bfloat16": "bf16", "float32": "fp32"}
# Beyond these a number is a slip or an attack: every layer, expert and block is walked over.
MOST = {"num_hidden_layers": 10_000, "experts": 16_384, "size": 1 << 20}

T = TypeVar("T")


@dataclass(frozen=True)
class ModelConfig:
    """What the files beside the weights say about the experts.

    `spec` is a layer as the model's quantization makes it, or, where nothing here reads that, a layer it leaves out.
    `layer_spec` tells of one layer. `moe_layers` are ascending layer numbers below `num_layers`; a
    multi-token-prediction layer after the last one is not counted. `dtype`: of weights that are not quantized, None if
    config.json does not say it. `path` is config.json.
    """

    path: Path
    model_type: str
    spec: MoESpec
    num_layers: int
    moe_layers: tuple[int, ...]
    dtype: Literal["bf16", "fp32"] | None = None
    quantizations: tuple[Quantization, ...] = ()

    def layer_spec(self, layer: int) -> MoESpec:
        """The layer by these files alone, without a look at its tensors. Raises ConfigError if it holds no experts and
        UnsupportedError if its quantization is not read or takes only some of them; CheckpointError where two of the
        files contradict each other."""
        self.require_moe_layer(layer)
        return self._spec_of(layer, self.spec.num_experts)

    def quantization_of(self, layer: int) -> Quantization | None:
        """What converts the routed experts of `layer`, None if nothing does. Raises like `layer_spec`."""
        return self._converting(layer, self.spec.num_experts)

    def _spec_of(self, layer: int, experts: int) -> MoESpec:
        if self._converting(layer, experts) is None:
            return _with_format(self.spec, "none", self.dtype or "bf16")
        if self.dtype == "fp32":
            reason = "FP8 experts work on bf16 activations, and its dtype is float32"
            raise UnsupportedError(f"the model in {self.path}", [reason])
        return _with_format(self.spec, "fp8_block", "bf16")

    def _converting(self, layer: int, experts: int) -> Quantization | None:
        prefix = f"model.layers.{layer}.mlp.experts"
        converting = [found for found in self.quantizations if found.converts(prefix, experts)]
        for found in converting:
            found.refuse()
        leaving = [found for found in self.quantizations if found not in converting]
        if converting and leaving:
            both = f"{converting[0].where} quantizes the experts of layer {layer}, {leaving[0].where} leaves them out"
            raise CheckpointError(self.path, both)
        return converting[0] if converting else None

    def typical(self) -> MoESpec:
        """The spec of a quantized layer if there is one that is read, else of one that isn't quantized. Raises
        UnsupportedError if no layer is read."""
        found: MoESpec | None = None
        refused: MoeDistError | None = None
        for layer in self.moe_layers if self.quantizations else self.moe_layers[:1]:
            try:
                found = self._spec_of(layer, 1)  # one expert stands for all: there may be thousands of layers
            except (UnsupportedError, CheckpointError) as error:
                refused = error
            else:
                if found.quantized:
                    return found
        if found is None and refused is not None:
            raise refused
        return found or self.spec

    def require_moe_layer(self, layer: int) -> None:
        """Raise ConfigError unless `layer` holds experts."""
        if layer in self.moe_layers:
            return
        rule = f"the model has {self.num_layers} layers, counted from 0"
        if 0 <= layer < self.num_layers:
            rule = "this layer is dense, it has no experts"
        raise ConfigError("checkpoint.layer", layer, rule, layer_ranges(self.moe_layers))


def layer_ranges(layers: tuple[int, ...]) -> str:
    """Ascending layer numbers as runs: (1, 2, 3, 5) -> "1 to 3, 5"."""
    first, *rest = layers
    runs = [[first, first]]
    for before, layer in pairwise((first, *rest)):
        if layer == before + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{start} to {stop}" if stop > start else str(start) for start, stop in runs)


def read_config(directory: Path | str) -> ModelConfig:
    """The model in `directory`, named after it. Raises CheckpointError (file missing, no JSON, a key missing or of the
    wrong type, values that contradict each other) or UnsupportedError (another model type, activation, router, dtype
    or quantization)."""
    directory = folder(directory)
    path = directory / CONFIG_FILE
    raw = read_json(directory, CONFIG_FILE, CONFIG_LIMIT)
    family, keys = _family(raw, path), _Keys(raw, path)
    num_layers = keys.integer("num_hidden_layers", least=1, most=MOST["num_hidden_layers"])
    is_moe = family.layer_rule(keys)
    sparse = [is_moe(layer) for layer in range(num_layers)]
    moe_layers = tuple(layer for layer in range(num_layers) if sparse[layer])
    if not moe_layers:
        raise CheckpointError(path, f"none of its {num_layers} layers has experts")
    quantizations = read_quantizations(raw, path) + read_other_files(directory)
    spec = _spec(keys, model_name(directory))
    refuse_unread(raw, keys.read, spec, sparse, path)
    config = ModelConfig(path, keys.get("model_type", str), spec, num_layers, moe_layers, _dtype(keys), quantizations)
    return replace(config, spec=config.typical())


def spec_from_config(raw: Mapping[str, Any], path: Path | str = CONFIG_FILE, name: str = "custom") -> MoESpec:
    """The MoE layer that the content of a config.json describes, if no list takes it out of the quantization; `path` is
    for error messages.

    A shared expert's width is in `shared_intermediate`; `shared_experts` stays "none" until the user asks for it.
    Raises like `read_config`.
    """
    keys = _Keys(raw, path)
    spec, quantizations = _spec(keys, name), read_quantizations(raw, path)
    refuse_unread(raw, keys.read, spec, None, path)
    for found in quantizations:
        found.refuse()
    return _with_format(spec, "fp8_block", "bf16") if quantizations else spec


def _with_format(spec: MoESpec, quant: str, dtype: str) -> MoESpec:
    changed: MoESpec = spec.with_changes(quant=quant, dtype=dtype)
    return changed


def _spec(keys: _Keys, name: str) -> MoESpec:
    """The layer without its quantization."""
    fields = _family(keys.raw, keys.path).router(keys) | _activation(keys)
    try:
        return MoESpec(
            name=name,
            hidden=keys.integer("hidden_size", least=1, most=MOST["size"]),
            intermediate=keys.integer("moe_intermediate_size", least=1, most=MOST["size"]),
            top_k=keys.integer("num_experts_per_tok", least=1),
            renormalize=keys.get("norm_topk_prob", bool),
            quant="none",
            dtype=_dtype(keys) or "bf16",
            **fields,
        )
    except ConfigError as error:
        raise CheckpointError(keys.path, f"describes no layer that can work: {error}") from error


class _Keys:
    """The keys of a config.json, each checked for presence and type. A null counts as absent. `read`: those asked for
    so far."""

    def __init__(self, raw: Mapping[str, Any], path: Path | str) -> None:
        self.raw, self.path = raw, path
        self.read: set[str] = set()

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        self.read.add(key)
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(self.path, f"key {key} is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(self.path, f"key {key} = {shown(value)} is no {kind.__name__}")
        return value

    def integer(self, key: str, default: int | None = None, least: int = 0, most: int = MOST["experts"]) -> int:
        value = self.get(key, int, default)
        if value < least:
            raise CheckpointError(self.path, f"key {key} = {shown(value)} must be {least} or more")
        if value > most:
            raise CheckpointError(self.path, f"key {key} = {shown(value)} must be {most:,} or less")
        return value

    def number(self, key: str, least: float, most: float) -> float:
        self.read.add(key)
        value = self.raw.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            value = self.get(key, float)
        if not least <= value <= most:
            raise CheckpointError(self.path, f"key {key} = {shown(value)} must be from {least:g} to {most:g}")
        return float(value)

    def either(self, key: str, other: str) -> str:
        """Which of two names of one thing is there; CheckpointError if both are and contradict each other."""
        self.read |= {key, other}
        values = [self.raw.get(name) for name in (key, other)]
        if None not in values and (values[0] != values[1] or type(values[0]) is not type(values[1])):
            both = f"key {key} = {shown(values[0])} contradicts {other} = {shown(values[1])}"
            raise CheckpointError(self.path, both)
        return other if values[0] is None and values[1] is not None else key


@dataclass(frozen=True)
class _Family:
    """`router(keys)` gives the spec fields that this family spells its own way; `layer_rule(keys)` gives the test
    whether a layer is MoE. `classes`: how their names in `architectures` begin, before ForCausalLM and the like."""

    classes: tuple[str, ...]
    router: Callable[[_Keys], dict[str, Any]]
    layer_rule: Callable[[_Keys], Callable[[int], bool]]


def _family(raw: Mapping[str, Any], path: Path | str) -> _Family:
    inner = raw.get("text_config")
    nested = inner.get("model_type") if isinstance(inner, dict) else None
    model_type = _Keys(raw, path).get("model_type", str)
    what = f"model_type {shown(model_type)} in {path}"
    if nested is not None or (inner and model_type in _FAMILIES):
        raise UnsupportedError(
            what,
            [f"its text_config is of model_type {shown(nested)}; models inside of others are not read"],
            MODEL_TYPES,
        )
    if model_type not in _FAMILIES:
        raise UnsupportedError(what, ["its layout is not known"], MODEL_TYPES)
    family = _FAMILIES[model_type]
    named = raw.get("architectures") or []
    own = re.compile(f"({'|'.join(family.classes)})(For[A-Z][A-Za-z0-9]*|Model)")
    if not isinstance(named, list) or not all(isinstance(name, str) and own.fullmatch(name) for name in named):
        legal = [*(f"{name}ForCausalLM and the like" for name in family.classes), "no architectures"]
        raise UnsupportedError(what, [f"its architectures {shown(named)} are another model's"], legal)
    return family


def _only(keys: _Keys, key: str, supported: tuple[str, ...], default: str | None = None) -> str:
    value = keys.get(key, str, default)
    if value not in supported:
        raise UnsupportedError(f"{key} {shown(value)} in {keys.path}", ["nothing here computes it"], supported)
    return value


def _deepseek_router(keys: _Keys) -> dict[str, Any]:
    _only(keys, "topk_method", ("noaux_tc",), "noaux_tc")
    _only(keys, "scoring_func", ("sigmoid",), "sigmoid")
    width = keys.integer("moe_intermediate_size", least=1, most=MOST["size"])
    return {
        "num_experts": keys.integer(keys.either("n_routed_experts", "num_local_experts"), least=1),
        "scoring": "sigmoid",
        "correction_bias": True,
        "num_groups": keys.integer("n_group", least=1),
        "top_groups": keys.integer("topk_group", least=1),
        "routed_scaling": keys.number("routed_scaling_factor", LEAST_SCALING, MOST_SCALING),
        "shared_intermediate": keys.integer("n_shared_experts", 0, most=MOST["size"] // width) * width,
    }


def _deepseek_layers(keys: _Keys) -> Callable[[int], bool]:
    dense, every = keys.integer("first_k_dense_replace"), keys.integer("moe_layer_freq", 1, least=1)
    return lambda layer: layer >= dense and layer % every == 0


def _qwen3_router(keys: _Keys) -> dict[str, Any]:
    """transformers 5 writes the number of experts as num_local_experts."""
    number = keys.either("num_experts", "num_local_experts")
    return {"num_experts": keys.integer(number, least=1), "scoring": "softmax"}


def _qwen3_layers(keys: _Keys) -> Callable[[int], bool]:
    listed, every = keys.get("mlp_only_layers", list, []), keys.integer("decoder_sparse_step", 1, least=1)
    if not all(type(layer) is int for layer in listed):
        raise CheckpointError(keys.path, f"key mlp_only_layers = {shown(listed)} must hold layer numbers")
    dense = frozenset(listed)
    return lambda layer: layer not in dense and (layer + 1) % every == 0


_FAMILIES = {
    "deepseek_v3": _Family(("DeepseekV3",), _deepseek_router, _deepseek_layers),
    "kimi_k2": _Family(("DeepseekV3", "KimiK2"), _deepseek_router, _deepseek_layers),
    "qwen3_moe": _Family(("Qwen3Moe",), _qwen3_router, _qwen3_layers),
}
MODEL_TYPES = tuple(_FAMILIES)


def _activation(keys: _Keys) -> dict[str, Any]:
    return {"activation": HIDDEN_ACTS[_only(keys, "hidden_act", tuple(HIDDEN_ACTS))]}


def _dtype(keys: _Keys) -> Literal["bf16", "fp32"] | None:
    """Of weights that are not quantized; transformers 5 renamed the key."""
    written = keys.either("dtype", "torch_dtype")
    if keys.raw.get(written) is None:
        return None
    return DTYPES[_only(keys, written, tuple(DTYPES))]
