"""Peer `deep_gemm_mega`: DeepGEMM's whole-layer kernel for Hopper, dispatch, both GEMMs and combine in one launch."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from moe_dist.backends.own import on_hopper
from moe_dist.kernels import quantize_rows
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import FP8
from moe_dist.model.routing import Routing
from moe_dist.model.spec import BLOCK, MoESpec, TokenLayout
from moe_dist.oracle.numerics import Numerics
from moe_dist.peers.base import Peer, PeerCase, PeerStep
from moe_dist.step import Support

KNOWN = "0.1.4"  # later ones have another interface and want a newer torch


class DeepGemmMega(Peer):
    """fp8_block with swiglu under EP. Its GEMM2 takes rows with a scale for each 64 columns, where ours have 128.
    Tokens are quantized by our kernel, straight into its buffer, as part of the step."""

    package = "sgl-deep-gemm"
    deterministic = True
    capturable = True
    numerics = Numerics(gemm2_group=64)
    payload, combine = "fp8", "bf16"

    @classmethod
    def available(cls, device: str) -> Support:
        found = cls.version()
        if find_spec("deep_gemm") is None or found is None:
            return Support(False, f"{cls.package} is not installed (pip install {cls.package}=={KNOWN}.post1)")
        if not found.startswith(KNOWN):
            return Support(False, f"{cls.package} {found} is installed, and its kernel is known of {KNOWN} only")
        return on_hopper(device)

    @classmethod
    def supports(cls, spec: MoESpec, placement: Placement, token_layout: TokenLayout, shares: list[int]) -> Support:
        world = placement.world
        held = [expert for rank in range(world) for expert in placement.experts_of(rank)]
        plain = placement.tp == 1 and spec.num_experts % world == 0 and held == list(range(spec.num_experts))
        if world < 2 or not plain:
            return Support(False, "runs under EP over two ranks or more, whole experts in equal runs")
        plain = spec.activation == "swiglu" and spec.shared_experts == "none" and not spec.expert_bias
        if spec.quant != "fp8_block" or not plain:
            return Support(False, "computes fp8_block with swiglu, without biases and without a shared expert")
        if spec.hidden % BLOCK or spec.intermediate % BLOCK:
            return Support(False, f"takes hidden and intermediate sizes of whole {BLOCK}s")
        if token_layout != "sharded" or len(set(shares)) > 1 or not shares[0]:
            return Support(False, "was written for equally many sharded tokens on every rank, one at least")
        return Support(True)

    @classmethod
    def prepare(cls, case: PeerCase) -> PeerStep:
        import deep_gemm

        spec, shard = case.spec, case.shard
        sizes = spec.num_experts, case.bucket, spec.top_k, spec.hidden, spec.intermediate
        buffer = deep_gemm.get_symm_buffer_for_sm90_mega_moe(case.group, *sizes)
        shard.turn(gate_first=True)
        first, second = deep_gemm.transform_weights_for_mega_moe_sm90(
            (shard.w13_eFH, shard.s13), (shard.w2_eHi, shard.s2)
        )

        def step(x_TH: Tensor, routing: Routing) -> Tensor:
            tokens = len(x_TH)
            places = {FP8: buffer.x[:tokens], torch.float32: buffer.x_sf[:tokens]}
            rows = quantize_rows(x_TH, "fp8_block", take=lambda shape, dtype: _room(places[dtype]))
            for place, found in ((places[FP8], rows.values_RH), (places[torch.float32], rows.scales_RS)):
                if found is not None and found.data_ptr() != place.data_ptr():
                    place.copy_(found)
            buffer.topk_idx[:tokens].copy_(routing.ids_TK)
            buffer.topk_weights[:tokens].copy_(routing.weights_TK)
            y_TH = x_TH.new_empty(x_TH.shape)
            deep_gemm.fp8_mega_moe(
                y_TH, first, second, buffer, recipe=(BLOCK, BLOCK, BLOCK), activation="swiglu", activation_clamp=None,
                fast_math=True,
            )  # fmt: skip
            return y_TH

        return step


def _room(place: Tensor) -> Tensor:
    """The package's own memory, where rows lie there as our kernel writes them; else memory to copy from."""
    return place if place.is_contiguous() else torch.empty_like(place, memory_format=torch.contiguous_format)
