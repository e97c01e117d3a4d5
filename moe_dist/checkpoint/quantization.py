"""Which modules of a model are quantized, and how: `quantization_config` of config.json, and hf_quant_config.json.

`methods.py` says what of that is read. Everything else is refused with what was found, and so is a key or a value that
is not known to change nothing: it may say how the numbers are to be read. A layer that the list of exceptions takes out
is not quantized, whatever the rest is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_dist.checkpoint import methods
from moe_dist.checkpoint.folder import CONFIG_LIMIT, exists, read_json, shown
from moe_dist.checkpoint.graphs import MOST_WORK, TooMuchWork
from moe_dist.checkpoint.methods import EXCEPTIONS, KV_CACHE, Method
from moe_dist.checkpoint.patterns import Pattern
from moe_dist.checkpoint.scheme import FP8_BLOCKS, Scheme
from moe_dist.errors import CheckpointError, UnsupportedError
from moe_dist.model.spec import BLOCK

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FUSED = ("gate_up_proj", "down_proj")
CONFIG_FILE = "config.json"
SECTION = "quantization_config"
MODELOPT_FILE = "hf_quant_config.json"
OTHER_FILES = ("quantize_config.json", "quant_config.json")  # GPTQ's and AWQ's own
FOREIGN_FILES = {
    "quantization_config.json": "it says outside of config.json how numbers are stored",
    "quant_model_description.json": "it says of each tensor how ModelSlim has quantized it",
    **dict.fromkeys(
        ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
        "an adapter changes the weights, and libraries put it on top of them",
    ),
}
READ = (
    f"quant_method fp8 with weight_block_size [{BLOCK}, {BLOCK}], fmt e4m3 and activation_scheme dynamic",
    "quant_method fp8 without weight_block_size, activation_scheme static",
    "compressed-tensors float-quantized by tensor, channel or block",
    "ModelOpt's FP8",
    "quant_method mxfp4 of model_type gpt_oss",
    "no quantization_config (bf16, fp32)",
)
MOST_PATTERNS = 1_000  # ModelOpt has one for each layer and module at most


@dataclass(frozen=True)
class Exceptions:
    """Modules that are not quantized. An entry is the dotted name of a module or a run of its parts, which covers what
    is below it too (`lm_head`, `model.layers.1.mlp.experts`, `mlp.experts`), `re:` and a pattern that must match from
    the start of the name, as compressed-tensors has it, or a name with `*`, as ModelOpt has it."""

    names: frozenset[str] = frozenset()
    patterns: tuple[Pattern, ...] = ()
    path: Path | str = CONFIG_FILE

    @classmethod
    def parse(cls, entries: Iterable[Any], where: str, path: Path | str) -> Exceptions:
        names: set[str] = set()
        patterns: list[Pattern] = []
        entries = list(entries)
        count = sum(isinstance(entry, str) and _is_pattern(entry) for entry in entries)
        if count > MOST_PATTERNS:
            raise CheckpointError(path, f"{where} holds {count:,} patterns, at most {MOST_PATTERNS:,} are read")
        for entry in entries:
            if not isinstance(entry, str) or not entry.strip("."):
                raise CheckpointError(path, f"{where} holds {shown(entry)}, which is no name of a module")
            try:
                if entry.startswith("re:"):
                    patterns.append(Pattern.parse(entry.removeprefix("re:")))
                elif _is_pattern(entry):
                    patterns.append(Pattern.glob(entry.strip(".")))
                else:
                    names.add(entry.strip(".").removesuffix(".weight"))
            except (re.error, OverflowError, RecursionError) as error:
                raise CheckpointError(path, f"{where} holds {shown(entry)}, no pattern: {error}") from None
        found = cls(frozenset(names), tuple(patterns), path)
        try:
            _ = found._any
        except re.error as error:
            raise CheckpointError(path, f"{where} is too much: {error}") from None
        return found

    @property
    def empty(self) -> bool:
        return not self.names and not self.patterns

    @cached_property
    def _any(self) -> Pattern:
        return Pattern.any_of(list(self.patterns))

    def cover(self, module: str) -> bool:
        """Raises TooMuchWork where the patterns take too long for all that was asked."""
        parts = module.split(".")
        runs = (".".join(parts[a:b]) for a in range(len(parts)) for b in range(a + 1, len(parts) + 1))
        return any(run in self.names for run in runs) or (bool(self.patterns) and self._any.matches(module))


def _is_pattern(entry: str) -> bool:
    return entry.startswith("re:") or any(sign in entry for sign in "*?[")


@dataclass(frozen=True)
class Quantization:
    """One section that quantizes modules, and how: by `scheme` if `reasons` is empty, else as these say."""

    where: str
    reasons: tuple[str, ...]
    exceptions: Exceptions
    supported: tuple[str, ...] = READ
    scheme: Scheme = FP8_BLOCKS
    _found: dict[tuple[str, int], bool] = field(default_factory=dict, repr=False, compare=False)

    def refuse(self) -> None:
        if self.reasons:
            raise UnsupportedError(self.where, self.reasons, self.supported)

    def converts(self, prefix: str, experts: int, matrices: tuple[str, ...] = PROJECTIONS) -> bool:
        """Whether the `experts` experts `prefix`.0 and so on are quantized, whose `matrices` are modules of theirs, or
        fused ones, which are listed as `prefix`.gate_up_proj and .down_proj; UnsupportedError if only some are,
        CheckpointError where the list is too much work. A layer is looked up once."""
        if (prefix, experts) not in self._found:
            try:
                self._found[prefix, experts] = self._converts(prefix, experts, matrices)
            except TooMuchWork:
                listed = f"{len(self.exceptions.patterns):,} patterns for {experts * len(matrices):,} modules"
                problem = f"{self.where} lists {listed} of {prefix}, which takes more than {MOST_WORK:,} steps"
                raise CheckpointError(self.exceptions.path, problem) from None
        return self._found[prefix, experts]

    def _converts(self, prefix: str, experts: int, matrices: tuple[str, ...]) -> bool:
        if self.exceptions.empty or self.exceptions.cover(prefix):
            return self.exceptions.empty
        if all(self.exceptions.cover(f"{prefix}.{name}") for name in FUSED):
            return False
        modules = [f"{prefix}.{expert}.{name}" for expert in range(experts) for name in matrices]
        kept = {module for module in modules if self.exceptions.cover(module)}
        if kept and len(kept) < len(modules):
            converted = next(module for module in modules if module not in kept)
            reason = f"it converts {converted} but not {min(kept)}: the experts of a layer must have one format"
            raise UnsupportedError(self.where, [reason])
        return not kept


def read_quantizations(raw: Mapping[str, Any], path: Path | str) -> tuple[Quantization, ...]:
    """The section of a config.json, none if it has none. Raises CheckpointError for what is no section at all and
    UnsupportedError for keys that hint at a quantization in a place that is not known."""
    strange = [key for key, value in raw.items() if _hints(key) and key != SECTION and value is not None]
    if strange:
        reason = f"key {shown(strange[0])} may say how numbers are stored"
        raise UnsupportedError(f"a quantization in {path}", [reason], READ)
    found = raw.get(SECTION)
    if found is None:
        return ()
    if not isinstance(found, dict):
        raise CheckpointError(path, f"key {SECTION} = {shown(found)} is no dict")
    where = f"{SECTION} in {path}"
    method = found.get("quant_method")
    if method != "fp8" and "quant_algo" in _flat(found):
        return _modelopt(found, where, path)
    known = {"fp8": methods.fp8, "compressed-tensors": methods.compressed_tensors, "mxfp4": methods.mxfp4}
    read = known[method](found) if isinstance(method, str) and method in known else Method((methods.said_of(found),))
    return (Quantization(where, read.reasons, _exceptions(found, path), scheme=read.scheme),)


def read_other_files(directory: Path) -> tuple[Quantization, ...]:
    """What the files beside config.json say of quantization. A recipe.yaml is only the story of how it was done."""
    for name in OTHER_FILES:
        if exists(directory, name):
            found = read_json(directory, name, CONFIG_LIMIT)
            reason = f"its weights have {shown(found.get('bits', found.get('w_bit')))} bits"
            raise UnsupportedError(f"the quantization in {directory / name}", [reason], READ)
    for name, reason in FOREIGN_FILES.items():
        if exists(directory, name):
            raise UnsupportedError(f"{directory / name} beside the weights", [reason], [f"no {name}"])
    if not exists(directory, MODELOPT_FILE):
        return ()
    path = directory / MODELOPT_FILE
    found = dict(read_json(directory, MODELOPT_FILE, CONFIG_LIMIT))
    if not isinstance(found.get("quantization"), dict):
        raise CheckpointError(path, f"key quantization = {shown(found.get('quantization'))} is no dict")
    return _modelopt(found, f"the quantization in {path}", path)


def _hints(key: str) -> bool:
    return "quant" in key.lower() or key in ("compression_config", "sparsity_config")


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    """ModelOpt's keys stand in the section, or in `quantization` in it."""
    inner = found.get("quantization")
    return {**found, **inner} if isinstance(inner, dict) else dict(found)


