"""What is refused before anything is loaded, and with which words: written down by hand, for every backend and
exchange. And what is not, so that nobody can pass by refusing more."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from moe_dist.backends import BACKENDS
from moe_dist.engine.plan import Plan
from moe_dist.engine.planning import make_plan
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.machine.machine import Machine
from moe_dist.model.spec import MoESpec, ParallelSpec
from moe_dist.step.rows import Support

CPU = Machine("cpu", 1, "a test's CPU")
H200 = Machine("cuda", 8, "NVIDIA H200", (9, 0), 141 << 30)
WHOLE = "deep_gemm_mega"  # computes whole layers, behind exchange fused only
GPU_BACKENDS = ("triton", "cutlass", "deep_gemm", "flashinfer_cutlass")
FP8_KINDS = ("fp8_block", "fp8_channel", "fp8_tensor_static", "fp8_tensor_dynamic")


def made(machine: Machine, backend: str, quant: str, exchange: str = "ag_rs", **changes: Any) -> Plan:
    asked = {name: changes.pop(name) for name in ("payload", "combine_dtype", "token_layout", "graph")
             if name in changes}  # fmt: skip
    parallel = ParallelSpec(**changes.pop("parallel", {"ep": 2}))
    sizes = {"hidden": 256, "intermediate": 768, "num_experts": 8, "top_k": 2}
    spec = MoESpec(**sizes | changes, quant=quant)
    return make_plan(spec, parallel, exchange=exchange, backend=backend, machine=machine, **asked)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine on which every backend is built."""
    for name in (*GPU_BACKENDS, WHOLE):
        monkeypatch.setattr(BACKENDS.get(name), "available", classmethod(lambda cls, device: Support(True)))
    return H200


# backend, format, what else is asked for, the reason
ON_A_CPU = [
    *((name, "fp8_block", {}, "needs an NVIDIA Hopper GPU (SM90)") for name in GPU_BACKENDS),
    ("torch", "fp8_block", {"exchange": "local"}, "one rank only, not 2"),
    (WHOLE, "fp8_block", {"exchange": "fused"}, "needs an NVIDIA Hopper GPU (SM90)"),
    (WHOLE, "fp8_block", {"exchange": "fused"}, "needs GPUs that reach each other through NVLink"),
    (WHOLE, "fp8_block", {}, "backend deep_gemm_mega computes whole layers, and goes with exchange fused alone"),
    ("torch", "fp8_block", {"exchange": "fused"},
     "exchange fused goes with a backend that computes whole layers alone (deep_gemm_mega)"),
    ("torch", "fp8_tensor_dynamic", {"payload": "unquantized"}, "belongs to the source rank and travels only with FP8"),
    ("torch", "fp8_block", {"payload": "fp8", "exchange": "all_reduce", "token_layout": "replicated"},
     "no token row travels here"),
    ("torch", "fp8_block", {"payload": "fp8", "exchange": "local", "parallel": {}}, "no token row travels here"),
    ("torch", "none", {"payload": "fp8"}, "the model is not quantized"),
    ("torch", "fp8_block", {"payload": "fp16"}, "legal: auto, unquantized, fp8"),
    ("torch", "fp8_block", {"combine_dtype": "fp16"}, "legal: bf16, fp32"),
    ("torch", "fp8_block", {"parallel": {"tp": 8}}, "legal: 1 to 6"),  # six blocks of 128
    ("torch", "fp8_block", {"parallel": {"ep": 9}}, "legal: 1 to 8"),
    ("torch", "fp8_block", {"graph": True}, "backend torch is not capturable"),
    ("torch", "fp8_block", {"shared_experts": "tp", "shared_intermediate": 256, "exchange": "all_to_all"},
     "its slices need every token on every rank"),
]  # fmt: skip
ON_HOPPER = [
    ("triton", "none", {"dtype": "fp32"}, "takes rows as bf16, none, not fp32"),
    ("triton", "none", {"dtype": "fp32", "exchange": "local", "parallel": {}}, "bf16 and FP8 layers, not fp32"),
    ("triton", "fp8_channel", {"hidden": 16400}, "needs hidden (16400) and slices (768) of at most 16384"),
    ("triton", "none", {"hidden": 200}, "in multiples of 16"),
    ("triton", "fp8_block", {"exchange": "local"}, "one rank only, not 2"),
    ("cutlass", "none", {}, "computes FP8 layers, not bf16"),
    ("cutlass", "fp8_block", {"hidden": 200}, "in multiples of 16"),
    ("cutlass", "fp8_block", {"num_experts": 1026}, "takes at most 512 experts on a rank, not 513"),
    *((name, "fp8_block", {"activation": "swigluoai", "expert_bias": True},
       "computes swiglu, geglu, relu2, not swigluoai") for name in ("cutlass", "deep_gemm")),
    *((name, "fp8_block", {"expert_bias": True}, "computes experts without biases, and model.expert_bias is True")
      for name in ("cutlass", "deep_gemm")),
    *(("flashinfer_cutlass", "none", asked, "were never checked against the oracle on a GPU")
      for asked in ({"activation": "swigluoai"}, {"expert_bias": True})),
    *(("deep_gemm", quant, {}, f"computes fp8_block, not {quant}") for quant in FP8_KINDS[1:]),
    ("deep_gemm", "fp8_block", {"hidden": 2880}, "in whole blocks of 128"),
    ("flashinfer_cutlass", "fp8_block", {"activation": "geglu"}, "computes swiglu, relu2, not geglu"),
    ("flashinfer_cutlass", "fp8_channel", {}, "takes bf16, fp8_block and fp8_tensor_static, not fp8_channel"),
    ("flashinfer_cutlass", "fp8_tensor_dynamic", {}, "travels only with FP8 rows"),
    ("flashinfer_cutlass", "fp8_block", {"payload": "fp8"}, "does not take rows already quantized here"),
    ("flashinfer_cutlass", "fp8_block", {"intermediate": 320, "parallel": {"tp": 2}}, "in whole blocks of 128"),
    ("flashinfer_cutlass", "fp8_block", {"combine_dtype": "fp32"}, "gives partial sums in bf16, not fp32"),
    *((WHOLE, "fp8_block", {"exchange": name}, "goes with exchange fused alone") for name in ("nvlink", "all_to_all")),
    *((name, "fp8_block", {"exchange": "fused"}, "computes whole layers alone (deep_gemm_mega)")
      for name in GPU_BACKENDS),
    *((WHOLE, "fp8_block", {"exchange": "fused"} | asked, words) for asked, words in (
        ({"parallel": {"tp": 2}}, "whole experts in equal runs"),
        ({"parallel": {"tp": 2, "ep": 2}}, "whole experts in equal runs"),
        ({"parallel": {}}, "over two ranks or more"),
        ({"parallel": {"ep": 3}}, "whole experts in equal runs"),
        ({"parallel": {"ep": 2, "replicas": {0: [1]}}}, "whole experts in equal runs"),
        ({"parallel": {"ep": 2, "expert_map": (1, 1, 1, 1, 0, 0, 0, 0)}}, "whole experts in equal runs"),
        ({"activation": "relu2"}, "computes swiglu, not relu2"),
        ({"activation": "swigluoai"}, "computes swiglu, not swigluoai"),
        ({"expert_bias": True}, "computes experts without biases"),
        ({"shared_experts": "replicated", "shared_intermediate": 256}, "computes no shared expert"),
        ({"combine_dtype": "fp32"}, "gives partial sums in bf16, not fp32"),
        ({"payload": "unquantized"}, "takes rows as fp8, not bf16"),
        ({"intermediate": 4224}, "at most 4096, not 4224"),
        ({"hidden": 2880}, "in whole blocks of 128"),
        ({"hidden": 1536}, "in 4 parts of whole 256s, which hidden (1536) has not"),
        ({"hidden": 896}, "in 7 parts of whole 256s, which hidden (896) has not"),
        ({"num_experts": 64, "top_k": 33}, "at most 32 experts for a token, not 33"),
    )),
]  # fmt: skip


