"""Backend `triton`: our own fused MoE in Triton, for every FP8 format and bf16."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_dist.backends.base import Backend, Problem
from moe_dist.quantization import QuantizedRows
from moe_dist.reference import Numerics
from moe_dist.rows import Support, TokenRows
from moe_dist.spec import MoESpec
from moe_dist.tables import Shape, device_name, tuned_config
from moe_dist.weights import ExpertWeights

if TYPE_CHECKING:
    from moe_dist.kernels.triton.fused_moe import Config

SCARCE_COLUMNS = 264 * 128  # of GEMM2's output, over all experts in use: fewer tiles than two for each multiprocessor
LONGEST_ROW = 16384  # what one program quantizes with one scale
GRANULARITY = 16  # columns that an FP8 tensor core's operand is made of, and bytes of a wide load


class TritonFused(Backend):
    """[gate; up] or [up; gate] weights, as they come; bf16 rows or rows quantized already."""

    capturable = True
    deterministic = True
    table_revision = 1

    @classmethod
    def available(cls, device: str) -> Support:
        if device != "cuda" or not torch.cuda.is_available():
            return Support(False, "needs an NVIDIA Hopper GPU (SM90)")
        capability = torch.cuda.get_device_capability()
        if capability != (9, 0):
            return Support(False, f"needs SM90, this GPU is SM{capability[0]}{capability[1]}")
        if find_spec("triton") is None:
            return Support(False, "needs the package triton")
        return Support(True, f"triton {version('triton')}")

    @classmethod
    def numerics_of(cls, spec: MoESpec) -> Numerics:
        """A scale for a whole row of GEMM2's input needs a second pass over it; it waits for that in bf16."""
        return Numerics(bf16_activation=spec.quant in ("none", "fp8_channel", "fp8_tensor_dynamic"))

    @classmethod
    def payloads(cls, spec: MoESpec) -> frozenset[str]:
        return frozenset({"none", "bf16"} | ({"fp8"} if spec.quantized else set()))

    @classmethod
    def supports(cls, problem: Problem) -> Support:
        spec, width = problem.spec, problem.width
        if problem.capability != (9, 0):
            return Support(False, f"needs compute capability 9.0, not {problem.capability}")
        if spec.dtype != "bf16":
            return Support(False, f"computes bf16 and FP8 layers, not {spec.quant_label}")
        if spec.hidden % GRANULARITY or width % GRANULARITY:
            sizes = f"hidden ({spec.hidden}) and slices ({width})"
            return Support(False, f"needs {sizes} in multiples of {GRANULARITY}")
        if spec.quant in ("fp8_channel", "fp8_tensor_dynamic") and max(spec.hidden, width) > LONGEST_ROW:
            sizes = f"hidden ({spec.hidden}) and slices ({width})"
            return Support(False, f"{spec.quant} needs {sizes} of at most {LONGEST_ROW}: a whole row has one scale")
        return Support(True)

    @classmethod
    def candidates(cls, problem: Problem, rows: int) -> list[dict[str, Any]]:
        """By the pairs that an expert gets on average: what was best for some shape on an H200, and parts of the sum
        where GEMM2 has few tiles, which no shipped table was made with."""
        spec = problem.spec
        each = rows * spec.top_k / spec.num_experts
        bk = 128 if spec.quantized else 64
        few: dict[str, Any] = {
            "bm": 16, "swap": True, "bn1": 128, "bk1": bk, "warps1": 4, "stages1": 3, "bn2": 128, "bk2": bk,
            "warps2": 4, "stages2": 4, "twice": False, "span": 1, "split2": 1, "split_k": 1,
            "group": 8, "tma": False, "pdl": True,
        }  # fmt: skip
        some = few | {"bm": 64, "swap": False, "warps1": 8, "stages1": 4, "stages2": 3, "tma": True}
        many = some | {"bm": 128, "split2": 2, "stages1": 3, "stages2": 4, "span": 4}
        if each <= 24:
            bm, other = (16, 32) if each <= 10 else (32, 16)
            few |= {"bm": bm}
            changes: list[dict[str, Any]] = [
                {}, {"tma": True}, {"twice": True, "stages2": 3}, {"span": 2}, {"stages1": 4, "stages2": 3},
                {"stages1": 5, "stages2": 6}, {"tma": True, "warps2": 8, "stages2": 3}, {"bm": other},
            ]  # fmt: skip
            here = rows * spec.top_k * problem.num_local / spec.num_experts
            if min(here, problem.num_local) * spec.hidden < SCARCE_COLUMNS:
                changes += [{"split_k": 2}, {"split_k": 4, "stages2": 3}]
            return [few | change for change in changes]
        if each <= 128:
            changes = [{}, {"span": 8}, {"warps1": 4, "stages1": 2, "span": 4}, {"stages1": 3}]
            return [*(some | change for change in changes), few | {"bm": 32, "stages1": 4}, many]
        changes = [
            {}, {"group": 16}, {"span": 1, "stages2": 3}, {"stages1": 4}, {"span": 8, "stages2": 3},
            {"split2": 1, "twice": True, "warps2": 8, "stages2": 3, "span": 1},
        ]  # fmt: skip
        return [many | change for change in changes]

    @classmethod
    def compile_ahead(cls, wanted: list[tuple[Problem, int, dict[str, Any]]]) -> Iterator[int]:
        from moe_dist.kernels.triton.precompile import precompile

        return precompile(
            (problem.spec, problem.width, problem.num_local, rows, problem.payload == "fp8", config)
            for problem, rows, config in wanted
        )

    def prepare(self, weights: ExpertWeights) -> None:
        self._weights = weights
        self._empty = weights.num_experts == 0 or weights.width == 0
        self._forced: Config | None = None
        self._chosen: dict[int, Config] = {}
        self._tiles: dict[tuple[int, int, int], Any] = {}

    def use_config(self, config: dict[str, Any] | None) -> None:
        from moe_dist.kernels.triton.fused_moe import Config

        self._forced = None if config is None else Config(**config)
        if self._forced is not None:
            self._forced.check(self.spec.quant)

    def forward(self, rows: TokenRows) -> Tensor:
        from moe_dist.kernels.triton.fused_moe import fused_moe

        count = rows.slots_RK.shape[0]
        if count == 0 or self._empty:
            shape = count, self.spec.hidden
            return torch.zeros(shape, dtype=self.out_dtype, device=rows.slots_RK.device)
        config = self._forced or self._chosen.get(count) or self._choose(rows)
        return fused_moe(
            rows.x, rows.slots_RK, rows.weights_RK, self._weights, self.spec.activation, config, self.out_dtype,
            self.stages, self._tiles,
        )  # fmt: skip

    def _choose(self, rows: TokenRows) -> Config:
        from moe_dist.kernels.triton.fused_moe import Config

        weights, count = self._weights, rows.slots_RK.shape[0]
        shape = Shape.of("triton", device_name(weights.device), self.spec, weights.width, weights.num_experts)
        values = tuned_config(shape, self.table_revision, count)
        if values is None:
            payload = "fp8" if isinstance(rows.x, QuantizedRows) else "bf16"
            problem = Problem(self.spec, weights.width, weights.num_experts, "cuda", (9, 0), payload)
            values = self.default_config(problem, count)
        config = Config(**values)
        config.check(self.spec.quant)
        self._chosen[count] = config
        return config
