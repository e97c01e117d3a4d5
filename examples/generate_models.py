"""The models of generate.py: random or loaded, with moe_dist's layers as their experts or as transformers has them."""

from __future__ import annotations

import argparse
import inspect
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, DistributedConfig, Qwen3MoeConfig

from moe_dist.errors import ConfigError
from moe_dist.integrations.transformers import replace_experts
from moe_dist.workloads.streams import Stream

TIMEOUT = timedelta(minutes=10)  # of every wait for other ranks: compiling and loading are among them
# transformers wants a plan of tensor parallelism even where only experts are spread, and drops what it says of experts.
EXPERTS_ONLY = {"model.layers.*.mlp.experts": "moe_tp_experts"}
SPREADS = "ep_size" in inspect.signature(DistributedConfig).parameters  # experts over ranks, as `theirs` asks for it

# Sizes of Qwen3-30B-A3B, and what differs from them on a CPU.
QWEN3_30B: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 40960, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
TINY = QWEN3_30B | {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip


class Ranks(NamedTuple):
    """Where this process runs, and how the experts are spread."""

    rank: int
    world: int
    device: torch.device
    tp: int
    ep: int


def config_of(args: argparse.Namespace) -> Any:
    """Raises ConfigError for a folder without a model, more layers than it has, and more tokens than it takes."""
    if args.checkpoint:
        try:
            config = AutoConfig.from_pretrained(args.checkpoint, local_files_only=True)
        except (OSError, ValueError) as error:
            rule = f"has no model that transformers reads: {str(error).splitlines()[0]}"
            raise ConfigError("--checkpoint", args.checkpoint, rule, "a model's folder") from None
    else:
        config = Qwen3MoeConfig(**QWEN3_30B if torch.cuda.is_available() else TINY)
    if args.layers:
        if args.layers > config.num_hidden_layers:
            rule = "is more than the model has"
            raise ConfigError("--layers", args.layers, rule, f"1 to {config.num_hidden_layers}")
        config.num_hidden_layers = args.layers
    most = config.max_position_embeddings
    if args.input_len + args.output_len > most:
        rule = "is more than the model has positions for"
        raise ConfigError("--input-len + --output-len", args.input_len + args.output_len, rule, f"up to {most}")
    return config


def draw(module: nn.Module, prefix: str, device: torch.device) -> None:
    """Random weights for what is on meta, made on `device`: the same for a name however the model is spread."""
    for name, meta in list(module.named_parameters()):
        if meta.device.type != "meta":
            continue
        owner, _, leaf = name.rpartition(".")
        full = torch.ones(meta.shape, dtype=meta.dtype, device=device)
        if meta.ndim > 1:  # norms stay ones
            scale = meta.shape[-1] ** -0.5
            full.copy_(Stream("weights of generate.py", prefix + name, device=device).normal(*meta.shape).mul_(scale))
        if isinstance(meta, DTensor):
            full = distribute_tensor(full, meta.device_mesh, meta.placements, src_data_rank=None)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(full, requires_grad=False))


def loaded(args: argparse.Namespace, config: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(args.checkpoint, config=config, dtype="auto").eval()


def on_meta(config: Any, dtype: str) -> Any:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model


def settled(model: Any, device: torch.device) -> Any:
    """Random ones for what is on meta still; the one buffer is computed anew."""
    draw(model, "", device)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    return model.eval()


def ours(args: argparse.Namespace, config: Any, ranks: Ranks, buckets: tuple[int, ...]) -> Any:
    """Random experts are made, quantized and sliced layer by layer, so that no GPU holds them all in bf16. A checkpoint
    is loaded whole on every rank's CPU."""
    given = {
        "token_layout": "replicated", "tp": ranks.tp, "ep": ranks.ep, "backend": args.backend,
        "exchange": args.exchange, "quant": None if args.quant == "none" else args.quant, "graph_buckets": buckets,
        "timeout_s": TIMEOUT.total_seconds() if ranks.world > 1 else None,
    }  # fmt: skip
    if args.checkpoint:
        model = loaded(args, config)
        replace_experts(model, device=ranks.device, **given)
        return model.to(ranks.device)
    model = on_meta(config, args.dtype)
    for number, layer in enumerate(model.model.layers):
        draw(layer, f"model.layers.{number}.", ranks.device)
        replace_experts(layer, device=ranks.device, **given)
    return settled(model, ranks.device)


def theirs(args: argparse.Namespace, config: Any, ranks: Ranks) -> Any:
    """transformers' own: on several ranks its expert parallelism over all of them. Nothing else is spread, as with
    moe_dist, so attention and cache are the same."""
    model = loaded(args, config) if args.checkpoint else on_meta(config, args.dtype)
    if ranks.world > 1:
        spread = DistributedConfig(tp_size=ranks.world, ep_size=ranks.world)
        model.tp_plan = EXPERTS_ONLY
        spread, _, mesh = type(model).prepare_distribute_model(spread)
        model = type(model).maybe_distribute_model(model, spread, mesh)
    return model.to(ranks.device) if args.checkpoint else settled(model, ranks.device)
