"""A process of SGLang with our plugin in it, its FP8 layer, and weights by its own loader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from experts import SPEC, pieces
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import initialize_moe_config
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import get_context, get_parallel

from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.model.routing import Routing

load_plugins()  # SGLang's own: by the entry point of this package

BLOCKS = Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="dynamic", weight_block_size=[128, 128])
PLACE = {"moe_tp_size": 1, "moe_tp_rank": 0, "moe_ep_size": 1, "moe_ep_rank": 0, "dwdp_size": 1, "tp_group": None}


@contextmanager
def server(backend: str = "moe_dist_torch", place: dict[str, Any] | None = None, **flags: Any) -> Iterator[None]:
    """A process of SGLang, configured as --moe-runner-backend says."""
    with ExitStack() as stack:
        stack.enter_context(get_context().override_server_args(moe_runner_backend=backend, **flags))
        stack.enter_context(get_parallel().override(**(PLACE | (place or {}))))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.bfloat16)
        initialize_moe_config()
        yield


def layer_of(**changes: Any) -> FusedMoE:
    """SGLang's own, as its model files make it."""
    given = {
        "num_experts": SPEC.num_experts, "hidden_size": SPEC.hidden, "intermediate_size": SPEC.intermediate,
        "layer_id": 0, "top_k": SPEC.top_k, "quant_config": BLOCKS, "prefix": "model.layers.0.mlp.experts",
    }  # fmt: skip
    return FusedMoE(**(given | changes))


def load(layer: FusedMoE, weights: Any) -> None:
    """By SGLang's own loader, from tensors as a checkpoint has them."""
    for expert, shard_id, matrix, scales in pieces(weights):
        stem = "w2" if shard_id == "w2" else "w13"
        for suffix, tensor in (("weight", matrix), ("weight_scale_inv", scales)):
            param = getattr(layer, f"{stem}_{suffix}")
            param.weight_loader(param, tensor, f"experts.{stem}_{suffix}", shard_id=shard_id, expert_id=expert)


def loaded(layer: FusedMoE, weights: Any) -> FusedMoE:
    load(layer, weights)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def run(layer: FusedMoE, x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
    with torch.inference_mode():
        return layer(x_TH, StandardTopKOutput(routing.weights_TK, routing.ids_TK, torch.empty(0)))


class UpFirst(TorchBackend):
    """The reference, for [up; gate] alone, as flashinfer_cutlass is."""

    gate_first = False

    def prepare(self, weights: Any) -> None:
        weights.turn(gate_first=False)
        super().prepare(weights)
