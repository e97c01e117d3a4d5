"""Backend `cutlass`: our own fused MoE with grouped FP8 GEMMs in CUDA C++ on CUTLASS's wrappers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_dist.backends.base import Problem
from moe_dist.backends.own import OwnKernels, config_from, on_hopper
from moe_dist.kernels.cutlass.library import build_state, ensure_built
from moe_dist.model.quantization import QuantizedRows
from moe_dist.model.spec import MoESpec
from moe_dist.model.weights import ExpertWeights
from moe_dist.step import Step, Support, TokenRows

if TYPE_CHECKING:
    from moe_dist.kernels.cutlass.fused_moe import Config, CutlassPipeline

ACTIVATIONS = ("swiglu", "geglu", "relu2")
MOST_EXPERTS = 512  # on one rank: their tiles are found in shared memory


class CutlassFused(OwnKernels["Config"]):
    """FP8 only."""

    name = "cutlass"
    table_revision = 1
    quick_build = True

    @classmethod
    def available(cls, device: str) -> Support:
        hopper = on_hopper(device)
        return build_state() if hopper.ok else hopper

    @classmethod
    def supports(cls, problem: Problem) -> Support:
        if refusal := cls.refused(problem.spec, ACTIVATIONS):
            return refusal
        if not problem.spec.quantized:
            return Support(False, f"computes FP8 layers, not {problem.spec.quant_label}")
        if problem.num_local > MOST_EXPERTS:
            return Support(False, f"takes at most {MOST_EXPERTS} experts on a rank, not {problem.num_local}")
        return super().supports(problem)

    @classmethod
    def build(cls) -> None:
        ensure_built()

    @classmethod
    def candidates(cls, problem: Problem, rows: int) -> list[dict[str, Any]]:
        """Sharing was best or as good for every shape that was tried on an H200."""
        return [{"share1": one, "share2": two, "pdl": True} for one in (2, 1) for two in (2, 1)]

    @classmethod
    def config_of(cls, values: dict[str, Any], spec: MoESpec) -> Config:
        from moe_dist.kernels.cutlass.fused_moe import Config

        config = config_from(Config, values)
        config.check()
        return config

    def prepare(self, weights: ExpertWeights) -> None:
        """Builds the library if that was not done (minutes)."""
        from moe_dist.kernels.cutlass.fused_moe import Matrices
        from moe_dist.kernels.cutlass.library import load

        super().prepare(weights)
        library = None if weights.device.type == "meta" else load()
        if not self._empty:
            self._matrices = Matrices(library, weights)

    def awaits(self, rows: TokenRows) -> bool:
        """GEMM1 waits for rows that are quantized already: it is the first to read them."""
        return rows.arrivals is None or isinstance(rows.x, QuantizedRows)

    def pipeline_with(self, step: Step, rows: TokenRows, config: Config) -> CutlassPipeline:
        from moe_dist.kernels.cutlass.fused_moe import CutlassPipeline

        return CutlassPipeline(step, rows, self._matrices, config)
