"""Every model family that is read, against a float32 reading of its files that is written here from the family's
published formulas: names on disk, experts, router, shared expert. Sources: the modeling files of transformers 5.24,
src/transformers/models/<model_type>/modeling_<model_type>.py, and its conversion_mapping.py for names on disk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FILE, edit, whole
from safetensors.torch import load_file

from moe_dist import load_layer
from moe_dist.checkpoint import (
    Checkpoint,
    check_layer,
    layer_spec,
    load_router,
    load_shard,
    load_shared_shard,
    make_checkpoint,
    read_config,
)
from moe_dist.checkpoint.config import MODEL_TYPES
from moe_dist.checkpoint.quantizing import quantize_checkpoint
from moe_dist.checkpoint.synthetic_configs import MODEL_TYPES as MADE
from moe_dist.checkpoint.whole import WholeExperts
from moe_dist.errors import CheckpointError, ConfigError, UnsupportedError
from moe_dist.model.placement import Placement
from moe_dist.model.routing import Routing, route
from moe_dist.model.spec import ParallelSpec

LAYER, E, K, H, I, T = 1, 8, 2, 256, 256, 32
SIZES: dict[str, Any] = {"hidden": H, "intermediate": I, "num_experts": E, "top_k": K, "layers": 2, "shards": 1}
Tensors = dict[str, torch.Tensor]
Weigh = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def best(scores: torch.Tensor, choice: torch.Tensor, normalize: bool, scaling: float = 1.0) -> torch.Tensor:
    """Weights [T, E] of the K experts that are first in `choice`."""
    weights = torch.zeros_like(scores)
    for token in range(len(scores)):
        chosen = choice[token].argsort(descending=True)[:K]
        weights[token, chosen] = scores[token, chosen]
    return scaling * (weights / weights.sum(1, keepdim=True) if normalize else weights)


def in_groups(choice: torch.Tensor, groups: int, kept: int, best_of: int) -> torch.Tensor:
    """`choice` with -inf outside of the `kept` groups whose `best_of` highest sum highest."""
    found = torch.full_like(choice, -torch.inf)
    for token, row in enumerate(choice.view(len(choice), groups, -1)):
        order = row.sort(descending=True).values[:, :best_of].sum(1).argsort(descending=True)
        for group in order[:kept].tolist():
            size = choice.shape[1] // groups
            found[token, group * size : (group + 1) * size] = row[group]
    return found


def softmax(normalize: bool) -> Weigh:
    """MixtralTopKRouter, OlmoeTopKRouter, Qwen2MoeTopKRouter and their like."""
    return lambda logits, bias: best(logits.softmax(1), logits, normalize)


def deepseek_v3(logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """DeepseekV3TopkRouter: 4 groups, 2 of them kept."""
    scores = logits.sigmoid()
    return best(scores, in_groups(scores + bias, 4, 2, best_of=2), normalize=True, scaling=2.5)


def deepseek_v2(logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """DeepseekV2TopkRouter, group_limited_greedy: 4 groups, 2 of them kept, by their best expert; not normalized."""
    scores = logits.softmax(1)
    return best(scores, in_groups(scores, 4, 2, best_of=1), normalize=False, scaling=2.5)


def one_group(scaling: float) -> Weigh:
    """Glm4MoeTopkRouter and NemotronHTopkRouter with one group; MiniMaxM2TopKRouter."""
    return lambda logits, bias: best(logits.sigmoid(), logits.sigmoid() + bias, True, scaling)


def ernie(logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Ernie4_5_MoeTopKRouter: chosen by probability + bias, weighed by the probability."""
    return best(logits.softmax(1), logits.softmax(1) + bias, normalize=True)


