"""vLLM's own plugin loader, registry, factory, runner, loader and custom op with our layer in them, on a CPU by the
reference backend. Its CUDA kernels and the packages that it only imports are not there, so the routing is given."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from experts import SPEC, TOLERANCE, drawn, error, expected, pieces

os.environ["MOE_DIST_VLLM_BACKEND"] = "torch"  # as a server is started

from vllm import plugins
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, MoERunner
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from moe_dist.backends import BACKENDS
from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.errors import ConfigError, InstallationError, UnsupportedError
from moe_dist.integrations.vllm import VLLM, register, served
from moe_dist.integrations.vllm.layer import MoeDistRoutedExperts
from moe_dist.integrations.vllm.method import MoeDistFp8Method
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing
from moe_dist.model.spec import ParallelSpec
from moe_dist.model.weights import shard

pytestmark = pytest.mark.stacks

PREFIX = "model.layers.0.mlp.experts"

plugins.load_general_plugins()  # vLLM's own: by the entry point of this package


@contextmanager
def server(**changes: Any) -> Iterator[VllmConfig]:
    config = VllmConfig(device_config=DeviceConfig(device="cpu"))
    with set_current_vllm_config(config):
        yield config


def blocks(**changes: Any) -> Fp8Config:
    given = {"is_checkpoint_fp8_serialized": True, "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return Fp8Config(**(given | changes))


def given_routing(hidden_states: Any, gating_output: torch.Tensor, topk: int, renormalize: bool) -> Any:
    """vLLM's place for a routing function of the model's: the logits are ids and weights behind each other."""
    ids_TK, weights_TK = gating_output.chunk(2, 1)
    return weights_TK.contiguous(), ids_TK.to(torch.int32).contiguous()


def layer_of(**changes: Any) -> MoERunner:
    """vLLM's own, as its model files make it."""
    given = {
        "num_experts": SPEC.num_experts, "top_k": SPEC.top_k, "hidden_size": SPEC.hidden,
        "intermediate_size": SPEC.intermediate, "params_dtype": torch.bfloat16, "quant_config": blocks(),
        "prefix": PREFIX, "tp_size": 1, "dp_size": 1, "pcp_size": 1, "custom_routing_function": given_routing,
    }  # fmt: skip
    return FusedMoEFactory(**(given | changes))


def load(layer: RoutedExperts, weights: Any) -> None:
    """By vLLM's own loader, from tensors as a checkpoint has them."""
    for expert, shard_id, matrix, scales in pieces(weights):
        stem = "w2" if shard_id == "w2" else "w13"
        for suffix, tensor in (("weight", matrix), ("weight_scale_inv", scales)):
            param = getattr(layer, f"{stem}_{suffix}")
            assert param.weight_loader.supports_moe_loading
            param.weight_loader(param, tensor, f"{stem}_{suffix}", shard_id=shard_id, expert_id=expert)


def loaded(layer: MoERunner, weights: Any) -> MoERunner:
    load(layer.routed_experts, weights)
    model = SimpleNamespace(dtype=torch.bfloat16, word_embeddings_untied_by_checkpoint=False, quantization="fp8")
    process_weights_after_loading(layer, model, torch.device("cpu"))
    return layer


