"""bf16 and FP8 experts of transformers, layer by layer against the oracle: logits of bf16 models differ wherever a
token's routing flips. transformers' own FP8 runs on GPUs only, so its modules are filled and called directly."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tiny_models import experts_of, outputs, prompts, tiny

from moe_dist import Comm, ExpertWeights, MoESpec, ParallelSpec, Routing
from moe_dist.errors import ConfigError, UnsupportedError
from moe_dist.integrations.transformers import register, replace_experts
from moe_dist.integrations.transformers.forms import tensors_of
from moe_dist.integrations.transformers.kept import Kept
from moe_dist.integrations.transformers.settings import Settings
from moe_dist.model.placement import Placement
from moe_dist.model.weights import quantize_weights
from moe_dist.oracle.numerics import Numerics
from moe_dist.oracle.reference import oracle_layer, relative_error

pytestmark = pytest.mark.stacks

TOKENS, EXPERTS, HIDDEN, WIDTH, TOP_K = 9, 4, 256, 384, 2
ALONE = ParallelSpec()


def drawn(gated: bool = True, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """x, ids, weights as transformers has them, and dense w13 and w2."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K).indices
    weights = torch.rand(TOKENS, TOP_K, generator=generator).to(dtype)
    w13 = torch.randn(EXPERTS, WIDTH * (2 if gated else 1), HIDDEN, generator=generator).to(dtype) / 16
    return x, ids, weights, w13, torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator).to(dtype) / 16


def error(y: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, held: ExpertWeights) -> float:
    """Against the oracle with these weights, which quantizes rows as their kind says."""
    dtype = "fp32" if x.dtype == torch.float32 else "bf16"
    spec = MoESpec(
        hidden=HIDDEN, intermediate=WIDTH, num_experts=EXPERTS, top_k=TOP_K, quant=held.kind, dtype=dtype,
        activation="swiglu" if held.gated else "relu2",
    )  # fmt: skip
    routing = Routing(ids.int(), weights.float())
    placement = Placement.build(spec, ALONE)
    exact = oracle_layer(x, routing, [held], spec, placement, [(0, len(x))], routing.ids_TK * 0, Numerics())
    return relative_error(y, exact)


