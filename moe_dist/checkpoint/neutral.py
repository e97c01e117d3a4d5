"""Keys of a config.json that the model family does not read. One that sounds like the MoE layer may ask for another
one, and leaving it out would compute another model in silence: it must be known to change nothing, and hold a value
that says what is computed anyway. What an unknown name means, nobody here can tell."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moe_dist.checkpoint.folder import plain, shown
from moe_dist.errors import UnsupportedError
from moe_dist.model.spec import MoESpec

OF_THE_LAYER = re.compile(
    r"moe|expert|rout|glu|scor|top_?k|(^|_)act(_|$)|activation|shared|gate|group|dense|sparse|dtype|mlp|ffn|latent"
)
OF_ATTENTION = re.compile(r"(attn|attention|index|kv)_")
MARK = "moe_dist_synthetic"  # has the parameters that a synthetic checkpoint was made with
# Of training, of how it is computed, of what a model gives back, and of drawing tokens.
WHATEVER_THEY_SAY = {
    "router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise", "moe_aux_loss_coeff", "moe_z_loss_coeff",
    "experts_implementation", "output_router_logits", "output_scores", "top_k", "num_beam_groups", MARK,
}  # fmt: skip


ANY: tuple[Any, ...] = (object(),)  # as the values of a key that changes nothing whatever it says


def refuse_unread(
    raw: Mapping[str, Any],
    read: Collection[str],
    spec: MoESpec,
    sparse: list[bool] | None,
    path: Path | str,
    neutral: Mapping[str, tuple[Any, ...]] = MappingProxyType({}),
) -> None:
    """UnsupportedError for a key that was not `read` and may ask for another layer than `spec`, or for experts in other
    layers than `sparse` says, None where nobody asks which those are. A null counts as absent. `neutral`: the model
    family's own keys that change nothing, with the values that don't."""
    known = {**_of_layer(spec), **_of_model(sparse or []), **neutral}
    unasked = () if sparse is not None else tuple(_of_model([]))
    for key, value in raw.items():
        if value is None or key in read or key in WHATEVER_THEY_SAY or key in unasked:
            continue
        if key not in known and (not OF_THE_LAYER.search(key.lower()) or OF_ATTENTION.match(key.lower())):
            continue
        fine = known.get(key, ())
        if fine is not ANY and not any(value == f and isinstance(value, bool) == isinstance(f, bool) for f in fine):
            what = f"{plain(key)} {shown(value)} in {path}, of model_type {shown(raw.get('model_type'))},"
            said = "would be another" if key in known else "may be another"
            reason = f"this model family does not read it, so the layer {said}"
            raise UnsupportedError(what, [reason], [*map(shown, fine), f"no key {plain(key)}"])


def _of_layer(spec: MoESpec) -> dict[str, tuple[Any, ...]]:
    """Each key that is about one layer, with the values that change nothing."""
    same: dict[tuple[str, ...], tuple[Any, ...]] = {
        # the router
        ("scoring_func", "score_func", "score_function", "moe_router_score_function", "moe_router_activation_func"): (
            spec.scoring,
        ),
        ("moe_use_sigmoid",): (spec.scoring == "sigmoid",),
        ("topk_method",): ("noaux_tc",) if spec.correction_bias else ("greedy",),
        ("use_routing_bias", "use_expert_bias", "moe_router_enable_expert_bias"): (spec.correction_bias,),
        ("n_group", "num_expert_group", "num_expert_groups", "n_expert_groups"): (spec.num_groups,),
        ("topk_group", "num_limited_groups", "n_limited_groups"): (spec.top_groups,),
        ("route_norm", "moe_norm_topk_prob"): (spec.renormalize,),
        (
            *("routed_scaling_factor", "moe_routed_scaling_factor", "moe_router_topk_scaling_factor"),
            *("router_scaling_factor", "route_scale"),
        ): (spec.routed_scaling,),
        ("moe_k", "moe_topk", "moe_top_k", "num_experts_per_token"): (spec.top_k,),
        ("router_bias",): (spec.router_bias,),
        ("apply_router_weight_on_input", "moe_apply_router_weight_on_input"): (spec.weights_on_input,),
        ("moe_drop_tokens",): (False,),
        ("router_logit_softcapping",): (),
        # the experts
        ("hidden_activation", "mlp_hidden_act", "moe_hidden_act", "activation_function"): ("silu",),
        ("moe_ffn_hidden_size", "expert_intermediate_size"): (spec.intermediate,),
        ("mlp_bias", "moe_bias", "expert_bias"): (spec.expert_bias,),
        ("zero_expert_num",): (0,),
        # how many there are
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"): (spec.num_experts,),
        ("n_shared_experts", "num_shared_experts", "n_shared_expert", "num_shared_expert"): (0,),
        ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"): (0,),
    }
    return {key: neutral for keys, neutral in same.items() for key in keys}


def _of_model(sparse: list[bool]) -> dict[str, tuple[Any, ...]]:
    """Likewise of keys that say which layers hold experts."""
    return {
        "mlp_layer_types": (["sparse" if moe else "dense" for moe in sparse],),
        "mlp_only_layers": ([], [layer for layer, moe in enumerate(sparse) if not moe]),
        "decoder_sparse_step": (1,),
        "first_k_dense_replace": (0,),
        "num_dense_layers": (0,) if all(sparse) else (),
        "moe_layer_freq": (1, [int(moe) for moe in sparse]),
        "interleave_moe_layer_step": (1,),
        "moe_layer_start_index": (0,),
        "moe_layer_end_index": (-1, len(sparse) - 1),
        "moe_layer_interval": (1,),
        "moe_layers": (),
    }
