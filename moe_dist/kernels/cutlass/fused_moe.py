"""The fused MoE with the two GEMMs of grouped_gemm.cuh; what is around them is the triton backend's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.errors import ConfigError
from moe_dist.kernels.cutlass.library import DOWN, LONGEST_KEPT, UP, UP_GATED, Args, Library, WeightsMap
from moe_dist.kernels.triton.launch import is_idle
from moe_dist.kernels.triton.permute import UNREAD_TILE
from moe_dist.kernels.triton.pipeline import ACTIVATIONS, BLOCK_SCALES, ROW_SCALES, Pipeline, blocks
from moe_dist.model.weights import ExpertWeights
from moe_dist.step import Step, TokenRows

SHARES = (1, 2)  # what is compiled (grouped_gemm.cu)
# Rows of an expert, in the mean, from which on GEMM2 keeps the weights of a short sum for a run of tiles; 0: never, as
# long as no GPU has shown what it gains.
RUNS_FROM = 0


@dataclass(frozen=True)
class Config:
    """`share1`, `share2`: thread blocks that work on the same weights with other tokens, each loading half for both, in
    GEMM1 and in GEMM2. `pdl`: programmatic dependent launch."""

    share1: int
    share2: int
    pdl: bool = True

    def check(self) -> None:
        """Raises ConfigError for what is not compiled."""
        for name, share in (("share1", self.share1), ("share2", self.share2)):
            if share not in SHARES:
                raise ConfigError(f"config.{name}", share, "thread blocks that share weights", SHARES)


class Matrices:
    """One shard's weights as the kernels read them; the tensors must stay where they are."""

    def __init__(self, library: Library | None, experts: ExpertWeights) -> None:
        """`library`: None where nothing is launched (launch.idle)."""
        self.library, self.experts = library, experts
        for name, tensor in experts.tensors().items():
            if not tensor.is_contiguous():
                raise ConfigError(f"weights.{name}", tuple(tensor.stride()), "the kernels read contiguous tensors")
        self.w13 = self.w2 = WeightsMap()
        self.sms = 0
        if library is None:
            return
        w13, w2 = experts.w13_eFH, experts.w2_eHi
        self.w13 = library.weights_map(w13.data_ptr(), w13.shape[0] * w13.shape[1], w13.shape[2])
        self.w2 = library.weights_map(w2.data_ptr(), w2.shape[0] * w2.shape[1], w2.shape[2])
        self.sms = torch.cuda.get_device_properties(w13.device).multi_processor_count


class CutlassPipeline(Pipeline):
    def __init__(self, step: Step, rows: TokenRows, matrices: Matrices, config: Config) -> None:
        super().__init__(step, rows, matrices.experts, UNREAD_TILE, config.pdl)
        self.matrices, self.config = matrices, config

    def gemm1(self, values: Tensor, scales: Tensor, activation: str) -> None:
        experts = self.experts
        if values.data_ptr() % 16:  # rows are read by sixteen bytes
            values = values.clone()
        self._gemm(
            UP_GATED if experts.gated else UP,
            self.matrices.w13,
            self.config.share1,
            x=values.data_ptr(), x_scales=scales.data_ptr(), w_scales=_address(experts.s13),
            x_static=_address(experts.a13), h_static=_address(experts.a2),
            out=self.h.data_ptr(), out_scales=self.hs.data_ptr(),
            x_scale_row=blocks(experts.hidden) if self.kind == BLOCK_SCALES else 1,
            x_scale_k=int(self.kind == BLOCK_SCALES),
            k=experts.hidden, width=experts.width, first=0, end=experts.width,
            activation=ACTIVATIONS[activation], **_arriving(self.rows),
        )  # fmt: skip

    def gemm2(self, start: int, stop: int) -> None:
        experts = self.experts
        self._gemm(
            DOWN,
            self.matrices.w2,
            self.config.share2,
            x=self.h.data_ptr(), x_scales=self.hs.data_ptr(), w_scales=_address(experts.s2),
            x_static=_address(experts.a2), out=self.out.data_ptr(),
            x_scale_row=1, x_scale_k=0 if self.kind == ROW_SCALES else self.pairs,
            k=experts.width, width=experts.hidden, first=start, end=stop,
        )  # fmt: skip

    @property
    def in_runs(self) -> bool:
        """Whether GEMM2's tiles come in runs."""
        return self.experts.width <= LONGEST_KEPT and 0 < RUNS_FROM * self.experts.num_experts <= self.pairs

    def _gemm(self, gemm: int, weights: WeightsMap, share: int, **fields: int) -> None:
        library = self.matrices.library
        if library is None or is_idle():
            return
        args = Args(
            starts=self.starts.data_ptr(), stops=self.stops.data_ptr(), order=self.order.data_ptr(),
            taken=self.taken.data_ptr() + 4 * (gemm == DOWN),
            experts=self.experts.num_experts, top_k=self.slots_RK.shape[1], pairs=self.pairs,
            gate_first=self.experts.gate_first, per_tensor=self.per_tensor, **fields,
        )  # fmt: skip
        stream = torch.cuda.current_stream(self.slots_RK.device).cuda_stream
        device = self.slots_RK.device.index
        runs = gemm == DOWN and self.in_runs
        library.gemm(gemm, self.kind, args, weights, share, device, self.matrices.sms, self.pdl, stream, runs)


def _arriving(rows: TokenRows) -> dict[str, int]:
    """When the rows are here that are on their way."""
    found = rows.arrivals
    if found is None:
        return {}
    return {
        "flags": found.flags_P.data_ptr(), "step": found.step.data_ptr(), "failed": found.failed.data_ptr(),
        "limit_ns": found.limit_ns, "each": found.each, "rank": found.rank, "parts": len(found.flags_P),
        "phase": found.phase,
    }  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
