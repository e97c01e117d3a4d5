"""Keys of a config.json that change what an MoE layer computes in some model families. A family that does not know one
would leave it out in silence; so it must hold the value that says what is computed anyway."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from moe_dist.checkpoint.folder import shown
from moe_dist.errors import UnsupportedError
from moe_dist.spec import MoESpec


def refuse_unread(
    raw: Mapping[str, Any], read: Container[str], spec: MoESpec, sparse: list[bool] | None, path: Path | str
) -> None:
    """UnsupportedError for a key that was not `read` and asks for another layer than `spec`, or for experts in other
    layers than `sparse` says, None where nobody asks which those are. A null counts as absent."""
    neutral_values = _of_layer(spec) | ({} if sparse is None else _of_model(sparse))
    for key, neutral in neutral_values.items():
        value = raw.get(key)
        if key in read or value is None:
            continue
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral):
            what = f"{key} {shown(value)} in {path}, of model_type {shown(raw.get('model_type'))},"
            legal = [*map(shown, neutral), f"no key {key}"]
            raise UnsupportedError(what, ["this model family does not read it, so the layer would be another"], legal)


def _of_layer(spec: MoESpec) -> dict[str, tuple[Any, ...]]:
    """Each key that is about one layer, with the values that change nothing."""
    scaling = ("routed_scaling_factor", "moe_router_topk_scaling_factor")
    biases = ("mlp_bias", "moe_bias", "expert_bias")
    keys: dict[str, tuple[Any, ...]] = {
        # the router
        "scoring_func": (spec.scoring,),
        "score_function": (spec.scoring,),
        "moe_router_activation_func": (spec.scoring,),
        "topk_method": ("noaux_tc",) if spec.correction_bias else ("greedy",),
        "use_routing_bias": (spec.correction_bias,),
        "moe_router_enable_expert_bias": (spec.correction_bias,),
        "n_group": (spec.num_groups,),
        "num_expert_group": (spec.num_groups,),
        "topk_group": (spec.top_groups,),
        "router_bias": (False,),
        "router_logit_softcapping": (),
        "apply_router_weight_on_input": (False,),
        "moe_apply_router_weight_on_input": (False,),
        # the experts
        "hidden_activation": ("silu",),
        "swiglu_limit": (),
        "swiglu_alpha": (),
        "moe_latent_size": (),
        "zero_expert_num": (0,),
        # how many there are
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (spec.num_experts,)),
        **dict.fromkeys(("n_shared_experts", "num_shared_experts"), (0,)),
        **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), (0,)),
    }
    return keys | dict.fromkeys(scaling, (spec.routed_scaling,)) | dict.fromkeys(biases, (False,))


def _of_model(sparse: list[bool]) -> dict[str, tuple[Any, ...]]:
    """Likewise of keys that say which layers hold experts."""
    return {
        "mlp_layer_types": (["sparse" if moe else "dense" for moe in sparse],),
        "mlp_only_layers": ([], [layer for layer, moe in enumerate(sparse) if not moe]),
        "decoder_sparse_step": (1,),
        "first_k_dense_replace": (0,),
        "moe_layer_freq": (1, [int(moe) for moe in sparse]),
        "interleave_moe_layer_step": (1,),
        "moe_layers": (),
    }
