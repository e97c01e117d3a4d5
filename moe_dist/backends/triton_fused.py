"""Backend `triton`: our own fused MoE in Triton, for every FP8 format and bf16."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from moe_dist.backends.base import Problem
from moe_dist.backends.own import OwnKernels, config_from, on_hopper
from moe_dist.model.spec import MoESpec
from moe_dist.model.weights import ExpertWeights
from moe_dist.step import Step, Support, TokenRows

if TYPE_CHECKING:
    from moe_dist.kernels.triton.fused_moe import Config, TritonPipeline

SCARCE_COLUMNS = 264 * 128  # of GEMM2's output, over all experts in use: fewer tiles than two for each multiprocessor


class TritonFused(OwnKernels["Config"]):
    name = "triton"
    table_revision = 1

    @classmethod
    def available(cls, device: str) -> Support:
        hopper = on_hopper(device)
        return Support(True, f"triton {version('triton')}") if hopper.ok else hopper

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

    @classmethod
    def config_of(cls, values: dict[str, Any], spec: MoESpec) -> Config:
        from moe_dist.kernels.triton.fused_moe import Config

        config = config_from(Config, values)
        config.check(spec.quant)
        return config

    def prepare(self, weights: ExpertWeights) -> None:
        super().prepare(weights)
        self._tiles: dict[tuple[int, int, int], Any] = {}

    def pipeline_with(self, step: Step, rows: TokenRows, config: Config) -> TritonPipeline:
        from moe_dist.kernels.triton.fused_moe import TritonPipeline

        return TritonPipeline(step, rows, self._weights, config, self._tiles)
