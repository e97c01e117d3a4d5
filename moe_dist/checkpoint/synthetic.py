"""A small seeded checkpoint in the form that a model family has on disk, for tests and demonstrations."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.checkpoint.config import ModelConfig, read_config
from moe_dist.checkpoint.folder import CONFIG_LIMIT, folder, read_json
from moe_dist.checkpoint.layout import check_layer
from moe_dist.checkpoint.names import FUSED, Names
from moe_dist.checkpoint.neutral import MARK
from moe_dist.checkpoint.pieces import BIAS
from moe_dist.checkpoint.quantization import CONFIG_FILE
from moe_dist.checkpoint.reader import INDEX_FILE, SINGLE_FILE, Checkpoint
from moe_dist.checkpoint.synthetic_configs import DENSE_FIRST, MODEL_TYPES, SECTIONS, Sizes, family_config
from moe_dist.checkpoint.writing import write_tensors
from moe_dist.errors import CheckpointError, ConfigError, UnsupportedError
from moe_dist.messages.counts import count_of
from moe_dist.model.spec import LEAST_SEED, MOST_SEED, MoESpec, QuantKind
from moe_dist.model.weights import ExpertWeights, stack
from moe_dist.workloads.random_weights import random_expert
from moe_dist.workloads.streams import Stream

FORM = 2  # raised when the same parameters give other content
ROUTER_NORMS = (0.3, 3.0)  # least and largest norm of a gate row: on N(0, 1) inputs its logit's standard deviation


def make_checkpoint(
    directory: Path | str,
    *,
    hidden: int = 512,
    intermediate: int = 384,
    num_experts: int = 16,
    top_k: int = 4,
    layers: int = 2,
    model_type: str = "qwen3_moe",
    seed: int = 0,
    quant: QuantKind = "fp8_block",
    shards: int = 2,
) -> Path:
    """Write the checkpoint and return its directory; one made earlier with the same parameters is left as it is.

    It holds config.json and the MLPs (router, experts, and what the family has of dense layers and shared experts), no
    attention, no embedding. The router loads experts unequally on Gaussian inputs. One shard is written as
    model.safetensors, more of them with an index. It is complete or not there at all: it is written beside `directory`
    and renamed. Raises ConfigError (a size that can't work, a directory with other content), UnsupportedError, and
    OSError where nothing can be written.
    """
    directory = folder(directory, "directory")
    parameters = {
        "form": FORM, "hidden": hidden, "intermediate": intermediate, "num_experts": num_experts, "top_k": top_k,
        "layers": layers, "model_type": model_type, "seed": seed, "quant": quant, "shards": shards,
    }  # fmt: skip
    sizes = _checked(parameters)
    if _made_already(directory, parameters):
        return directory
    config = family_config(model_type, sizes, quant) | {MARK: parameters}
    partial = directory.resolve().with_name(f".{directory.resolve().name}.{uuid.uuid4().hex}.partial")
    try:
        _write(partial, config, seed, shards)
        _publish(partial, directory, parameters)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _checked(parameters: dict[str, Any]) -> Sizes:
    for name, supported in (("model_type", MODEL_TYPES), ("quant", tuple(SECTIONS))):
        if parameters[name] not in supported:
            what = f"{name} {parameters[name]!r} of a synthetic checkpoint"
            raise UnsupportedError(what, ["it is not written here"], supported)
    if parameters["model_type"] == "gpt_oss" and parameters["quant"] != "none":
        what = f"quant {parameters['quant']!r} of a synthetic gpt_oss checkpoint"
        raise UnsupportedError(what, ["experts with biases are read as bf16 and float32 only"], ("none",))
    if parameters["model_type"].startswith("llama4") and parameters["top_k"] != 1:
        raise ConfigError("top_k", parameters["top_k"], "a token of Llama 4 goes to one expert", (1,))
    if not LEAST_SEED <= parameters["seed"] <= MOST_SEED:
        raise ConfigError("seed", parameters["seed"], "has more than 64 bits", f"{LEAST_SEED} to {MOST_SEED}")
    dense = parameters["model_type"] in DENSE_FIRST
    if parameters["layers"] < 1 + dense:
        rule = "layer 0 is dense, so there is no MoE layer" if dense else "there is no layer"
        raise ConfigError("layers", parameters["layers"], rule, f"{1 + dense} and more")
    sizes = {key: parameters[key] for key in ("hidden", "intermediate", "num_experts", "top_k")}
    MoESpec(**sizes, quant=parameters["quant"])
    return Sizes(**sizes, layers=parameters["layers"])


def _made_already(directory: Path, parameters: dict[str, Any]) -> bool:
    """True if `directory` was made with these parameters and is whole, False if it is free; ConfigError if it holds
    other things, or not all that was made."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    rule = "is there already and is no synthetic checkpoint; name another directory"
    try:
        found = read_json(directory, CONFIG_FILE, CONFIG_LIMIT).get(MARK)
    except CheckpointError:
        found = None
    if isinstance(found, dict):
        differing = sorted(key for key in parameters.keys() | found if parameters.get(key) != found.get(key))
        if not differing:
            _require_whole(directory, parameters)
            return True
        changes = ", ".join(f"{key} is {found.get(key)}, not {parameters.get(key)}" for key in differing)
        rule = f"holds a synthetic checkpoint made otherwise ({changes}); name another directory or remove it"
    raise ConfigError("directory", str(directory), rule)


def _require_whole(directory: Path, parameters: dict[str, Any]) -> None:
    """ConfigError unless every tensor is there by the headers of its files, which are as long as these say."""
    checkpoint = Checkpoint(directory)
    try:
        config = checkpoint.config
        for layer in config.moe_layers:
            check_layer(checkpoint, layer, config.spec.shared_intermediate > 0)
        for layer in _dense_layers(config):
            for module in config.names.matrices.values():
                checkpoint.header(f"{config.names.module(layer)}.{module}.weight")
                for found in config.quantizations:
                    checkpoint.header(f"{config.names.module(layer)}.{module}.weight{found.scheme.suffix}")
        shards = len(set(checkpoint.files.values()))
        if shards != parameters["shards"]:
            problem = f"its tensors lie in {count_of(shards, 'file')}, not {parameters['shards']}"
            raise CheckpointError(directory, problem)
    except (CheckpointError, UnsupportedError, ConfigError) as error:
        rule = f"holds a synthetic checkpoint that is not whole any more ({error}); name another directory or remove it"
        raise ConfigError("directory", str(directory), rule) from error


def _publish(partial: Path, directory: Path, parameters: dict[str, Any]) -> None:
    try:
        partial.rename(directory)  # replaces an empty directory, never one that holds something
    except OSError:
        if not _made_already(directory, parameters):  # another process was faster: fine if it made the same
            raise


def _write(directory: Path, config: dict[str, Any], seed: int, shards: int) -> None:
    """The tensors are those that the written config.json asks for."""
    directory.mkdir(parents=True)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = dict(_tensors(read_config(directory), seed))
    if not 1 <= shards <= len(tensors):
        raise ConfigError("shards", shards, f"there are {len(tensors)} tensors to share out", f"1 to {len(tensors)}")
    if shards == 1:
        write_tensors(tensors, directory / SINGLE_FILE)
        return
    files = {
        name: f"model-{number * shards // len(tensors) + 1:05d}-of-{shards:05d}.safetensors"
        for number, name in enumerate(tensors)
    }
    for file in dict.fromkeys(files.values()):
        held = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        write_tensors(held, directory / file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": files}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _dense_layers(config: ModelConfig) -> list[int]:
    """Those whose MLP is written; of a hybrid model only the MoE layers are."""
    hybrid = config.names.block == "mixer"
    return [] if hybrid else [layer for layer in range(config.num_layers) if layer not in config.moe_layers]


def _tensors(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its name on disk. Each expert is drawn from (seed, layer, expert)."""
    spec, names = config.spec, config.names
    dense = spec.with_changes(intermediate=2 * spec.intermediate, num_experts=1, top_k=1, num_groups=1, top_groups=1)
    for layer in range(config.num_layers):
        module = names.module(layer)
        if layer in _dense_layers(config):
            yield from stored_matrices(module, names, random_expert(dense, 0, seed, layer=layer))
        if layer not in config.moe_layers:
            continue
        yield from _router(module, names, spec, Stream("router", seed, layer))
        experts = [random_expert(spec, expert, seed, layer=layer) for expert in range(spec.num_experts)]
        if names.fused in ("transposed", "either", "interleaved") and not spec.quantized:
            yield from _fused(f"{module}.experts", names, stack(experts))
        else:
            for number, expert in enumerate(experts):
                yield from stored_matrices(f"{module}.experts.{number}", names, expert)
        if spec.shared_intermediate:
            shared = random_expert(spec.shared_spec(), spec.num_experts, seed, layer=layer)
            yield from stored_matrices(f"{module}.{names.shared}", names, shared)
            if shared.token_gate_eH is not None:
                yield f"{module}.{names.shared_gate}", shared.token_gate_eH.bfloat16()


def stored_matrices(prefix: str, names: Names, expert: ExpertWeights) -> Iterator[tuple[str, Tensor]]:
    """One expert as its tensors on disk. Cloned, because safetensors refuses tensors that share memory."""
    modules, halves = tuple(names.matrices.values()), len(names.matrices) - 1
    for name, values in zip(modules, (*expert.w13_eFH[0].chunk(halves), expert.w2_eHi[0]), strict=True):
        yield f"{prefix}.{name}.weight", values.clone()
    if expert.s13 is not None and expert.s2 is not None:
        suffix = "_scale_inv" if expert.kind == "fp8_block" else "_scale"
        for name, scales in zip(modules, (*expert.s13[0].chunk(halves), expert.s2[0]), strict=True):
            stored = scales[:, None] if expert.kind == "fp8_channel" else scales
            yield f"{prefix}.{name}.weight{suffix}", stored.clone()
    if expert.a13 is not None and expert.a2 is not None:
        # No two are alike, so that one that is taken for another shows.
        inputs = (*(expert.a13 * 0.75**number for number in range(halves)), expert.a2[0])
        for name, scale in zip(modules, inputs, strict=True):
            yield f"{prefix}.{name}.input_scale", scale.clone()


def _fused(prefix: str, names: Names, experts: ExpertWeights) -> Iterator[tuple[str, Tensor]]:
    def laid(tensor: Tensor) -> Tensor:
        """[e, 2I, ...] with gate and up as the family has them."""
        return torch.stack(tensor.chunk(2, 1), 2).flatten(1, 2) if names.fused == "interleaved" else tensor

    yield f"{prefix}.{FUSED['gate']}", laid(experts.w13_eFH).transpose(1, 2).contiguous()
    yield f"{prefix}.{FUSED['down']}", experts.w2_eHi.transpose(1, 2).contiguous()
    if experts.b13_eF is not None and experts.b2_eH is not None:
        yield f"{prefix}.{FUSED['gate']}{BIAS}", laid(experts.b13_eF).bfloat16()
        yield f"{prefix}.{FUSED['down']}{BIAS}", experts.b2_eH.bfloat16()


def _router(module: str, names: Names, spec: MoESpec, stream: Stream) -> Iterator[tuple[str, Tensor]]:
    """Gate rows of log-spaced norms, dealt to the experts at random: a longer row's logit varies more and is in the
    top k more often. bf16, as stored by most families; the correction bias is float32."""
    E, H = spec.num_experts, spec.hidden
    ratio = ROUTER_NORMS[1] / ROUTER_NORMS[0]
    norms = torch.logspace(0, 1, E, ratio, dtype=torch.float32, device="cpu") * ROUTER_NORMS[0]
    dealt = norms[stream.permutation(E)]
    gate = stream.normal(E, H) * dealt[:, None] / H**0.5
    yield f"{module}.{names.router}", gate.to(torch.bfloat16)
    if spec.correction_bias:
        # Beside the probabilities of a softmax, which are near 1/E, the bias of a sigmoid would decide alone.
        size = 0.1 if spec.scoring == "sigmoid" else 0.5 / E
        yield f"{module}.{names.bias}", size * stream.normal(E)
    if spec.router_bias:
        yield f"{module}.{names.logit_bias}", (0.5 * stream.normal(E)).bfloat16()
