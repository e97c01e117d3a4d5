"""Hugging Face checkpoints: config.json to a spec, and reads of just the slices that a rank holds."""

from moe_dist.checkpoint.config import ModelConfig, read_config, spec_from_config
from moe_dist.checkpoint.layout import check_layer, layer_spec
from moe_dist.checkpoint.load import (
    RouterWeights,
    load_router,
    load_shard,
    load_shared_shard,
)
from moe_dist.checkpoint.reader import Checkpoint
from moe_dist.checkpoint.synthetic import make_checkpoint

__all__ = [
    "Checkpoint",
    "ModelConfig",
    "RouterWeights",
    "check_layer",
    "layer_spec",
    "load_router",
    "load_shard",
    "load_shared_shard",
    "make_checkpoint",
    "read_config",
    "spec_from_config",
]