def refused(machine: Machine, backend: str, quant: str, asked: dict[str, Any]) -> str:
    with pytest.raises((ConfigError, UnsupportedError)) as error:
        made(machine, backend, quant, **asked)
    return str(error.value)


@pytest.mark.parametrize(("backend", "quant", "asked", "words"), ON_A_CPU)
def test_on_a_cpu(backend: str, quant: str, asked: dict[str, Any], words: str) -> None:
    assert words in refused(CPU, backend, quant, asked)


@pytest.mark.parametrize(("backend", "quant", "asked", "words"), ON_HOPPER)
def test_on_hopper(hopper: Machine, backend: str, quant: str, asked: dict[str, Any], words: str) -> None:
    assert words in refused(hopper, backend, quant, asked)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_on_another_gpu(hopper: Machine, backend: str) -> None:
    blackwell = Machine("cuda", 8, "NVIDIA B200", (10, 0), 180 << 30)
    said = refused(blackwell, backend, "fp8_block", {})
    assert re.search(r"needs compute capability 9\.0, not \(10, 0\).*supported: .*torch", said), said


# backend, format: what rows travel as under EP2 with ag_rs
TAKEN = {
    "torch": {"none": "bf16"} | dict.fromkeys(FP8_KINDS, "fp8"),
    "triton": {"none": "bf16"} | dict.fromkeys(FP8_KINDS, "fp8"),
    "cutlass": dict.fromkeys(FP8_KINDS, "fp8"),
    "deep_gemm": {"fp8_block": "fp8"},
    "flashinfer_cutlass": {"none": "bf16", "fp8_block": "bf16", "fp8_tensor_static": "fp8"},
    WHOLE: {"fp8_block": "fp8"},
}


@pytest.mark.parametrize("backend", TAKEN)
def test_what_is_not_refused(hopper: Machine, backend: str) -> None:
    found = {}
    for quant in ("none", *FP8_KINDS):
        try:
            plan = made(hopper, backend, quant, "fused" if backend == WHOLE else "ag_rs")
        except (ConfigError, UnsupportedError):
            continue
        assert (plan.backend, plan.combine_dtype, plan.out_dtype) == (backend, "bf16", torch.bfloat16)
        found[quant] = plan.payload
    assert found == TAKEN[backend]


def test_every_backend_is_in_the_lists() -> None:
    assert set(TAKEN) == {"torch", *GPU_BACKENDS, WHOLE} == set(BACKENDS.names()), (
        "write down what a new backend refuses"
    )