def _modelopt(found: Mapping[str, Any], where: str, path: Path | str) -> tuple[Quantization, ...]:
    """ModelOpt quantizes nothing, or nothing but the KV cache, where its quant_algo is null."""
    keys = _flat(found)
    if "quant_algo" not in keys:
        raise UnsupportedError(where, [f"it says nothing of quant_algo, but {shown(sorted(keys))}"], READ)
    if keys["quant_algo"] is not None:
        read = methods.modelopt(keys)
        return (Quantization(where, read.reasons, _exceptions(keys, path), scheme=read.scheme),)
    known = ("quant_algo", "quantization", "producer", "quant_method", "group_size", *EXCEPTIONS, *KV_CACHE)
    strange = [key for key, value in keys.items() if key not in known and value not in (None, {}, [])]
    if strange:
        raise UnsupportedError(where, [f"key {shown(strange[0])} = {shown(keys[strange[0]])} is not known"], READ)
    return ()


def _exceptions(found: Mapping[str, Any], path: Path | str) -> Exceptions:
    entries: list[Any] = []
    for key in EXCEPTIONS:
        listed = found.get(key)
        if listed is None:
            continue
        if not isinstance(listed, list):
            raise CheckpointError(path, f"key {key} = {shown(listed)} is no list")
        entries += listed
    return Exceptions.parse(entries, " and ".join(key for key in EXCEPTIONS if found.get(key) is not None), path)
