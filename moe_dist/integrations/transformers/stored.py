"""Experts as a model's checkpoint stores them, for modules of which transformers has made something else: on a CPU, or
with `dequantize`, it makes bf16 of FP8."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from moe_dist.checkpoint import Checkpoint, layer_spec, load_shard
from moe_dist.engine.plan import Plan
from moe_dist.errors import ConfigError
from moe_dist.integrations.transformers.forms import Form
from moe_dist.model.spec import MoESpec, QuantKind
from moe_dist.model.weights import ExpertWeights

SAME = ("hidden", "intermediate", "num_experts", "activation", "expert_bias", "dtype")  # of a module and its layer


class StoredExperts:
    """Of the modules `names`, in the order of their layers. `quant`: the format that bf16 experts get. Raises
    ConfigError for a checkpoint of another model, and as Checkpoint and layer_spec."""

    def __init__(self, folder: Path | str, names: Sequence[str], quant: QuantKind | None) -> None:
        self._opened, self._quant = Checkpoint(folder), quant
        layers = self._opened.config.moe_layers
        if len(layers) != len(names) or any(
            f".{layer}." not in name for layer, name in zip(layers, names, strict=True)
        ):
            rule = f"has MoE layers {list(layers)}, and the model has experts in {', '.join(names)}"
            raise ConfigError("checkpoint", str(folder), rule, "the folder that the model was loaded from")
        self._layers = dict(zip(names, layers, strict=True))

    def spec(self, name: str, form: Form, top_k: int) -> MoESpec:
        """The layer of this module in the format that is stored, or that it gets. Raises ConfigError where the module
        holds experts of another form: found later, it would leave a model of which a part is replaced."""
        layer = self._layers[name]
        stored, module = layer_spec(self._opened, layer, self._quant), form.spec(name, top_k)
        for key in SAME:
            found, wanted = getattr(stored, key), getattr(module, key)
            if found != wanted:
                rule = f"layer {layer} has {key} {found!r}, and {name} has {wanted!r}"
                legal = "the folder that the model was loaded from, in the dtype that is stored there"
                raise ConfigError("checkpoint", str(self._opened.directory), rule, legal)
        return form.spec(name, top_k, quant=stored.quant)

    def shard(self, name: str, plan: Plan, rank: int, device: torch.device) -> ExpertWeights:
        """What `rank` holds of it. Raises as load_shard."""
        return load_shard(self._opened, self._layers[name], plan.placement, rank, device, quant=self._quant)