def fp8_experts(held: ExpertWeights, scale_fmt: str = "float", **changes: Any) -> Any:
    """An FP8Experts module with these weights, in the layout that transformers gives them."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    config = SimpleNamespace(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        hidden_act="silu" if held.gated else "relu2", _experts_implementation="moe_dist", **changes,
    )  # fmt: skip
    with_flags = use_experts_implementation(
        type("FP8Experts", (FP8Experts,), {}), experts_interface=ALL_FP8_EXPERTS_FUNCTIONS, has_gate=held.gated
    )
    static = held.a13 is not None
    module = with_flags(
        config, block_size=(128, 128) if held.kind == "fp8_block" else None, scale_fmt=scale_fmt, has_gate=held.gated,
        activation_scheme="static" if static else "dynamic",
    )  # fmt: skip
    first = "gate_up_proj" if held.gated else "up_proj"
    s13, s2 = held.s13, held.s2
    assert s13 is not None
    assert s2 is not None
    if held.kind == "fp8_channel":  # all rows of a matrix alike
        s13, s2 = s13[:, ::WIDTH, None], s2[:, :1, None]
    elif held.kind == "fp8_tensor_static":
        s13, s2 = s13[..., None], s2[..., None]
    filled = {first: held.w13_eFH, "down_proj": held.w2_eHi, f"{first}_scale_inv": s13, "down_proj_scale_inv": s2}
    for name, tensor in filled.items():
        parameter = getattr(module, name)
        assert parameter.shape == tensor.shape
        setattr(module, name, torch.nn.Parameter(tensor.to(parameter.dtype), requires_grad=False))
    if static:
        assert held.a2 is not None
        spread = torch.linspace(0.5, 1.0, EXPERTS)  # of which a layer takes the largest
        module.gate_up_proj_activation_scale = torch.nn.Parameter(held.a13 * spread, requires_grad=False)
        module.down_proj_activation_scale = torch.nn.Parameter(held.a2, requires_grad=False)
    return module.requires_grad_(False)


def quantized(kind: str, gated: bool = True, power_of_two: bool = False) -> ExpertWeights:
    _, _, _, w13, w2 = drawn(gated)
    spec = MoESpec(hidden=HIDDEN, intermediate=WIDTH, num_experts=EXPERTS, top_k=TOP_K, quant=kind,
                   activation="swiglu" if gated else "relu2")  # fmt: skip
    if kind == "fp8_channel":  # one scale a matrix: read as one for each row
        by_tensor = quantize_weights(w13, w2, spec.with_changes(quant="fp8_tensor_dynamic"))
        s13, s2 = by_tensor.s13.repeat_interleave(WIDTH, 1), by_tensor.s2.repeat_interleave(HIDDEN, 1)
        return ExpertWeights(kind, gated, by_tensor.w13_eFH, by_tensor.w2_eHi, s13, s2)
    made = quantize_weights(w13, w2, spec)
    if kind == "fp8_tensor_static":
        made = made.with_tensors(a13=torch.tensor(0.01), a2=torch.linspace(0.02, 0.05, EXPERTS))
    if power_of_two:
        made = made.with_tensors(s13=made.s13.log2().ceil().exp2(), s2=made.s2.log2().ceil().exp2())
    return made


@pytest.mark.parametrize(
    ("kind", "gated", "scale_fmt"),
    [
        ("fp8_block", True, "float"),
        ("fp8_block", True, "ue8m0"),
        ("fp8_block", False, "float"),
        ("fp8_channel", True, "float"),
        ("fp8_tensor_static", True, "float"),
    ],
)
def test_fp8_experts_are_within_the_oracles_tolerance(kind: str, gated: bool, scale_fmt: str) -> None:
    register()
    held = quantized(kind, gated, power_of_two=scale_fmt == "ue8m0")
    x, ids, weights, *_ = drawn(gated)
    module = fp8_experts(held, scale_fmt)
    with torch.no_grad():
        y = module(x, ids, weights)
    assert error(y, x, ids, weights, held) < Numerics().tolerance
    model = torch.nn.ModuleDict({"experts": module})
    replace_experts(model, token_layout="replicated")
    with torch.no_grad():
        assert torch.equal(model["experts"](x, ids, weights), y)


@pytest.mark.parametrize("quant", ["none", "fp8_block", "fp8_channel", "fp8_tensor_dynamic"])
def test_bf16_experts_and_what_they_are_quantized_to(quant: str) -> None:
    model = tiny("qwen3_moe", torch.bfloat16, hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=EXPERTS,
                 num_experts_per_tok=TOP_K, num_hidden_layers=1)  # fmt: skip
    x, ids, weights, w13, w2 = drawn()
    module = experts_of(model)["model.layers.0.mlp.experts"]
    with torch.no_grad():
        module.gate_up_proj.copy_(w13)
        module.down_proj.copy_(w2)
        eager = module(x, ids, weights)
        spec = MoESpec(hidden=HIDDEN, intermediate=WIDTH, num_experts=EXPERTS, top_k=TOP_K, quant=quant)
        replace_experts(model, token_layout="replicated", quant=quant)
        layer = model.model.layers[0].mlp.experts
        assert layer.layer.plan.spec.quant == quant
        y = layer(x, ids, weights)
    assert y.dtype == torch.bfloat16
    assert error(y, x, ids, weights, quantize_weights(w13, w2, spec)) < Numerics().tolerance
    assert relative_error(y, eager.float()) < (1e-2 if quant == "none" else 8e-2)


def test_whole_bf16_and_quantized_models_run() -> None:
    register()
    model, ids = tiny("deepseek_v3", torch.bfloat16), prompts(2, 7)
    model.set_experts_implementation("moe_dist")
    assert outputs(model, ids).isfinite().all()
    replace_experts(model, token_layout="replicated", quant="fp8_block")
    assert outputs(model, ids).isfinite().all()
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 10)


def test_originals_are_freed_and_others_are_left_alone() -> None:
    model = tiny("mixtral")
    others = {name: tensor for name, tensor in model.named_parameters() if ".experts." not in name}
    gone = [weakref.ref(module.gate_up_proj) for module in experts_of(model).values()]
    seen = []
    replace_experts(model, token_layout="replicated", progress=lambda: seen.append([ref() is None for ref in gone]))
    assert seen == [[True, False], [True, True]]
    left = dict(model.named_parameters())
    assert left.keys() == others.keys()
    assert all(left[name] is tensor for name, tensor in others.items())


def test_layers_on_tensors_that_are_gone_are_gone_too() -> None:
    """One is kept for each top-k of the tensors that the model has now."""
    module, other = fp8_experts(quantized("fp8_block")), fp8_experts(quantized("fp8_block"))
    kept, comm = Kept(ParallelSpec(), "replicated", Settings()), Comm.single()
    first = [kept.steps(module, tensors_of(module), top_k, comm) for top_k in (1, 2)]
    assert [kept.steps(module, tensors_of(module), top_k, comm) for top_k in (1, 2)] == first
    gone = weakref.ref(first.pop())
    kept.steps(other, tensors_of(other), 1, comm)
    assert gone() is None


def test_static_scales_where_a_rank_has_its_own_experts_only() -> None:
    """A layer has one scale for what goes into it, the largest of all experts."""
    module = fp8_experts(quantized("fp8_tensor_static"))
    kept = Kept(ParallelSpec(ep=2), "replicated", Settings())
    with pytest.raises(UnsupportedError, match=r"static scales under ep_implementation.*supported: replace_experts"):
        kept.steps(module, tensors_of(module), TOP_K, Mock(world=2))


def test_forms_of_fp8_that_are_refused() -> None:
    held = quantized("fp8_block")

    def refused(module: Any, said: str) -> None:
        with pytest.raises(UnsupportedError, match=said):
            replace_experts(torch.nn.ModuleDict({"experts": module}), token_layout="replicated")

    odd = fp8_experts(held)
    odd.block_size = (64, 128)
    refused(odd, r"its blocks are \(64, 128\), not \(128, 128\)")
    for clamp in ("swiglu_limit", "mlp_gate_softcap"):
        refused(fp8_experts(held, **{clamp: 7.0}), "its activation is clamped")
    across = fp8_experts(held)  # 2 · 192 rows are three blocks, and the second one is of gate and of up
    for name, tensor in {
        "gate_up_proj": held.w13_eFH[:, :384], "gate_up_proj_scale_inv": held.s13[:, :3],
        "down_proj": held.w2_eHi[..., :192], "down_proj_scale_inv": held.s2[..., :2],
    }.items():  # fmt: skip
        setattr(across, name, torch.nn.Parameter(tensor.clone(), requires_grad=False))
    refused(across, r"a block of its scales covers rows of gate and of up \(intermediate size 192\)")
    fp4 = fp8_experts(held)
    fp4.gate_up_proj = torch.nn.Parameter(torch.zeros(EXPERTS, 2 * WIDTH, HIDDEN, dtype=torch.int8), False)
    refused(fp4, r"its weights are torch\.int8 and torch\.float8_e4m3fn")
    with pytest.raises(ConfigError, match="quant = 'fp8_channel': the layer is stored as fp8_block"):
        replace_experts(
            torch.nn.ModuleDict({"experts": fp8_experts(held)}), token_layout="replicated", quant="fp8_channel"
        )
