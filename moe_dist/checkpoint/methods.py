"""How the sections of the quantization methods say what is stored, as a scheme or as reasons why it is not read: `fp8`
(DeepSeek's and transformers' own), `compressed-tensors` (llm-compressor), ModelOpt and `mxfp4` (gpt-oss).

A key or a value that is not known to change nothing is a reason. Sources: quantizer_finegrained_fp8.py of transformers,
quant_args.py of compressed-tensors, hf_quant_config.json of ModelOpt, and what vLLM's loaders make of them
(model_executor/layers/quantization/).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from moe_dist.checkpoint.folder import shown
from moe_dist.checkpoint.scheme import FP8_BLOCKS, MXFP4, Scheme
from moe_dist.model.spec import BLOCK

EXCEPTIONS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
KV_CACHE = ("kv_cache_quant_algo", "kv_cache_scheme", "kv_cache_dtype")  # no business of the experts
STATIC = Scheme("fp8_tensor_static", "tensor", "_scale")
# Beside quant_method and weight_block_size, the keys of fp8 and the values that leave the format what it is. A
# scale_fmt of ue8m0 (DeepSeek-V3.1) does: the stored scales are plain numbers all the same, and activation scales in
# float32 are only finer than the powers of two it asks for.
OF_FP8: dict[str, tuple[object, ...]] = {
    "activation_scheme": ("dynamic",),
    "fmt": ("e4m3", "e4m3fn", "float8_e4m3fn"),
    "scale_fmt": ("ue8m0", "float32"),
    "weight_per_tensor": (False,),
    "act_per_tensor": (False,),
    "is_checkpoint_fp8_serialized": (True,),
    "dequantize": (False,),
    "kv_cache_scheme": (),
    "_load_in_8bit": (False,),
    "_load_in_4bit": (False,),
}
OF_COMPRESSED: dict[str, tuple[object, ...]] = {
    "quant_method": ("compressed-tensors",),
    "format": ("float-quantized",),
    "quantization_status": ("compressed",),
    "sparsity_config": ({}, {"format": "dense"}),
    "transform_config": ({},),
}
OF_GROUP: dict[str, tuple[object, ...]] = {"targets": (["Linear"],), "format": ("float-quantized",)}
OF_NUMBERS: dict[str, tuple[object, ...]] = {"num_bits": (8,), "type": ("float",), "symmetric": (True,)}
ANYTHING = ("observer", "observer_kwargs", "zp_dtype")  # how scales were found; symmetric numbers have no zero point
# What is computed: what of the weights has a scale, what of the activations, and whether that is found as they come.
# One number for a matrix is the same as that number for each row.
COMPUTED = {
    ("tensor", "tensor", False): STATIC,
    ("tensor", "tensor", True): Scheme("fp8_tensor_dynamic", "tensor", "_scale"),
    ("tensor", "token", True): Scheme("fp8_channel", "tensor", "_scale"),
    ("channel", "token", True): Scheme("fp8_channel", "channel", "_scale"),
    ("block", "group", True): Scheme("fp8_block", "block", "_scale"),
}


@dataclass(frozen=True)
class Method:
    """`scheme` is what counts if there are no `reasons` against it."""

    reasons: tuple[str, ...]
    scheme: Scheme = FP8_BLOCKS


def fp8(found: Mapping[str, Any]) -> Method:
    """Blocks of 128×128, or one scale for each matrix and one for its input. Without a static one for the input
    libraries differ in what has a scale of its own."""
    static = found.get("weight_block_size") is None and found.get("activation_scheme") == "static"
    reasons = []
    if not static and (blocks := found.get("weight_block_size")) != [BLOCK, BLOCK]:
        reasons.append(f"weight_block_size is {shown(blocks)}")
    known = OF_FP8 | ({"activation_scheme": ("static",)} if static else {})
    reasons += _strange(found, known, ("quant_method", "weight_block_size", *EXCEPTIONS))
    return Method(tuple(reasons), STATIC if static else FP8_BLOCKS)


def mxfp4(found: Mapping[str, Any]) -> Method:
    """gpt-oss's own; which modules it takes in is all that it says."""
    return Method(tuple(_strange(found, {"dequantize": (False,)}, ("quant_method", *EXCEPTIONS))), MXFP4)