def gpt_oss(logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """GptOssTopKRouter: the softmax of the top k logits alone."""
    values, ids = logits.topk(K)
    return torch.zeros_like(logits).scatter_(1, ids, values.softmax(1))


def llama4(logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Llama4Router: the sigmoid of the largest logit."""
    values, ids = logits.max(1, keepdim=True)
    return torch.zeros_like(logits).scatter_(1, ids, 1 / (1 + (-values).exp()))


@dataclass(frozen=True)
class Form:
    weigh: Weigh
    block: str = f"model.layers.{LAYER}.mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    bias: str | None = None
    shared: str | None = None
    gated_shared: bool = False
    transposed: bool = False  # and fused, where it isn't quantized
    router: str = "gate"
    interleaved: bool = False  # gate and up in turns, with biases of experts and of the router
    on_input: bool = False  # the router's weight multiplies what goes into an expert
    top_k: int = K


V3 = Form(deepseek_v3, bias="gate.e_score_correction_bias", shared="shared_experts")
QWEN2 = Form(softmax(False), shared="shared_expert", gated_shared=True)
MIXTRAL = Form(softmax(True), f"model.layers.{LAYER}.block_sparse_moe", "w1", "w3", "w2")
INSIDE = f"model.language_model.layers.{LAYER}.mlp"
LLAMA4 = Form(
    llama4, f"language_model.model.layers.{LAYER}.feed_forward", shared="shared_expert", transposed=True,
    router="router", on_input=True, top_k=1,
)  # fmt: skip
FORMS = {
    "deepseek_v2": Form(deepseek_v2, shared="shared_experts"),
    "deepseek_v3": V3,
    "deepseek_v32": V3,
    "kimi_k2": V3,
    "kimi_k25": replace(V3, block=f"language_model.model.layers.{LAYER}.mlp"),
    "glm4_moe": replace(V3, weigh=one_group(2.5)),
    "glm4_moe_lite": replace(V3, weigh=one_group(2.5)),
    "glm4v_moe": replace(V3, weigh=one_group(2.5), block=INSIDE),
    "qwen2_moe": QWEN2,
    "qwen3_moe": Form(softmax(True)),
    "qwen3_next": replace(QWEN2, weigh=softmax(True)),
    "qwen3_vl_moe": Form(softmax(True), block=INSIDE, transposed=True),
    "qwen3_5_moe": replace(QWEN2, weigh=softmax(True), block=INSIDE),
    "mixtral": MIXTRAL,
    "minimax_m2": replace(MIXTRAL, weigh=one_group(1.0), bias="e_score_correction_bias"),
    "olmoe": Form(softmax(False)),
    "ernie4_5_moe": Form(ernie, bias="moe_statics.e_score_correction_bias", shared="shared_experts"),
    "gpt_oss": Form(gpt_oss, transposed=True, router="router", interleaved=True),
    "llama4": LLAMA4,
    "llama4_text": replace(LLAMA4, block=f"model.layers.{LAYER}.feed_forward"),
    "nemotron_h": Form(
        one_group(2.5), f"backbone.layers.{LAYER}.mixer", None, bias="gate.e_score_correction_bias",
        shared="shared_experts",
    ),
}  # fmt: skip


def stored(*formats: str) -> list[tuple[str, str]]:
    """Each family with each format that it is made in."""
    return [(family, quant) for family, form in FORMS.items() for quant in formats
            if quant == "none" or not form.interleaved]  # fmt: skip


def sizes_of(model_type: str) -> dict[str, Any]:
    return SIZES | {"top_k": FORMS[model_type].top_k}


def test_every_family_is_tested() -> None:
    assert set(FORMS) == set(MODEL_TYPES) == set(MADE)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("families")

    def make(model_type: str, quant: str = "none", **options: Any) -> Path:
        name = "-".join(map(str, (model_type, quant, *options.values())))
        return make_checkpoint(root / name, model_type=model_type, quant=quant, **sizes_of(model_type) | options)

    return make


def matrix(tensors: Tensors, name: str) -> torch.Tensor:
    """In float32; one scale for each block of 128×128, if there are any."""
    dense, scales = tensors[name].float(), tensors.get(f"{name}_scale_inv")
    if scales is None:
        return dense
    return dense * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: dense.shape[0], : dense.shape[1]]


def expert(tensors: Tensors, form: Form, number: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """w13 [gate; up] and w2, as y = w2 · act(w13 · x) has them. None: the shared one."""
    prefix = f"{form.block}.{form.shared}" if number is None else f"{form.block}.experts.{number}"
    fused = tensors.get(f"{form.block}.experts.gate_up_proj")
    if number is not None and fused is not None:
        assert form.transposed
        first = fused[number].float().T
        first = torch.cat([first[0::2], first[1::2]]) if form.interleaved else first
        return first, tensors[f"{form.block}.experts.down_proj"][number].float().T
    first = [matrix(tensors, f"{prefix}.{name}.weight") for name in (form.gate, form.up) if name]
    return torch.cat(first), matrix(tensors, f"{prefix}.{form.down}.weight")


def biases(tensors: Tensors, form: Form, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of w13 and of w2, for [gate; up]."""
    first, second = (tensors[f"{form.block}.experts.{name}_proj_bias"][number].float() for name in ("gate_up", "down"))
    return torch.cat([first[0::2], first[1::2]]), second


def through(x: torch.Tensor, tensors: Tensors, form: Form, number: int | None) -> torch.Tensor:
    """SwiGLU, or relu² where there is no gate (NemotronHExperts), or clamped and with biases (GptOssExperts)."""
    w13, w2 = expert(tensors, form, number)
    inner = x @ w13.T
    if form.interleaved and number is not None:
        b13, b2 = biases(tensors, form, number)
        gate, up = (inner + b13).chunk(2, 1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * (1.702 * gate).sigmoid() * (up + 1) @ w2.T + b2
    if form.gate is None:
        return inner.relu() ** 2 @ w2.T
    gate, up = inner[:, : len(w13) // 2], inner[:, len(w13) // 2 :]
    return gate * gate.sigmoid() * up @ w2.T


def weights_of(x: torch.Tensor, tensors: Tensors, form: Form) -> torch.Tensor:
    bias = tensors[f"{form.block}.{form.bias}"].float().flatten() if form.bias else None
    logits = x @ tensors[f"{form.block}.{form.router}.weight"].float().T
    return form.weigh(logits + tensors[f"{form.block}.router.bias"].float() if form.interleaved else logits, bias)


def dense(routing: Routing) -> torch.Tensor:
    return torch.zeros(routing.tokens, E).scatter_(1, routing.ids_TK.long(), routing.weights_TK)


def in_float32(directory: Path, model_type: str, **sizes: Any) -> Path:
    """A made checkpoint whose tensors are float32; config.json does not say which dtype they have."""
    make_checkpoint(directory, model_type=model_type, quant="none", **sizes_of(model_type) | sizes)
    config = json.loads((directory / "config.json").read_text())
    config.get("text_config", config).pop("torch_dtype")
    return edit(directory, config | ({} if "text_config" in config else {"torch_dtype": ...}), as_float)


def as_float(tensors: Tensors) -> Tensors:
    return {name: tensor.float() for name, tensor in tensors.items()}


X = torch.randn(T, H, generator=torch.Generator().manual_seed(3))


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def output_error(loaded: Path, written: Path, form: Form) -> float:
    """Of the layer in `loaded`, against the formulas on the files in `written`."""
    tensors = load_file(written / FILE)
    layer = load_layer(loaded, LAYER)
    weights = weights_of(X, tensors, form)
    if form.on_input:
        wanted = sum(through(weights[:, [number]] * X, tensors, form, number) for number in range(E))
    else:
        wanted = sum(weights[:, [number]] * through(X, tensors, form, number) for number in range(E))
    if form.shared:
        gate = tensors[f"{form.block}.shared_expert_gate.weight"].float() if form.gated_shared else None
        wanted = wanted + through(X, tensors, form, None) * (1.0 if gate is None else (X @ gate.T).sigmoid())
    assert isinstance(wanted, torch.Tensor)
    return difference(layer(X), wanted)


@pytest.mark.parametrize("family", FORMS)
def test_the_layer_is_the_family_s_formula(tmp_path: Path, family: str) -> None:
    directory = in_float32(tmp_path / "model", family)
    assert output_error(directory, directory, FORMS[family]) < 1e-5


@pytest.mark.parametrize(("family", "quant"), stored("none", "fp8_block"))
def test_experts_and_router_are_what_the_files_hold(made: Any, family: str, quant: str) -> None:
    directory, form = made(family, quant), FORMS[family]
    tensors = load_file(directory / FILE)
    spec = check_layer(directory, LAYER, shared=form.shared is not None).spec
    assert (spec.quant, spec.gated, spec.shared_gate) == (quant, form.gate is not None, form.gated_shared)
    weights, apart = whole(directory, LAYER), WholeExperts(directory, LAYER)
    for number in range(E):
        wanted = expert(tensors, form, number)
        gate, up, down = apart.expert(number)
        for found in (weights.dequantized(number), (torch.cat([gate, up]), down)):
            assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
        if form.interleaved:
            of_number = biases(tensors, form, number)
            for found in ((weights.b13_eF[number], weights.b2_eH[number]), apart.biases(number)):
                assert all(torch.equal(*pair) for pair in zip(found, of_number, strict=True))
    router = load_router(directory, LAYER)
    logits = X @ router.gate_EH.float().T
    found = route(logits if router.logit_bias_E is None else logits + router.logit_bias_E, spec, router.bias_E)
    assert torch.allclose(dense(found), weights_of(X, tensors, form), atol=1e-6)
    assert torch.equal(apart.router()[0], router.gate_EH.float())
    for one, other in zip(apart.router()[1:], (router.bias_E, router.logit_bias_E), strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize(("family", "quant"), stored("none", "fp8_block"))
def test_a_rank_reads_its_own_slices_and_no_more(made: Any, family: str, quant: str) -> None:
    directory, form = made(family, quant), FORMS[family]
    tensors, spec = load_file(directory / FILE), check_layer(directory, LAYER).spec
    placement = Placement.build(spec, ParallelSpec(tp=2, ep=2))
    for rank in range(4):
        source, told = Checkpoint(directory), []
        shard = load_shard(source, LAYER, placement, rank, progress=lambda told=told: told.append(1))
        start, stop = placement.slice_of(rank)
        assert len(told) == len(placement.experts_of(rank)) == E // 2
        in_memory = sum(tensor.nbytes for tensor in shard.biases.values())  # in float32, and bf16 in the files
        on_disk = 2 * sum(tensor.numel() for name, tensor in shard.biases.items() if name == "b13_eF" or not start)
        assert source.bytes_read == shard.nbytes() - in_memory + on_disk
        for slot, number in enumerate(placement.experts_of(rank)):
            w13, w2 = expert(tensors, form, number)
            halves = w13.chunk(2 if form.gate else 1)
            found = shard.dequantized(slot)
            assert torch.equal(found[0], torch.cat([half[start:stop] for half in halves]))
            assert torch.equal(found[1], w2[:, start:stop])


class Recorded(Checkpoint):
    """Keeps the names of the tensors that are read, and how often."""

    def read(self, name: str, *index: slice) -> torch.Tensor:
        self.names = Counter(getattr(self, "names", Counter()))
        self.names[name] += 1
        return super().read(name, *index)


@pytest.mark.parametrize(("family", "quant"), stored("none", "fp8_block", "fp8_tensor_static"))
def test_every_tensor_of_a_layer_is_read_once(made: Any, family: str, quant: str) -> None:
    """By all ranks together, but for the layer's static scales, which every rank reads."""
    directory, form = made(family, quant), FORMS[family]
    source, of_layer = Recorded(directory), {name for name in load_file(directory / FILE) if form.block in name}
    spec = check_layer(source, LAYER).spec
    placement = Placement.build(spec, ParallelSpec(ep=2))
    for rank in range(2):
        load_shard(source, LAYER, placement, rank)
    load_router(source, LAYER)
    if form.shared:
        load_shared_shard(source, LAYER, 0, spec.shared_intermediate)
    assert set(source.names) == of_layer
    fused = form.transposed and quant == "none"
    for name, times in source.names.items():
        if name.endswith("input_scale") and form.down not in name:
            assert times == 2 + (form.shared is not None)
        else:
            twice = "gate_up" in name and not form.interleaved
            wanted = E * (2 if twice else 1) if fused and "experts." in name else 1
            assert times == wanted, name


# What must not pass


def swapped(form: Form) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        if form.transposed and not form.interleaved:
            turned = {name: torch.cat(value.chunk(2, -1)[::-1], -1)
                      for name, value in tensors.items() if "gate_up" in name}  # fmt: skip
            return tensors | turned
        if form.interleaved:
            turned = {name: value.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
                      for name, value in tensors.items() if "gate_up" in name}  # fmt: skip
            return tensors | turned
        names = {f".{form.gate}.": f".{form.up}.", f".{form.up}.": f".{form.gate}."}
        return {
            next((name.replace(a, b) for a, b in names.items() if a in name), name): value
            for name, value in tensors.items()
        }

    return change


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
def test_swapped_gate_and_up_would_be_seen(tmp_path: Path, family: str) -> None:
    right, wrong = (in_float32(tmp_path / name, family) for name in ("right", "wrong"))
    edit(wrong, None, swapped(FORMS[family]))
    assert output_error(wrong, right, FORMS[family]) > 0.1


def test_a_wrong_transposition_would_be_seen(tmp_path: Path) -> None:
    """With H = 2I both ways to lie are one shape of gate_up_proj, and down_proj tells which one it is. transformers
    reads both, and writes the other one than the models were published with."""
    family = "qwen3_vl_moe"
    form = FORMS[family]
    right, wrong = (in_float32(tmp_path / name, family, intermediate=H // 2) for name in ("right", "wrong"))
    name = f"{form.block}.experts.gate_up_proj"
    edit(wrong, None, lambda tensors: tensors | {name: tensors[name].transpose(1, 2)})
    assert output_error(right, right, form) < 1e-5
    assert output_error(wrong, right, form) > 0.1
    down = f"{form.block}.experts.down_proj"
    edit(wrong, None, lambda tensors: tensors | {down: tensors[down].transpose(1, 2)})
    assert output_error(wrong, right, form) < 1e-5
    gate, up, whole_down = WholeExperts(wrong, LAYER).expert(3)
    assert torch.equal(torch.cat([gate, up]), expert(load_file(right / FILE), form, 3)[0])
    assert torch.equal(whole_down, expert(load_file(right / FILE), form, 3)[1])
    mixed = in_float32(tmp_path / "mixed", family, intermediate=384)
    edit(mixed, None, lambda tensors: tensors | {name: tensors[name].transpose(1, 2)})
    with pytest.raises(CheckpointError, match=r"down_proj has shape \(8, 384, 256\), .* for \(8, 256, 384\)"):
        check_layer(mixed, LAYER)


@pytest.mark.parametrize("family", ["mixtral", "nemotron_h", "ernie4_5_moe"])
def test_tensors_are_neither_left_over_nor_missing(tmp_path: Path, family: str) -> None:
    form = FORMS[family]
    names = [f"experts.7.{form.up}.weight", f"experts.0.{form.down}.weight_scale_inv", "gate.weight"]
    names += [form.bias] * bool(form.bias) + [f"{form.shared}.{form.up}.weight"] * bool(form.shared)
    for number, name in enumerate(names):
        directory = make_checkpoint(tmp_path / f"gap{number}", model_type=family, **SIZES)
        edit(directory, None, lambda tensors, gone=f"{form.block}.{name}": without(tensors, gone))
        with pytest.raises(CheckpointError, match=rf"1 tensor is missing: {form.block}\.{name}"):
            check_layer(directory, LAYER, shared=form.shared is not None)
    for name in (f"experts.8.{form.up}.weight", f"experts.0.{form.up}.bias", "fc1_latent_proj.weight", "router.scale"):
        directory = make_checkpoint(tmp_path / f"extra {name}", model_type=family, **SIZES)
        edit(directory, None, lambda tensors, more=f"{form.block}.{name}": tensors | {more: torch.ones(2)})
        with pytest.raises(CheckpointError, match=rf"nothing here reads: {form.block}\.{name}"):
            check_layer(directory, LAYER)


def test_biases_are_neither_left_over_nor_missing(tmp_path: Path) -> None:
    block, sizes = FORMS["gpt_oss"].block, SIZES | {"model_type": "gpt_oss", "quant": "none"}
    for number, name in enumerate(("experts.gate_up_proj_bias", "experts.down_proj_bias", "router.bias")):
        directory = make_checkpoint(tmp_path / f"gap{number}", **sizes)
        edit(directory, None, lambda tensors, gone=f"{block}.{name}": without(tensors, gone))
        with pytest.raises(CheckpointError, match=rf"1 tensor is missing: {block}\.{name}"):
            check_layer(directory, LAYER)
    changes: list[tuple[str, Any, str]] = [
        ("experts.up_proj_bias", lambda bias: torch.ones(2), "nothing here reads"),
        ("experts.gate_up_proj_blocks", lambda bias: torch.ones(2), "nothing here reads"),
        ("experts.down_proj_bias", lambda bias: bias[:, 1:], r"has shape \(8, 255\)"),
        ("experts.gate_up_proj_bias", lambda bias: bias.half(), "has dtype F16"),
        ("experts.gate_up_proj", lambda weight: weight.transpose(1, 2), r"has shape \(8, 512, 256\)"),
    ]
    for number, (name, change, said) in enumerate(changes):
        directory, full = make_checkpoint(tmp_path / f"other{number}", **sizes), f"{block}.{name}"
        edit(directory, None, lambda tensors, full=full, change=change: tensors | {full: change(tensors.get(full))})
        with pytest.raises(CheckpointError, match=said):
            check_layer(directory, LAYER)
    directory, full = make_checkpoint(tmp_path / "values", **sizes), f"{block}.experts.down_proj_bias"
    edit(directory, None, lambda tensors: tensors | {full: tensors[full] * 0})
    assert not whole(directory, LAYER).b2_eH.any()  # zeros are biases too
    edit(directory, None, lambda tensors: tensors | {full: tensors[full] + torch.nan})
    with pytest.raises(CheckpointError, match=r"down_proj_bias, expert 0, holds NaN"):
        whole(directory, LAYER)


@pytest.mark.parametrize("family", ["llama4", "llama4_text"])
def test_a_weight_on_the_other_side_of_an_expert_would_be_seen(tmp_path: Path, family: str) -> None:
    directory = in_float32(tmp_path / "model", family)
    assert output_error(directory, directory, replace(FORMS[family], on_input=False)) > 0.03
    assert output_error(directory, directory, replace(FORMS[family], weigh=softmax(False))) > 0.03


def test_the_best_logit_is_chosen_where_sigmoids_are_1(tmp_path: Path) -> None:
    """From 17 on float32 has one sigmoid for all logits."""
    directory = in_float32(tmp_path / "model", "llama4")
    router = f"{LLAMA4.block}.router.weight"
    edit(directory, None, lambda tensors: tensors | {router: 200 * tensors[router]})
    weights = weights_of(X, load_file(directory / FILE), LLAMA4)
    assert int((weights == 1).sum()) > T / 2
    assert output_error(directory, directory, LLAMA4) < 1e-5


def test_what_is_left_over_missing_or_turned_in_llama4(tmp_path: Path) -> None:
    block, sizes = LLAMA4.block, SIZES | {"model_type": "llama4", "quant": "none", "top_k": 1, "intermediate": 384}
    for number, name in enumerate(("experts.down_proj", "router.weight", "shared_expert.up_proj.weight")):
        directory = make_checkpoint(tmp_path / f"gap{number}", **sizes)
        edit(directory, None, lambda tensors, gone=f"{block}.{name}": without(tensors, gone))
        with pytest.raises(CheckpointError, match=rf"1 tensor is missing: {block}\.{name}"):
            check_layer(directory, LAYER, shared=True)
    directory = make_checkpoint(tmp_path / "no first", **sizes)
    edit(directory, None, lambda tensors: without(tensors, f"{block}.experts.gate_up_proj"))
    with pytest.raises(CheckpointError, match=r"1 tensor is missing: .*experts\.0\.gate_proj\.weight"):
        check_layer(directory, LAYER)
    changes: list[tuple[str, Any, str]] = [
        ("experts.gate_up_proj_bias", lambda bias: torch.ones(2), "nothing here reads"),
        ("experts.0.up_proj.weight", lambda weight: torch.ones(2), "which of them counts is not said"),
        ("router.bias", lambda bias: torch.ones(2), "nothing here reads"),
        ("shared_expert_gate.weight", lambda gate: torch.ones(2), "nothing here reads"),
        ("shared_experts.up_proj.weight", lambda weight: torch.ones(2), "nothing here reads"),
        ("experts.gate_up_proj", lambda weight: weight.transpose(1, 2), r"has shape \(8, 768, 256\)"),
        ("experts.down_proj", lambda weight: weight.transpose(1, 2), r"has shape \(8, 256, 384\)"),
        ("router.weight", lambda weight: weight[1:], r"has shape \(7, 256\)"),
    ]
    for number, (name, change, said) in enumerate(changes):
        directory, full = make_checkpoint(tmp_path / f"other{number}", **sizes), f"{block}.{name}"
        edit(directory, None, lambda tensors, full=full, change=change: tensors | {full: change(tensors.get(full))})
        with pytest.raises(CheckpointError, match=said):
            check_layer(directory, LAYER, shared=True)
    with pytest.raises(ConfigError, match=r"top_k = 2: a token of Llama 4 goes to one expert \(legal: 1\)"):
        make_checkpoint(tmp_path / "two", **sizes | {"top_k": 2})
    with pytest.raises(UnsupportedError, match=r"shared_experts.*times their weights.*supported: none, replicated"):
        load_layer(make_checkpoint(tmp_path / "whole", **sizes), LAYER, shared_experts="tp")


def test_a_vision_model_s_layers_are_none_of_the_text_model_s(made: Any, tmp_path: Path) -> None:
    """Llama 4's have the same numbers, and an MLP each. A text model by itself has none beside it."""

    def with_vision(family: str) -> Path:
        directory = make_checkpoint(tmp_path / family, model_type=family, quant="none", **sizes_of(family))
        return edit(directory, None, lambda tensors: tensors | {
            f"vision_model.model.layers.{layer}.{name}": torch.ones(2)
            for layer in range(3) for name in ("mlp.fc1.weight", "mlp.fc1.bias", "self_attn.q_proj.weight")
        })  # fmt: skip

    x, directory = X.bfloat16(), with_vision("llama4")
    assert check_layer(directory, LAYER, shared=True).spec.num_experts == E
    assert torch.equal(load_layer(directory, LAYER)(x), load_layer(made("llama4"), LAYER)(x))
    with pytest.raises(CheckpointError, match=r"nothing here reads: vision_model\.model\.layers\.1\.mlp"):
        check_layer(with_vision("llama4_text"), LAYER)


def test_llama4_is_quantized_when_it_is_loaded_and_written_anew(made: Any, tmp_path: Path) -> None:
    bf16 = made("llama4")
    wanted = load_layer(bf16, LAYER)(X.bfloat16()).float()
    for quant in ("fp8_block", "fp8_channel", "fp8_tensor_dynamic"):
        found = load_layer(bf16, LAYER, quant=quant)(X.bfloat16()).float()
        assert 5e-3 < difference(found, wanted) < 8e-2, quant
    written = quantize_checkpoint(bf16, tmp_path / "fp8")
    assert layer_spec(written, LAYER) == layer_spec(bf16, LAYER, "fp8_block").with_changes(name="fp8")
    again = load_layer(written, LAYER, shared_experts="none")(X.bfloat16())
    assert torch.equal(again, load_layer(bf16, LAYER, shared_experts="none", quant="fp8_block")(X.bfloat16()))


def test_what_can_not_be_made_of_experts_with_biases(made: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="its experts have biases, with which no FP8 checkpoint is read"):
        quantize_checkpoint(made("gpt_oss"), tmp_path / "fp8")
    with pytest.raises(UnsupportedError, match=r"quant 'fp8_block' of a synthetic gpt_oss.*supported: none"):
        made("gpt_oss", "fp8_block")
    with pytest.raises(
        ConfigError, match="quant = 'fp8_tensor_static': a bf16 checkpoint has no scales of activations"
    ):
        layer_spec(made("gpt_oss"), LAYER, "fp8_tensor_static")
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    directory = make_checkpoint(tmp_path / "blocks", **SIZES, model_type="gpt_oss", quant="none")
    in_fp8 = {"experts.gate_up_proj": torch.float8_e4m3fn, "experts.down_proj": torch.float8_e4m3fn}
    edit(directory, {"quantization_config": blocks}, lambda tensors: {
        name: tensor.to(next((dtype for end, dtype in in_fp8.items() if name.endswith(end)), tensor.dtype))
        for name, tensor in tensors.items()})  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"gate and up lie in turns are read as bf16, float32 or MXFP4"):
        layer_spec(directory, LAYER)


def test_half_an_expert_of_zeros_was_not_written(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "made", **SIZES, model_type="gpt_oss", quant="none")
    name = f"{FORMS['gpt_oss'].block}.experts.gate_up_proj"

    def no_up(tensors: Tensors) -> Tensors:
        tensors[name][3, :, 1::2] = 0
        return tensors

    edit(directory, None, no_up)
    with pytest.raises(CheckpointError, match=r"gate_up_proj, expert 3, is all zeros"):
        whole(directory, LAYER)


def without(tensors: Tensors, name: str) -> Tensors:
    return {other: tensor for other, tensor in tensors.items() if other != name}


@pytest.mark.parametrize("family", [family for family, form in FORMS.items() if form.gated_shared])
def test_a_gated_shared_expert_is_whole_on_every_rank_and_its_gate_is_there(
    made: Any, tmp_path: Path, family: str
) -> None:
    with pytest.raises(UnsupportedError, match=r"shared_experts.*sigmoid of the token.*supported: none, replicated"):
        load_layer(made(family), LAYER, shared_experts="tp")
    assert load_layer(made(family), LAYER, shared_experts="none").plan.spec.shared_experts == "none"
    name = f"{FORMS[family].block}.shared_expert_gate.weight"
    for number, (change, said) in enumerate(
        (
            (lambda tensors: without(tensors, name), "1 tensor is missing"),
            (lambda tensors: tensors | {name: tensors[name] * 0}, "is all zeros"),
            (lambda tensors: tensors | {name: tensors[name][:, 1:].clone()}, "has shape"),
        )
    ):
        directory = make_checkpoint(tmp_path / str(number), model_type=family, **SIZES)
        edit(directory, None, change)
        with pytest.raises(CheckpointError, match=said) as caught:
            load_layer(directory, LAYER)
        assert name in str(caught.value)


def test_a_layer_that_is_not_moe_is_none_of_a_hybrid_model_s(made: Any) -> None:
    assert read_config(made("nemotron_h")).moe_layers == (1,)
    assert read_config(made("qwen3_next")).moe_layers == (0, 1)
