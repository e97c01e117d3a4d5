"""What can't be computed, saved or differentiated is refused by name, before anything of a model is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit
from tiny_models import COMMON, COPIED, experts_of, outputs, prompts, tiny

from moe_dist.errors import ConfigError, InstallationError, UnsupportedError
from moe_dist.integrations.transformers import register, replace_experts
from moe_dist.integrations.transformers import version as version_module
from moe_dist.integrations.transformers.forms import check_structure
from moe_dist.integrations.transformers.replacing import DistributedExperts

pytestmark = pytest.mark.stacks

# Model type, its experts class, its config's class, more of its config, and what must be said.
OTHERS: list[tuple[str, str, str, dict[str, Any], list[str]]] = [
    ("gpt_oss", "GptOssExperts", "GptOssConfig", {"num_local_experts": 4}, [
        "its experts have biases", "its weights are transposed", "rows of gate and up are interleaved",
        "an _apply_gate of its own", "gate_up_proj_bias is not known"]),
    ("openai_privacy_filter", "OpenAIPrivacyFilterExperts", "OpenAIPrivacyFilterConfig", {"num_local_experts": 4}, [
        "its experts have biases", "its weights are transposed"]),
    ("deepseek_v4", "DeepseekV4Experts", "DeepseekV4Config", {"n_routed_experts": 4}, ["an _apply_gate of its own"]),
    ("muse_spark", "MuseSparkExperts", "MuseSparkTextConfig", {"num_local_experts": 4, "moe_hidden_size": 64}, [
        "it normalizes each expert's output"]),
    ("aria", "AriaExperts", "AriaTextConfig", {"moe_num_experts": 4}, ["its weights are transposed"]),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "experts", "config", "more", "said"), OTHERS, ids=[each[0] for each in OTHERS])
def test_experts_of_another_form(model_type: str, experts: str, config: str, more: dict[str, Any], said: list[str]):
    from importlib import import_module

    import transformers

    modeling = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    common = {name: value for name, value in COMMON.items() if not name.endswith("_token_id")}
    module = getattr(modeling, experts)(getattr(transformers, config)(**{**common, **more}))
    with pytest.raises(UnsupportedError) as error:
        check_structure(module, "layers.0.experts")
    assert f"layers.0.experts, a {experts} of transformers is not supported" in str(error.value)
    for text in said:
        assert text in str(error.value)
    with pytest.raises(UnsupportedError, match=said[0]):
        register() and call(module)
    if model_type in COPIED:
        assert "(supported: replace_experts, which lays weights out anew)" in str(error.value)
        module.limit = 6.0
    with pytest.raises(UnsupportedError, match=said[0]):
        replace_experts(module, token_layout="replicated")


def call(module: Any) -> torch.Tensor:
    module.config._experts_implementation = "moe_dist"
    hidden = getattr(module, "hidden_dim", getattr(module, "hidden_size", 64))
    with torch.no_grad():
        y: torch.Tensor = module(torch.zeros(2, hidden), torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2))
    return y


def changed(**attributes: Any) -> Any:
    """Experts of Mixtral with something else about them."""
    model = tiny("mixtral")
    for module in experts_of(model).values():
        for name, value in attributes.items():
            setattr(module, name, value)
    return model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"act_fn": torch.nn.GELU()}, "its activation GELU with a gate"),
        ({"act_fn": torch.nn.ReLU()}, "its activation ReLU with a gate"),
        ({"scale": torch.nn.Parameter(torch.ones(6))}, "its tensor scale is not known here"),
        ({"norm": torch.nn.LayerNorm(8)}, "its part norm has weights of its own"),
        ({"gate_up_proj": torch.nn.Parameter(torch.ones(6, 64, 64))}, "which do not belong together"),
        ({"down_proj": None}, "it has no down_proj"),
    ],
    ids=["gelu", "relu", "a tensor", "a part", "shapes", "nothing"],
)
def test_something_else_about_usual_experts(change: dict[str, Any], said: str) -> None:
    register()
    model = changed(**change)
    with pytest.raises(UnsupportedError, match=said):
        replace_experts(model, token_layout="replicated")
    assert len(experts_of(model)) == 2  # nothing was replaced
    model.set_experts_implementation("moe_dist")
    with pytest.raises(UnsupportedError, match=said):
        outputs(model, prompts(1, 3))


def test_tanh_gelu_is_ours() -> None:
    model = changed(act_fn=torch.nn.GELU(approximate="tanh"))
    eager = outputs(model, prompts(2, 5))
    replace_experts(model, token_layout="replicated")
    torch.testing.assert_close(outputs(model, prompts(2, 5)), eager, atol=2e-5, rtol=0)


def test_dtypes_and_places_that_no_layer_has() -> None:
    register()
    half = tiny("mixtral", torch.float16)
    with pytest.raises(UnsupportedError, match=r"its weights are torch\.float16"):
        replace_experts(half, token_layout="replicated")
    half.set_experts_implementation("moe_dist")
    with pytest.raises(UnsupportedError, match=r"its weights are torch\.float16"):
        outputs(half, prompts(1, 3))
    with pytest.raises(UnsupportedError, match="not here"):
        replace_experts(tiny("mixtral").to("meta"), token_layout="replicated")
    hooked = tiny("mixtral")
    hooked.model.layers[0].mlp.experts._hf_hook = object()
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.mlp\.experts.*accelerate"):
        replace_experts(hooked, token_layout="replicated")


def test_experts_that_were_never_loaded() -> None:
    model = tiny("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3].zero_()
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.experts: weights\.w2.*expert 3 was not loaded"):
        replace_experts(model, token_layout="replicated")
    assert len(experts_of(model)) == 2  # the first layer was fit, and is left as it was


def test_gradients() -> None:
    register()
    model, ids = tiny("mixtral"), prompts(1, 3)
    model.set_experts_implementation("moe_dist")
    with pytest.raises(ConfigError, match=r"hidden_states\.requires_grad.*no_grad"):
        model(ids)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("down_proj" in name)
    with pytest.raises(ConfigError, match=r"experts\.requires_grad"):
        model(ids)
    model.requires_grad_(False)
    model(ids)
    model.requires_grad_(True)
    replace_experts(model, token_layout="replicated")
    with pytest.raises(ConfigError, match=r"hidden_states\.requires_grad"):
        model(ids)
    with torch.inference_mode():
        model(ids)


def test_what_a_model_with_replaced_experts_can_not_do(tmp_path: Any) -> None:
    model = tiny("mixtral")
    replace_experts(model, token_layout="replicated")
    for save in (model.save_pretrained, model.model.save_pretrained, model.push_to_hub):
        with pytest.raises(UnsupportedError, match=r"after replace_experts.*no checkpoint has that form"):
            save(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UnsupportedError, match="set_experts_implementation after replace_experts"):
        model.set_experts_implementation("eager")
    with pytest.raises(UnsupportedError, match="a second time"):
        replace_experts(model, token_layout="replicated")


@pytest.mark.parametrize(
    ("stored", "dtype", "said"),
    [
        ({}, torch.bfloat16, r"layer 1 has dtype 'fp32', and model\.layers\.1\.mlp\.experts has 'bf16'"),
        ({"num_experts": 4}, torch.float32, r"layer 0 has num_experts 4, and .* has 6"),
    ],
    ids=["dtype", "experts"],
)
def test_a_checkpoint_of_another_form_is_refused_before_anything_is_replaced(
    tmp_path: Path, stored: dict[str, Any], dtype: torch.dtype, said: str
) -> None:
    """The first layer's dtype is the model's in any case."""
    tiny("qwen3_moe", **stored).save_pretrained(tmp_path)
    edit(tmp_path, {"dtype": ...}, lambda tensors: {
        name: tensor.to(dtype) if "layers.0.mlp.experts" in name else tensor
        for name, tensor in tensors.items()})  # fmt: skip
    model = tiny("qwen3_moe", dtype)
    with pytest.raises(ConfigError, match=rf"^checkpoint = .*{said}"):
        replace_experts(model, token_layout="replicated", checkpoint=tmp_path)
    assert not any(isinstance(module, DistributedExperts) for module in model.modules())


def test_generate_on_a_gpu_sets_no_other_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes batched_mm for decoding where the model has grouped_mm, which is the default."""
    model = tiny("mixtral")
    model.set_experts_implementation("grouped_mm")
    replace_experts(model, token_layout="replicated")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with model._optimize_model_for_decode():
        outputs(model, prompts(1, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"token_layout": "even"}, ConfigError, r"token_layout = 'even': .*legal: replicated, sharded"),
        ({"tp": 2}, ConfigError, r"tp · ep = 2: .*number of ranks in the process group, 1"),
        ({"exchange": "alltoall"}, ConfigError, r"exchange = 'alltoall'.*did you mean all_to_all"),
        ({"backend": "cuda"}, ConfigError, r"backend = 'cuda': no backend has this name"),
        ({"backend": "triton"}, UnsupportedError, "backend triton"),
        ({"quant": "int4"}, ConfigError, "quant = 'int4'"),
        ({"quant": "fp8_block"}, ConfigError, "quant = 'fp8_block': the layer is stored as fp32"),
        ({"graph_buckets": (8,)}, UnsupportedError, r"graph_buckets = \(8,\) is not supported: .*CUDA"),
        ({"graph_buckets": (8, 4)}, ConfigError, r"graph_buckets = \(8, 4\): are not ascending"),
        ({"graph_buckets": 8}, ConfigError, "graph_buckets = 8: are sizes of steps"),
        ({"timeout_s": 0}, ConfigError, "timeout_s = 0"),
        ({"top_k": 7}, ConfigError, r"model\.top_k = 7"),
        ({"expert_map": (0, 0)}, ConfigError, r"parallel\.expert_map"),
        ({"replicas": {9: [0]}}, ConfigError, r"parallel\.replicas = 9"),
        ({"replicas": 3}, ConfigError, r"parallel\.replicas = 3"),
        ({"expert_map": 3}, ConfigError, r"parallel\.expert_map = 3"),
        ({"tp": "2"}, ConfigError, r"parallel\.tp = '2'"),
        ({"tp": 0}, ConfigError, r"parallel\.tp = 0"),
        ({"group": "a group"}, ConfigError, r"torch\.distributed is not initialized"),
        ({"model": "mixtral"}, ConfigError, "model = 'str': is no module"),
    ],
    ids=str,
)
def test_arguments_that_can_not_be(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    model = tiny("mixtral")
    with pytest.raises(error, match=said):
        replace_experts(**{"model": model, "token_layout": "replicated", **arguments})
    assert len(experts_of(model)) == 2


def test_a_model_without_experts_and_a_config_without_top_k() -> None:
    with pytest.raises(UnsupportedError, match=r"experts of a Linear.*has_gate"):
        replace_experts(torch.nn.Linear(2, 2), token_layout="replicated")
    model = tiny("mixtral")
    for module in experts_of(model).values():
        module.config = object()
    with pytest.raises(ConfigError, match="top_k = None: the model's config has none of num_experts_per_tok"):
        replace_experts(model, token_layout="replicated")
    replace_experts(model, token_layout="replicated", top_k=3)
    outputs(model, prompts(1, 3))


def test_a_top_k_that_is_not_the_routers() -> None:
    model = tiny("mixtral")
    replace_experts(model, token_layout="replicated", top_k=2)
    with pytest.raises(ConfigError, match=r"routing\.ids = \(3, 3\): wrong shape"):
        outputs(model, prompts(1, 3))


def test_a_backend_that_re_lays_weights_may_not_have_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is flashinfer_cutlass. The model's weights are as they were afterwards."""
    from moe_dist.backends.torch_reference import TorchBackend

    prepare = TorchBackend.prepare

    def turning(self: Any, weights: Any) -> None:
        weights.turn(gate_first=False)
        prepare(self, weights)

    monkeypatch.setattr(TorchBackend, "prepare", turning)
    register()
    model, ids = tiny("mixtral"), prompts(1, 3)
    eager = outputs(model, ids)
    model.set_experts_implementation("moe_dist")
    with pytest.raises(UnsupportedError, match=r"backend torch without replace_experts.*re-lays weights in place"):
        outputs(model, ids)
    model.set_experts_implementation("eager")
    assert torch.equal(outputs(model, ids), eager)
    replace_experts(model, token_layout="replicated")
    torch.testing.assert_close(outputs(model, ids), eager, atol=2e-5, rtol=0)


@pytest.mark.parametrize("lacks", ["ALL_EXPERTS_FUNCTIONS", "ALL_FP8_EXPERTS_FUNCTIONS", "EPImplementationInterface"])
def test_versions_that_lack_a_registry(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    homes = (version_module.MOE, version_module.FP8, version_module.EXPERT_PARALLEL)
    home = next(each for each in homes if hasattr(import_module(each), lacks))
    monkeypatch.delattr(f"{home}.{lacks}")
    if lacks == "ALL_EXPERTS_FUNCTIONS":
        said = f"has no {home}.{lacks}.register; this was checked against transformers 5.24.0"
        with pytest.raises(InstallationError, match=said):
            register()
    else:
        had = register()
        assert [had.fp8_experts, had.expert_parallel] == [lacks[0] == "E", lacks[0] != "E"]


def test_experts_of_a_version_that_lacks_a_flag() -> None:
    model = tiny("mixtral")
    for module in experts_of(model).values():
        del module.is_concatenated
    with pytest.raises(InstallationError, match=r"no flag is_concatenated on MixtralExperts.*5\.24\.0"):
        replace_experts(model, token_layout="replicated")