def modelopt(keys: Mapping[str, Any]) -> Method:
    """Its FP8 has one scale for each matrix and one for its input."""
    algorithm = keys.get("quant_algo")
    reasons = []
    if algorithm != "FP8":
        of_group = keys.get("group_size")
        reasons.append(
            f"quant_algo is {shown(algorithm)}" + (f" with group_size {shown(of_group)}" if of_group else "")
        )
        return Method(tuple(reasons))
    free = ("quant_algo", "quantization", "producer", "quant_method", "config_groups", *EXCEPTIONS, *KV_CACHE)
    reasons += _strange(keys, {}, free)
    if keys.get("config_groups") is not None:
        scheme, more = _groups(keys["config_groups"])
        reasons += more or ([] if scheme == STATIC else [f"config_groups {shown(keys['config_groups'])} are not FP8's"])
    return Method(tuple(reasons), STATIC)


def compressed_tensors(found: Mapping[str, Any]) -> Method:
    free = ("config_groups", "global_compression_ratio", "version", *EXCEPTIONS, *KV_CACHE)
    scheme, reasons = _groups(found.get("config_groups"))
    reasons += _strange(found, OF_COMPRESSED, free)
    if found.get("format") is None:
        reasons.append("format is None")
    return Method((said_of(found), *reasons) if reasons else (), scheme or FP8_BLOCKS)


def _groups(groups: object) -> tuple[Scheme | None, list[str]]:
    """One group for all linear layers: which scheme its numbers make, or why none."""
    if not isinstance(groups, dict) or len(groups) != 1:
        return None, [f"config_groups is {shown(groups)}, and one group is read"]
    group = next(iter(groups.values()))
    if not isinstance(group, dict):
        return None, [f"its group is {shown(group)}"]
    numbers = {name: group.get(name) for name in ("weights", "input_activations")}
    reasons = _strange(group, OF_GROUP, tuple(numbers))
    for name, said in numbers.items():
        if not isinstance(said, dict):
            reasons.append(f"{name} is {shown(said)}")
            continue
        own: dict[str, tuple[object, ...]] = {"actorder": (), "scale_dtype": ()}
        if name == "weights":
            own |= {"dynamic": (False,), "block_structure": ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}")}
        else:
            own |= {"group_size": (BLOCK,)}
        missing = [f"{name}: {key} is None" for key in ("num_bits", "type") if said.get(key) is None]
        free = ("strategy", *(("dynamic",) if name == "input_activations" else ()), *ANYTHING)
        reasons += [f"{name}: {reason}" for reason in _strange(said, OF_NUMBERS | own, free)] + missing
    if reasons:
        return None, reasons
    weights, inputs = numbers["weights"] or {}, numbers["input_activations"] or {}
    grains = (weights.get("strategy") or "tensor", inputs.get("strategy") or "tensor", inputs.get("dynamic") or False)
    blocks = weights.get("block_structure") is not None and inputs.get("group_size") is not None
    plain = isinstance(grains[0], str) and isinstance(grains[1], str) and isinstance(grains[2], bool)
    scheme = COMPUTED.get(grains) if plain else None
    if scheme is None or (scheme.grain == "block") != blocks:
        weights_, inputs_, dynamic = map(shown, grains)
        return None, [f"weights by {weights_} and activations by {inputs_}, dynamic {dynamic}, are not computed"]
    return scheme, []


def _strange(found: Mapping[str, Any], known: Mapping[str, tuple[object, ...]], free: Collection[str]) -> list[str]:
    """Reasons against keys that are not `known`, and values that are not those there; `free` ones say anything."""
    reasons = []
    for key, value in found.items():
        if key in free or value is None:
            continue
        if key not in known:
            reasons.append(f"key {shown(key)} = {shown(value)} is not known")
        elif not any(value == fine and type(value) is type(fine) for fine in known[key]):
            reasons.append(f"{key} is {shown(value)}")
    return reasons


def said_of(found: Mapping[str, Any]) -> str:
    """What a section says of itself, in one line."""
    parts = [f"quant_method is {shown(found.get('quant_method'))}"]
    parts += [f"{key} is {shown(found[key])}" for key in ("format", "bits", "quant_type", "fmt") if key in found]
    groups = found.get("config_groups")
    if isinstance(groups, dict):
        for group in groups.values():
            weights = group.get("weights") if isinstance(group, dict) else None
            if isinstance(weights, dict):
                said = [f"{key} {shown(weights.get(key))}" for key in ("num_bits", "type", "strategy")]
                parts.append("weights have " + ", ".join(said))
    return ", ".join(parts[:6])
