"""A Hugging Face config.json as a MoESpec, and which layers of the model are MoE layers. `families.py` says what each
model family's keys mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from moe_dist.checkpoint.families import FAMILIES, MODEL_TYPES, REFUSED, WRAPPERS, Family
from moe_dist.checkpoint.folder import CONFIG_LIMIT, folder, model_name, read_json, shown
from moe_dist.checkpoint.keys import Keys
from moe_dist.checkpoint.names import Names
from moe_dist.checkpoint.neutral import refuse_unread
from moe_dist.checkpoint.quantization import CONFIG_FILE, Quantization, read_other_files, read_quantizations
from moe_dist.checkpoint.scheme import MXFP4
from moe_dist.errors import CheckpointError, ConfigError, MoeDistError, UnsupportedError
from moe_dist.messages.counts import count_of
from moe_dist.model.spec import MoESpec

DTYPES: dict[str, Literal["bf16", "fp32"]] = {"bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class ModelConfig:
    """What the files beside the weights say about the experts.

    `spec` is a layer as the model's quantization makes it, or, where nothing here reads that, a layer it leaves out.
    `layer_spec` tells of one layer. `moe_layers` are ascending layer numbers below `num_layers`; a
    multi-token-prediction layer after the last one is not counted. `dtype`: of weights that are not quantized, None if
    config.json does not say it. `path` is config.json. `names`: of the tensors on disk.
    """

    path: Path
    model_type: str
    spec: MoESpec
    num_layers: int
    moe_layers: tuple[int, ...]
    dtype: Literal["bf16", "fp32"] | None = None
    quantizations: tuple[Quantization, ...] = ()
    names: Names = field(default_factory=Names)

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
        found = self._converting(layer, experts)
        if found is None:
            return _with_format(self.spec, "none", self.dtype or "bf16")
        if self.dtype == "fp32":
            reason = "quantized experts work on bf16 activations, and its dtype is float32"
            raise UnsupportedError(f"the model in {self.path}", [reason])
        return _with_format(self.spec, found.scheme.kind, "bf16")

    def _converting(self, layer: int, experts: int) -> Quantization | None:
        prefix, matrices = self.names.experts(layer), tuple(self.names.matrices.values())
        converting = [found for found in self.quantizations if found.converts(prefix, experts, matrices)]
        for found in converting:
            found.refuse()
        leaving = [found for found in self.quantizations if found not in converting]
        if converting and leaving:
            both = f"{converting[0].where} quantizes the experts of layer {layer}, {leaving[0].where} leaves them out"
            raise CheckpointError(self.path, both)
        if len({found.scheme for found in converting}) > 1:
            both = f"{converting[0].where} and {converting[1].where} quantize layer {layer} in two ways"
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
        rule = f"the model has {count_of(self.num_layers, 'layer')}, counted from 0"
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
    model = _Model.of(read_json(directory, CONFIG_FILE, CONFIG_LIMIT), path)
    sparse = model.family.layers(model.keys)
    moe_layers = tuple(layer for layer, moe in enumerate(sparse) if moe)
    if not moe_layers:
        raise CheckpointError(path, f"none of its {count_of(len(sparse), 'layer')} has experts")
    quantizations = model.quantizations() + read_other_files(directory)
    spec = model.spec(model_name(directory))
    model.refuse_unread(spec, sparse)
    config = ModelConfig(
        path, model.model_type, spec, len(sparse), moe_layers, model.dtype(), quantizations, model.family.names
    )
    return replace(config, spec=config.typical())


def spec_from_config(raw: Mapping[str, Any], path: Path | str = CONFIG_FILE, name: str = "custom") -> MoESpec:
    """The MoE layer that the content of a config.json describes, if no list takes it out of the quantization; `path` is
    for error messages.

    A shared expert's width is in `shared_intermediate`; `shared_experts` stays "none" until the user asks for it.
    Raises like `read_config`.
    """
    model = _Model.of(raw, path)
    spec, quantizations = model.spec(name), model.quantizations()
    model.refuse_unread(spec, None)
    for found in quantizations:
        found.refuse()
    return _with_format(spec, quantizations[0].scheme.kind, "bf16") if quantizations else spec


def _with_format(spec: MoESpec, quant: str, dtype: str) -> MoESpec:
    changed: MoESpec = spec.with_changes(quant=quant, dtype=dtype)
    return changed


@dataclass(frozen=True)
class _Model:
    """A config.json and its family. `keys` are those of the model with the experts, `outer` those of the one around it,
    if there is one."""

    model_type: str
    family: Family
    keys: Keys
    outer: Keys | None

    @classmethod
    def of(cls, raw: Mapping[str, Any], path: Path | str) -> _Model:
        keys = Keys(raw, path)
        model_type = keys.get("model_type", str)
        what = f"model_type {shown(model_type)} in {path}"
        if model_type in REFUSED:
            raise UnsupportedError(what, [REFUSED[model_type]], MODEL_TYPES)
        if model_type in WRAPPERS:
            return cls._inside(keys, model_type, what)
        inner = raw.get("text_config")
        nested = inner.get("model_type") if isinstance(inner, dict) else None
        if nested is not None or (inner and model_type in FAMILIES):
            reason = f"its text_config is of model_type {shown(nested)}; such models inside of others are not read"
            raise UnsupportedError(what, [reason], MODEL_TYPES)
        if model_type not in FAMILIES:
            raise UnsupportedError(what, ["its layout is not known"], MODEL_TYPES)
        family = FAMILIES[model_type]
        _check_classes(keys, family.classes, what)
        return cls(model_type, family, keys, None)

    @classmethod
    def _inside(cls, outer: Keys, model_type: str, what: str) -> _Model:
        wrapper = WRAPPERS[model_type]
        _check_classes(outer, wrapper.classes, what)
        keys = Keys(outer.get("text_config", dict), f"text_config of {outer.path}")
        inside = keys.get("model_type", str)
        what = f"model_type {shown(inside)} in {keys.path}"
        if inside not in wrapper.inside:
            raise UnsupportedError(what, [f"it is not known inside of {model_type}"], tuple(wrapper.inside))
        family = wrapper.inside[inside]
        _check_classes(keys, family.classes, what)
        names = replace(family.names, root=wrapper.root, beside=wrapper.beside)
        return cls(model_type, replace(family, names=names), keys, outer)

    def quantizations(self) -> tuple[Quantization, ...]:
        every = (self.keys, self.outer) if self.outer else (self.keys,)
        said = tuple(found for keys in every for found in read_quantizations(keys.raw, keys.path))
        if self.family.names.fused == "interleaved":
            return said
        reason = "quant_method is 'mxfp4', which is read as gpt-oss stores it"
        return tuple(replace(found, reasons=(reason,)) if found.scheme == MXFP4 else found for found in said)

    def spec(self, name: str) -> MoESpec:
        """The layer without its quantization."""
        keys, family = self.keys, self.family
        activation = keys.only(family.activation, tuple(family.activations))
        fields = family.fields(keys) | {"activation": family.activations[activation]}
        try:
            return MoESpec(
                name=name, hidden=keys.size("hidden_size"), quant="none", dtype=self.dtype() or "bf16", **fields
            )
        except ConfigError as error:
            raise CheckpointError(keys.path, f"describes no layer that can work: {error}") from error

    def dtype(self) -> Literal["bf16", "fp32"] | None:
        """Of weights that are not quantized; transformers 5 renamed the key."""
        said = [_dtype(keys) for keys in (self.keys, self.outer) if keys]
        found = [dtype for dtype in said if dtype]
        if found and found[0] != found[-1]:
            raise CheckpointError(self.keys.path, f"dtype {found[0]} contradicts {found[-1]} of the model around it")
        return found[0] if found else None

    def refuse_unread(self, spec: MoESpec, sparse: list[bool] | None) -> None:
        for keys in (self.keys, self.outer):
            if keys:
                refuse_unread(keys.raw, keys.read, spec, sparse, keys.path, self.family.neutral)


def _check_classes(keys: Keys, classes: tuple[str, ...], what: str) -> None:
    named = keys.raw.get("architectures") or []
    own = re.compile(f"({'|'.join(classes)})(For[A-Z][A-Za-z0-9]*|Model)")
    if not isinstance(named, list) or not all(isinstance(name, str) and own.fullmatch(name) for name in named):
        legal = [*(f"{name}ForCausalLM and the like" for name in classes), "no architectures"]
        raise UnsupportedError(what, [f"its architectures {shown(named)} are another model's"], legal)


def _dtype(keys: Keys) -> Literal["bf16", "fp32"] | None:
    written = keys.either("dtype", "torch_dtype")
    return None if keys.raw.get(written) is None else DTYPES[keys.only(written, tuple(DTYPES))]