def run(layer: MoERunner, config: VllmConfig, x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Through vLLM's custom op, which its compiled models and its CUDA graphs have."""
    logits = torch.cat([routing.ids_TK.float(), routing.weights_TK], 1)
    with torch.inference_mode(), set_forward_context(None, config):
        return layer(x_TH, logits)


class UpFirst(TorchBackend):
    """The reference, for [up; gate] alone, as flashinfer_cutlass is."""

    gate_first = False

    def prepare(self, weights: Any) -> None:
        weights.turn(gate_first=False)
        super().prepare(weights)


def test_the_plugin_is_loaded_by_entry_point() -> None:
    assert op_registry_oot["RoutedExperts"] is MoeDistRoutedExperts
    register()  # again: nothing is there twice
    assert MoeDistRoutedExperts.backend == "torch"


@pytest.mark.parametrize("backend", ["torch", UpFirst])
def test_a_layer_gives_what_the_oracle_says(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend is UpFirst:
        monkeypatch.setitem(BACKENDS._targets, "torch", UpFirst)
    weights, x_TH, routing = drawn()
    with server() as config:
        layer = loaded(layer_of(), weights)
        assert type(layer.routed_experts) is MoeDistRoutedExperts
        assert isinstance(layer.routed_experts.quant_method, MoeDistFp8Method)
        found = run(layer, config, x_TH, routing)
        empty = run(layer, config, x_TH[:0], Routing(routing.ids_TK[:0], routing.weights_TK[:0]))
    assert found.dtype == torch.bfloat16
    assert error(found, expected(weights, x_TH, routing)) < TOLERANCE
    assert empty.shape == (0, SPEC.hidden)


def test_the_gate_of_gelu() -> None:
    spec = SPEC.with_changes(activation="geglu")
    weights, x_TH, routing = drawn(spec)
    with server() as config:
        layer = loaded(layer_of(activation="gelu_tanh"), weights)
        assert error(run(layer, config, x_TH, routing), expected(weights, x_TH, routing, spec)) < TOLERANCE


def test_vllm_does_the_shared_expert_and_the_scaling() -> None:
    weights, x_TH, routing = drawn()
    shared = torch.nn.Linear(SPEC.hidden, SPEC.hidden, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    with server() as config:
        layer = loaded(
            layer_of(shared_experts=shared, routed_scaling_factor=2.5, apply_routed_scale_to_output=True), weights
        )
        found = run(layer, config, x_TH, routing)
    right = 2.5 * expected(weights, x_TH, routing) + shared(x_TH).float()
    assert error(found, right) < TOLERANCE


def place(tp: int = 1, ep: int = 1, rank: int = 0, **changes: Any) -> FusedMoEParallelConfig:
    """What vLLM makes of --tensor-parallel-size, and of --enable-expert-parallel."""
    given = {
        "tp_size": tp, "pcp_size": 1, "dp_size": 1, "ep_size": ep, "tp_rank": rank if tp > 1 else 0, "pcp_rank": 0,
        "dp_rank": 0, "ep_rank": rank if ep > 1 else 0, "sp_size": 1, "use_ep": ep > 1,
        "all2all_backend": "allgather_reducescatter", "enable_eplb": False,
    }  # fmt: skip
    return FusedMoEParallelConfig(**(given | changes))


def experts_of(parallel: FusedMoEParallelConfig, quant_config: Any = None, **changes: Any) -> RoutedExperts:
    """vLLM's layer of one of several ranks, without the groups of processes that its factory asks for."""
    manager = ExpertMapManager(
        max_num_batched_tokens=64, top_k=SPEC.top_k, global_num_experts=SPEC.num_experts, num_redundant_experts=0,
        num_expert_group=None, moe_parallel_config=parallel, placement_strategy="linear", enable_eplb=False,
    )  # fmt: skip
    known = layer_of(prefix=f"{PREFIX}.plain").moe_config
    given = {field.name: getattr(known, field.name) for field in dataclasses.fields(FusedMoEConfig) if field.init}
    given |= {"moe_parallel_config": parallel, "num_local_experts": manager.local_num_experts}
    of_layer = {name: changes.pop(name) for name in ("apply_router_weight_on_input",) if name in changes}
    moe_config = FusedMoEConfig(**(given | changes))
    return RoutedExperts(
        PREFIX, torch.bfloat16, moe_config, blocks() if quant_config is None else quant_config, manager, **of_layer
    )


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["tp", "ep"])
def test_ranks_hold_what_vllm_gives_them(kind: str, rank: int) -> None:
    weights, x_TH, routing = drawn()
    parallel = ParallelSpec(tp=2) if kind == "tp" else ParallelSpec(ep=2)
    with server():
        layer = experts_of(place(**{kind: 2}, rank=rank))
        load(layer, weights)
        layer.quant_method.process_weights_after_loading(layer)
        found = layer.forward_modular(x_TH, routing.weights_TK, routing.ids_TK)
    held = shard(weights, Placement.build(SPEC, parallel), rank)
    assert layer.w13_weight.shape == held.w13_eFH.shape
    assert error(found, expected(held, x_TH, routing, SPEC, parallel, rank)) < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"swiglu_limit": 7.0}, "swiglu_limit = 7.0 is not computed here, only None"),
        ({"activation": "gelu"}, "activation gelu is not computed here"),
        ({"has_bias": True}, "has_bias = True"),
        ({"apply_router_weight_on_input": True}, "router weights are applied to inputs"),
        ({"params_dtype": torch.float16}, "in_dtype = torch.float16 is not computed here, only torch.bfloat16"),
        ({"quant_config": None}, "its format is no quantization, only vLLM's Fp8Config"),
        ({"quant_config": blocks(weight_block_size=[64, 128])}, r"weight_block_size is \[64, 128\], only \[128, 128\]"),
        ({"quant_config": blocks(weight_block_size=None)}, "weight_block_size is None"),
        ({"quant_config": Fp8Config(True, "static")}, "activation_scheme is static, only dynamic"),
        ({"quant_config": blocks(ignored_layers=[PREFIX])}, "the checkpoint leaves it unquantized"),
    ],
)
def test_what_is_not_computed_is_refused_when_the_layer_is_made(changes: dict[str, Any], said: str) -> None:
    with server(), pytest.raises(UnsupportedError, match=said) as refused:
        layer_of(**changes)
    assert str(refused.value).startswith(f"MOE_DIST_VLLM_BACKEND for layer {PREFIX} is not supported")


