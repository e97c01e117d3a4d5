"""Experts of transformers' families by every backend that is here: alone, with the inputs that eager experts had, and
in the whole model, decoding in graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu.ranks import backends_here
from stacks.tiny_models import FAMILIES, experts_of, outputs, prompts, tiny  # type: ignore[import-not-found]

from moe_dist.errors import MoeDistError
from moe_dist.integrations.transformers import replace_experts
from moe_dist.model.spec import QuantKind
from moe_dist.oracle.reference import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(500)]

# What Hopper's backends take: blocks of 128.
SIZES = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 128}
OWN_SIZES = {"olmoe": {"head_dim": 64}}  # the hidden size by its heads
# Formats, and the largest relative error against bf16.
FORMATS: dict[QuantKind, float] = {"none": 1e-2, "fp8_block": 8e-2, "fp8_channel": 8e-2}
REFUSED = {"none": {"cutlass", "deep_gemm"}, "fp8_block": set(), "fp8_channel": {"deep_gemm", "flashinfer_cutlass"}}
GENERATE = ["deepseek_v3", "mixtral", "nemotron_h", "qwen3_moe", "qwen3_next"]


def device_here() -> torch.device:
    pytest.importorskip("transformers")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda", torch.cuda.current_device())


def made(model_type: str, device: torch.device) -> Any:
    import transformers

    config_class = FAMILIES[model_type][0]
    if not hasattr(transformers, config_class):
        pytest.skip(f"transformers {transformers.__version__} has no {config_class}")
    return tiny(model_type, torch.bfloat16, **SIZES, **OWN_SIZES.get(model_type, {})).to(device)


def compare(model_type: str, quant: QuantKind, device: torch.device, backends: list[str]) -> None:
    model, ids = made(model_type, device), prompts(4, 24).to(device)
    given: dict[str, tuple[Any, torch.Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda _, inputs, output, name=name: given.update({name: (inputs, output)}))
        for name, module in experts_of(model).items()
    ]
    eager = outputs(model, ids)
    for hook in hooks:
        hook.remove()
    assert given
    for backend in backends:
        model = made(model_type, device)
        if backend in REFUSED[quant]:
            with pytest.raises(MoeDistError, match=backend):
                replace_experts(model, token_layout="replicated", backend=backend, quant=quant)
            continue
        names = replace_experts(model, token_layout="replicated", backend=backend, quant=quant)
        assert set(names) == set(given)
        for name in names:
            inputs, wanted = given[name]
            with torch.no_grad():
                y = model.get_submodule(name)(*inputs)
            assert (y.dtype, y.shape) == (wanted.dtype, wanted.shape)
            assert relative_error(y, wanted.float()) < FORMATS[quant], (backend, name)
        logits = outputs(model, ids)
        assert logits.isfinite().all()
        assert torch.nn.functional.cosine_similarity(logits.flatten(), eager.flatten(), dim=0) > 0.9, backend


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - {"gpt_oss"}))
def test_every_backend_gives_what_eager_experts_give(model_type: str, quant: QuantKind) -> None:
    compare(model_type, quant, device_here(), backends_here())


@pytest.mark.parametrize("quant", FORMATS)
def test_experts_with_biases_by_the_backends_that_compute_them(quant: QuantKind) -> None:
    compare("gpt_oss", quant, device_here(), [name for name in backends_here() if name in ("triton", "torch")])


@pytest.mark.parametrize("model_type", GENERATE)
def test_decoding_in_graphs_gives_the_tokens_of_eager_steps(model_type: str) -> None:
    device, ids = device_here(), prompts(4, 24)
    found = []
    for buckets in ((), (4,)):
        model = made(model_type, device)
        replace_experts(model, token_layout="replicated", quant="fp8_block", graph_buckets=buckets)
        found.append(model.generate(ids.to(device), max_new_tokens=8, do_sample=False))
    assert torch.equal(*found)
