"""What the keys of each model family mean: the fields of its MoE layer, and which layers hold experts.

Keys, defaults and rules are those of the configuration and modeling files of transformers 5.24
(src/transformers/models/<model_type>/). Keys that decide a number are required, even where transformers has a default.
Optional are those that writers leave out because the family knows only one value.

Most functions give the fields of a MoESpec but for hidden, activation and the format; those named *_layers say of each
layer whether it holds experts. What nothing here computes is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_dist.checkpoint.folder import shown
from moe_dist.checkpoint.keys import MOST, Keys
from moe_dist.errors import CheckpointError, UnsupportedError
from moe_dist.messages.counts import count_of
from moe_dist.model.spec import LEAST_SCALING, MOST_SCALING
from moe_dist.model.weights import OAI_ALPHA, OAI_LIMIT

Fields = dict[str, Any]


def _sizes(
    keys: Keys,
    experts: tuple[str, str],
    width: str = "moe_intermediate_size",
    top_k: tuple[str, str] = ("num_experts_per_tok", "num_experts_per_tok"),
) -> Fields:
    """`experts`, `top_k`: two names of one key; transformers 5 writes some under another name than it reads."""
    return {
        "num_experts": keys.integer(keys.either(*experts), least=1),
        "intermediate": keys.size(width),
        "top_k": keys.integer(keys.either(*top_k), least=1),
    }


def _numbered(keys: Keys, moe: Callable[[int], bool]) -> list[bool]:
    count = keys.integer("num_hidden_layers", least=1, most=MOST["num_hidden_layers"])
    return [moe(layer) for layer in range(count)]


def _layer_numbers(keys: Keys, key: str) -> frozenset[int]:
    """Those that a list holds; none where it is absent."""
    listed = keys.get(key, list, [])
    if not all(type(layer) is int for layer in listed):
        raise CheckpointError(keys.path, f"key {key} = {shown(listed)} must hold layer numbers")
    return frozenset(listed)


def every_layer(keys: Keys) -> list[bool]:
    return _numbered(keys, lambda layer: True)


def _scaling(keys: Keys) -> float:
    return keys.number("routed_scaling_factor", LEAST_SCALING, MOST_SCALING)


def _shared_width(keys: Keys, key: str) -> int:
    """Of `key` shared experts side by side, each as wide as a routed one."""
    width = keys.size("moe_intermediate_size")
    return keys.integer(key, 0, most=MOST["size"] // width) * width


# DeepSeek


def _noaux(keys: Keys) -> Fields:
    """sigmoid with a correction bias in groups: DeepSeek-V3, GLM-4.5, Nemotron-H."""
    keys.only("topk_method", ("noaux_tc",), "noaux_tc")
    keys.only("scoring_func", ("sigmoid",), "sigmoid")
    return {
        "renormalize": keys.get("norm_topk_prob", bool),
        "scoring": "sigmoid",
        "correction_bias": True,
        "num_groups": keys.integer("n_group", least=1),
        "top_groups": keys.integer("topk_group", least=1),
        "routed_scaling": _scaling(keys),
    }


def deepseek_v3(keys: Keys) -> Fields:
    shared = {"shared_intermediate": _shared_width(keys, "n_shared_experts")}
    return _sizes(keys, ("n_routed_experts", "num_local_experts")) | _noaux(keys) | shared


def deepseek_v2(keys: Keys) -> Fields:
    """softmax, of all experts (greedy) or of those of the best groups. Where norm_topk_prob is true libraries differ:
    the model's own code leaves the scaling out then, others the normalizing."""
    method = keys.only("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    keys.only("scoring_func", ("softmax",), "softmax")
    keys.must("norm_topk_prob", False, "libraries differ in what it does to routed_scaling_factor in this family")
    groups = {"num_groups": "n_group", "top_groups": "topk_group"} if method == "group_limited_greedy" else {}
    if not groups:
        keys.read |= {"n_group", "topk_group"}
    return (
        _sizes(keys, ("n_routed_experts", "num_experts"))
        | {"scoring": "softmax", "renormalize": False, "routed_scaling": _scaling(keys)}
        | {ours: keys.integer(key, least=1) for ours, key in groups.items()}
        | {"shared_intermediate": _shared_width(keys, "n_shared_experts")}
    )


def dense_first(default: int | None = None) -> Callable[[Keys], list[bool]]:
    """`default`: how many dense layers there are where the config does not say it."""

    def layers(keys: Keys) -> list[bool]:
        dense = keys.integer("first_k_dense_replace", default)
        every = keys.integer("moe_layer_freq", 1, least=1) if type(keys.raw.get("moe_layer_freq")) is not list else 1
        return _numbered(keys, lambda layer: layer >= dense and layer % every == 0)

    return layers


# Qwen, and others whose router is a softmax


def softmax(keys: Keys) -> Fields:
    return _sizes(keys, ("num_experts", "num_local_experts")) | {
        "scoring": "softmax",
        "renormalize": keys.get("norm_topk_prob", bool),
    }


def _gated_shared(keys: Keys) -> Fields:
    """The shared expert's output is multiplied by a sigmoid of the token."""
    width = keys.integer("shared_expert_intermediate_size", most=MOST["size"])
    return {"shared_intermediate": width, "shared_gate": width > 0}


def qwen2_moe(keys: Keys) -> Fields:
    return softmax(keys) | _gated_shared(keys)


def always_normalized(keys: Keys) -> Fields:
    keys.must("norm_topk_prob", True, "this family always divides by the sum")
    return _sizes(keys, ("num_experts", "num_local_experts")) | {"scoring": "softmax", "renormalize": True}


def qwen3_5(keys: Keys) -> Fields:
    return always_normalized(keys) | _gated_shared(keys)


def qwen_layers(keys: Keys) -> list[bool]:
    dense, every = _layer_numbers(keys, "mlp_only_layers"), keys.integer("decoder_sparse_step", 1, least=1)
    return _numbered(keys, lambda layer: layer not in dense and (layer + 1) % every == 0)


def mixtral(keys: Keys) -> Fields:
    sizes = _sizes(keys, ("num_local_experts", "num_experts"), "intermediate_size")
    return sizes | {"scoring": "softmax", "renormalize": True}


def olmoe(keys: Keys) -> Fields:
    sizes = _sizes(keys, ("num_experts", "num_local_experts"), "intermediate_size")
    return sizes | {"scoring": "softmax", "renormalize": keys.get("norm_topk_prob", bool)}


def gpt_oss(keys: Keys) -> Fields:
    """The softmax of the top k logits, which have a bias, as experts do. Its activation, which config.json calls silu,
    is known with one limit and one alpha."""
    for key, value in (("swiglu_limit", OAI_LIMIT), ("swiglu_alpha", OAI_ALPHA)):
        keys.must(key, value, "this family's activation is computed with one value only")
    top_k = ("num_experts_per_tok", "experts_per_token")
    return _sizes(keys, ("num_local_experts", "num_experts"), "intermediate_size", top_k) | {
        "scoring": "softmax",
        "renormalize": True,
        "expert_bias": True,
        "router_bias": True,
    }


def minimax_m2(keys: Keys) -> Fields:
    keys.only("scoring_func", ("sigmoid",), "sigmoid")
    keys.must("use_routing_bias", True, "this family's router has a correction bias")
    sizes = _sizes(keys, ("num_local_experts", "num_experts"), "intermediate_size")
    return sizes | {"scoring": "sigmoid", "renormalize": True, "correction_bias": True}


# Llama 4


def llama4(keys: Keys) -> Fields:
    """A sigmoid of the one best logit, by which the token is multiplied before it goes into its expert. The shared
    expert is as wide as a routed one; the dense layers are intermediate_size_mlp wide."""
    sizes = _sizes(keys, ("num_local_experts", "num_local_experts"), "intermediate_size")
    reason = "experts' inputs are weighed, which is computed for one expert a token only"
    keys.must("num_experts_per_tok", 1, reason, needed=True)
    return sizes | {
        "scoring": "sigmoid",
        "renormalize": False,
        "weights_on_input": True,
        "shared_intermediate": sizes["intermediate"],
    }


def llama4_layers(keys: Keys) -> list[bool]:
    """Those that moe_layers lists, whatever interleave_moe_layer_step says beside it. Without a list the last one of
    each interleave_moe_layer_step layers."""
    every = keys.integer("interleave_moe_layer_step", 1, least=1)
    listed = _layer_numbers(keys, "moe_layers")
    if keys.raw.get("moe_layers") is not None:
        return _numbered(keys, lambda layer: layer in listed)
    return _numbered(keys, lambda layer: (layer + 1) % every == 0)


# ERNIE


def ernie(keys: Keys) -> Fields:
    """softmax; the top-k is that of score + bias."""
    keys.must("use_bias", False, "nothing here computes experts with biases")
    return (
        _sizes(keys, ("moe_num_experts", "num_experts"), top_k=("moe_k", "num_experts_per_tok"))
        | {"scoring": "softmax", "renormalize": True, "correction_bias": True}
        | {"shared_intermediate": _shared_width(keys, "moe_num_shared_experts")}
    )


def ernie_layers(keys: Keys) -> list[bool]:
    start, every = keys.integer("moe_layer_start_index"), keys.integer("moe_layer_interval", 1, least=1)
    end = keys.integer("moe_layer_end_index", -1, least=-1, most=MOST["num_hidden_layers"])
    last = MOST["num_hidden_layers"] if end == -1 else end
    return _numbered(keys, lambda layer: start <= layer <= last and (layer + 1) % every == 0)


# Nemotron-H

BLOCKS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
NEW_BLOCKS = {"linear_attention": "mamba", "full_attention": "attention"}


def nemotron_h(keys: Keys) -> Fields:
    latent = keys.raw.get("moe_latent_size")
    if latent is not None:
        reason = "its experts work on a projection of the tokens, and nothing here computes that"
        raise UnsupportedError(f"moe_latent_size {shown(latent)} in {keys.path}", [reason], ["no key moe_latent_size"])
    keys.must("n_shared_experts", 1, "the width of more than one is not clear in this family")
    width = keys.size("moe_shared_expert_intermediate_size")
    return _sizes(keys, ("n_routed_experts", "num_local_experts")) | _noaux(keys) | {"shared_intermediate": width}


def nemotron_layers(keys: Keys) -> list[bool]:
    """A layer is one block. Either name of the list counts; both must say the same."""
    pattern = list(keys.get("hybrid_override_pattern", str, ""))
    listed = keys.get("layers_block_type", list, [])
    found = [[BLOCKS.get(sign) for sign in pattern], [NEW_BLOCKS.get(str(name), name) for name in listed]]
    said = [blocks for blocks in found if blocks]
    if not said:
        raise CheckpointError(keys.path, "key hybrid_override_pattern is missing")
    if not all(block in BLOCKS.values() for blocks in said for block in blocks):
        value = shown("".join(pattern)) if pattern else shown(listed)
        raise CheckpointError(keys.path, f"its list of blocks {value} holds one that is not known")
    count = keys.integer("num_hidden_layers", len(said[0]), least=1, most=MOST["num_hidden_layers"])
    if said[0] != said[-1] or len(said[0]) != count:
        blocks = count_of(len(said[0]), "layer")
        problem = f"num_hidden_layers {count} and the lists of blocks, of {blocks}, contradict each other"
        raise CheckpointError(keys.path, problem)
    return [block == "moe" for block in said[0]]
