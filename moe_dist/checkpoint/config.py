"""A Hugging Face config.json as a MoESpec, and which layers of the model are MoE layers.

Keys that decide a number are required. Optional are those that some writers leave out because the model family knows
only one value: topk_method, scoring_func, moe_layer_freq, n_shared_experts, mlp_only_layers, decoder_sparse_step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from moe_dist.errors import CheckpointError, ConfigError, UnsupportedError
from moe_dist.spec import BLOCK, MoESpec

CONFIG_FILE = "config.json"
HIDDEN_ACTS = {"silu": "swiglu"}
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
QUANTIZATIONS = (
    f"quant_method fp8 with weight_block_size [{BLOCK}, {BLOCK}], fmt e4m3 and activation_scheme dynamic",
    "no quantization_config (bf16, fp32)",
)

T = TypeVar("T")


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says about the experts. `moe_layers` are ascending layer numbers below `num_layers`; a
    multi-token-prediction layer after the last one is not counted. `path` is the file itself."""

    path: Path
    model_type: str
    spec: MoESpec
    num_layers: int
    moe_layers: tuple[int, ...]

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
    wrong type, values that contradict each other) or UnsupportedError (another model type, activation, router or
    quantization)."""
    path = Path(directory) / CONFIG_FILE
    raw = read_json(path)
    spec = spec_from_config(raw, path, name=path.parent.resolve().name)
    family = _family(raw, path)
    keys = _Keys(raw, path)
    num_layers = keys.integer("num_hidden_layers")
    is_moe = family.layer_rule(keys)
    moe_layers = tuple(layer for layer in range(num_layers) if is_moe(layer))
    if not moe_layers:
        raise CheckpointError(path, f"none of its {num_layers} layers has experts")
    return ModelConfig(path, keys.get("model_type", str), spec, num_layers, moe_layers)


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file, or CheckpointError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(path, "no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"can't be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(path, f"holds a JSON {type(found).__name__} where an object belongs")
    return found


def spec_from_config(raw: Mapping[str, Any], path: Path | str = CONFIG_FILE, name: str = "custom") -> MoESpec:
    """The MoE layer that the content of a config.json describes; `path` is for error messages.

    A shared expert's width is in `shared_intermediate`; `shared_experts` stays "none" until the user asks for it.
    Raises like `read_config`.
    """
    family, keys = _family(raw, path), _Keys(raw, path)
    fields = family.router(keys) | _format(keys) | _activation(keys)
    try:
        return MoESpec(
            name=name,
            hidden=keys.integer("hidden_size"),
            intermediate=keys.integer("moe_intermediate_size"),
            top_k=keys.integer("num_experts_per_tok"),
            renormalize=keys.get("norm_topk_prob", bool),
            **fields,
        )
    except ConfigError as error:
        raise CheckpointError(path, f"describes no layer that can work: {error}") from error


class _Keys:
    """The keys of a config.json, each checked for presence and type. A null counts as absent."""

    def __init__(self, raw: Mapping[str, Any], path: Path | str) -> None:
        self.raw, self.path = raw, path

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(self.path, f"key {key} is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(self.path, f"key {key} = {value!r} is no {kind.__name__}")
        return value

    def integer(self, key: str, default: int | None = None, least: int = 0) -> int:
        value = self.get(key, int, default)
        if value < least:
            raise CheckpointError(self.path, f"key {key} = {value} must be {least} or more")
        return value

    def number(self, key: str) -> float:
        is_integer = isinstance(self.raw.get(key), int) and not isinstance(self.raw.get(key), bool)
        return float(self.get(key, int)) if is_integer else self.get(key, float)


@dataclass(frozen=True)
class _Family:
    """`router(keys)` gives the spec fields that this family spells its own way; `layer_rule(keys)` gives the test
    whether a layer is MoE."""

    router: Callable[[_Keys], dict[str, Any]]
    layer_rule: Callable[[_Keys], Callable[[int], bool]]


def _family(raw: Mapping[str, Any], path: Path | str) -> _Family:
    model_type = _Keys(raw, path).get("model_type", str)
    if model_type not in _FAMILIES:
        raise UnsupportedError(f"model_type {model_type!r} in {path}", ["its layout is not known"], MODEL_TYPES)
    return _FAMILIES[model_type]


def _only(keys: _Keys, key: str, supported: tuple[str, ...], default: str | None = None) -> str:
    value = keys.get(key, str, default)
    if value not in supported:
        raise UnsupportedError(f"{key} {value!r} in {keys.path}", ["nothing here computes it"], supported)
    return value


def _deepseek_router(keys: _Keys) -> dict[str, Any]:
    _only(keys, "topk_method", ("noaux_tc",), "noaux_tc")
    _only(keys, "scoring_func", ("sigmoid",), "sigmoid")
    shared = keys.integer("n_shared_experts", 0) * keys.integer("moe_intermediate_size")
    return {
        "num_experts": keys.integer("n_routed_experts"),
        "scoring": "sigmoid",
        "correction_bias": True,
        "num_groups": keys.integer("n_group"),
        "top_groups": keys.integer("topk_group"),
        "routed_scaling": keys.number("routed_scaling_factor"),
        "shared_intermediate": shared,
    }


def _deepseek_layers(keys: _Keys) -> Callable[[int], bool]:
    dense, every = keys.integer("first_k_dense_replace"), keys.integer("moe_layer_freq", 1, least=1)
    return lambda layer: layer >= dense and layer % every == 0


def _qwen3_router(keys: _Keys) -> dict[str, Any]:
    return {"num_experts": keys.integer("num_experts"), "scoring": "softmax"}


def _qwen3_layers(keys: _Keys) -> Callable[[int], bool]:
    dense, every = keys.get("mlp_only_layers", list, []), keys.integer("decoder_sparse_step", 1, least=1)
    return lambda layer: layer not in dense and (layer + 1) % every == 0


_FAMILIES = {
    "deepseek_v3": _Family(_deepseek_router, _deepseek_layers),
    "kimi_k2": _Family(_deepseek_router, _deepseek_layers),
    "qwen3_moe": _Family(_qwen3_router, _qwen3_layers),
}
MODEL_TYPES = tuple(_FAMILIES)


def _activation(keys: _Keys) -> dict[str, Any]:
    return {"activation": HIDDEN_ACTS[_only(keys, "hidden_act", tuple(HIDDEN_ACTS))]}


def _format(keys: _Keys) -> dict[str, Any]:
    """`quant` and `dtype`. A scale_fmt of ue8m0 (DeepSeek-V3.1) is let pass: the stored scales are plain numbers all
    the same, and activation scales in float32 are only finer than the powers of two it asks for."""
    if keys.raw.get("quantization_config") is None:
        written = "dtype" if keys.raw.get("dtype") is not None else "torch_dtype"  # transformers 5 renamed it
        return {"quant": "none", "dtype": DTYPES[_only(keys, written, tuple(DTYPES), "bfloat16")]}
    found = keys.get("quantization_config", dict)
    wanted = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    wanted |= {key: value for key, value in (("fmt", "e4m3"), ("activation_scheme", "dynamic")) if key in found}
    reasons = [f"{key} is {found.get(key)!r}" for key, value in wanted.items() if found.get(key) != value]
    if reasons:
        raise UnsupportedError(f"quantization_config in {keys.path}", reasons, QUANTIZATIONS)
    return {"quant": "fp8_block"}
