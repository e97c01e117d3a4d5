"""How a rank computes the weighted partial sum of the experts it holds."""

from moe_dist.backends.base import Backend, Problem
from moe_dist.registry import Registry

BACKENDS: Registry[Backend] = Registry(
    "backend",
    {
        "torch": "moe_dist.backends.torch_reference:TorchBackend",
        "triton": "moe_dist.backends.triton_fused:TritonFused",
        "cutlass": "moe_dist.backends.cutlass_fused:CutlassFused",
        "deep_gemm": "moe_dist.backends.deep_gemm_grouped:DeepGemm",
        "deep_gemm_mega": "moe_dist.backends.deep_gemm_mega:DeepGemmMega",
        "flashinfer_cutlass": "moe_dist.backends.flashinfer_cutlass:FlashInferCutlass",
    },
    Backend,
)

__all__ = ["BACKENDS", "Backend", "Problem"]