@pytest.mark.parametrize(
    ("parallel", "changes", "said"),
    [
        (place(ep=2, use_ep=True, dp_size=2, all2all_backend="deepep_low_latency"), {}, "deepep_low_latency is part"),
        (place(enable_eplb=True), {}, "experts are moved by EPLB"),
        (place(tp=2), {"intermediate_size": 320}, "slices of 160 cut blocks of 128"),
        (place(), {"moe_backend": "triton"}, "moe_backend = 'triton' is not computed here, only 'auto'"),
        (place(), {"is_lora_enabled": True}, "is_lora_enabled = True"),
    ],
)
def test_other_deployments_are_refused(parallel: Any, changes: dict[str, Any], said: str) -> None:
    with server(), pytest.raises(UnsupportedError, match=said):
        experts_of(parallel, **changes)


@pytest.mark.parametrize("name", ["triton", "cutlass", "flashinfer_cutlass", "deep_gemm"])
def test_without_a_hopper_gpu_the_fast_backends_say_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MoeDistRoutedExperts, "backend", name)
    with server(), pytest.raises(UnsupportedError, match=r"needs compute capability 9\.0, not None"):
        layer_of()


def test_a_model_s_own_routed_experts_are_refused() -> None:
    class OfAModel(RoutedExperts):
        pass

    with server(), pytest.raises(UnsupportedError, match="the model brings OfAModel, a RoutedExperts of its own"):
        layer_of(routed_experts_cls=OfAModel)


def test_weights_are_loaded_once() -> None:
    weights, x_TH, routing = drawn()
    with server() as config:
        layer = layer_of()
        with pytest.raises(ConfigError, match="or never were"):
            run(layer, config, x_TH, routing)
        loaded(layer, weights)
        experts = layer.routed_experts
        with pytest.raises(ConfigError, match="can't be loaded again in a running server"):
            load(experts, weights)
        with pytest.raises(ConfigError, match="can't be loaded again in a running server"):
            experts.quant_method.process_weights_after_loading(experts)
        experts.w2_weight = torch.nn.Parameter(experts.w2_weight.data.clone(), requires_grad=False)
        with pytest.raises(ConfigError, match="moved or replaced after they had been prepared"):
            run(layer, config, x_TH, routing)


def test_a_field_that_a_later_version_adds_is_refused_if_it_is_used() -> None:
    later = dataclasses.make_dataclass("FusedMoEConfig", [("new_clamp", float | None, None)], bases=(FusedMoEConfig,))
    with server():
        layer = experts_of(place())
        known = [field.name for field in dataclasses.fields(FusedMoEConfig) if field.init]
        plain = {name: getattr(layer.moe_config, name) for name in known}
        layer.moe_config = later(**plain)
        served.spec_of(layer, PREFIX, blocks())
        layer.moe_config = later(**plain, new_clamp=7.0)
        with pytest.raises(UnsupportedError, match=r"new_clamp = 7\.0 is unknown here"):
            served.spec_of(layer, PREFIX, blocks())


def test_without_the_variable_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dist.integrations.vllm.registering.register_layer", lambda name: pytest.fail(name))
    monkeypatch.setenv("MOE_DIST_VLLM_BACKEND", "")
    register()
    monkeypatch.delenv("MOE_DIST_VLLM_BACKEND")
    register()


def test_what_can_t_be_registered_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_DIST_VLLM_BACKEND", "cutlas")
    with pytest.raises(ConfigError, match="no backend has this name; did you mean cutlass"):
        register()
    monkeypatch.setenv("MOE_DIST_VLLM_BACKEND", "torch")
    monkeypatch.setitem(op_registry_oot, "RoutedExperts", int)
    with pytest.raises(ConfigError, match=r"another plugin has put builtins\.int in the place of vLLM's RoutedExperts"):
        register()
    monkeypatch.delattr(RoutedExperts, "_get_quant_method")
    said = rf"vllm {VLLM.installed()} has no .*RoutedExperts\._get_quant_method; .* checked against vllm 0\.33\.0"
    with pytest.raises(InstallationError, match=said):
        register()
