"""A small seeded checkpoint in the form that DeepSeek-V3 and Qwen3-MoE have on disk, for tests and demonstrations."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_dist.checkpoint.folder import CONFIG_LIMIT, folder, read_json
from moe_dist.checkpoint.layout import check_layer
from moe_dist.checkpoint.neutral import MARK
from moe_dist.checkpoint.quantization import CONFIG_FILE, PROJECTIONS
from moe_dist.checkpoint.reader import INDEX_FILE, SINGLE_FILE, Checkpoint
from moe_dist.errors import CheckpointError, ConfigError, UnsupportedError
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import BLOCK, LEAST_SEED, MOST_SEED, MoESpec
from moe_dist.model.weights import ExpertWeights
from moe_dist.workloads.random_weights import random_expert
from moe_dist.workloads.streams import Stream

FORM = 2  # raised when the same parameters give other content
MODEL_TYPES = ("qwen3_moe", "deepseek_v3")
QUANTS = ("fp8_block", "none")
ROUTER_NORMS = (0.3, 3.0)  # least and largest norm of a gate row: on N(0, 1) inputs its logit's standard deviation


def make_checkpoint(
    directory: Path | str,
    *,
    hidden: int = 512,
    intermediate: int = 384,
    num_experts: int = 16,
    top_k: int = 4,
    layers: int = 2,
    model_type: Literal["qwen3_moe", "deepseek_v3"] = "qwen3_moe",
    seed: int = 0,
    quant: Literal["fp8_block", "none"] = "fp8_block",
    shards: int = 2,
) -> Path:
    """Write the checkpoint and return its directory; one made earlier with the same parameters is left as it is.

    It holds config.json and the MLPs (router, experts; for deepseek_v3 a dense layer 0 and one shared expert per
    layer), no attention, no embedding. The router loads experts unequally on Gaussian inputs. One shard is written as
    model.safetensors, more of them with an index. It is complete or not there at all: it is written beside `directory`
    and renamed. Raises ConfigError (a size that can't work, a directory with other content) or UnsupportedError.
    """
    directory = folder(directory, "directory")
    parameters = {
        "form": FORM, "hidden": hidden, "intermediate": intermediate, "num_experts": num_experts, "top_k": top_k,
        "layers": layers, "model_type": model_type, "seed": seed, "quant": quant, "shards": shards,
    }  # fmt: skip
    spec = _checked_spec(parameters)
    if _made_already(directory, parameters):
        return directory
    tensors = dict(_tensors(spec, layers, seed))
    if not 1 <= shards <= len(tensors):
        raise ConfigError("shards", shards, f"there are {len(tensors)} tensors to share out", f"1 to {len(tensors)}")
    config = _config(spec, model_type, layers) | {MARK: parameters}
    partial = directory.resolve().with_name(f".{directory.resolve().name}.{uuid.uuid4().hex}.partial")
    try:
        _write(partial, config, tensors, shards)
        _publish(partial, directory, parameters)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _checked_spec(parameters: dict[str, Any]) -> MoESpec:
    """The sizes as a spec. Only for deepseek_v3 it has a shared expert: the rest here tells the families by that."""
    for field, supported in (("model_type", MODEL_TYPES), ("quant", QUANTS)):
        if parameters[field] not in supported:
            what = f"{field} {parameters[field]!r} of a synthetic checkpoint"
            raise UnsupportedError(what, ["it is not written here"], supported)
    if not LEAST_SEED <= parameters["seed"] <= MOST_SEED:
        raise ConfigError("seed", parameters["seed"], "has more than 64 bits", f"{LEAST_SEED} to {MOST_SEED}")
    shared = parameters["model_type"] == "deepseek_v3"
    if parameters["layers"] < 1 + shared:
        rule = "layer 0 is dense, so there is no MoE layer" if shared else "there is no layer"
        raise ConfigError("layers", parameters["layers"], rule, f"{1 + shared} and more")
    sizes = {key: parameters[key] for key in ("hidden", "intermediate", "num_experts", "top_k", "quant")}
    return MoESpec(**sizes, shared_intermediate=parameters["intermediate"] if shared else 0)


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
    shared = parameters["model_type"] == "deepseek_v3"
    try:
        for layer in checkpoint.config.moe_layers:
            check_layer(checkpoint, layer, shared)
        dense = [f"model.layers.0.mlp.{projection}.weight" for projection in PROJECTIONS] if shared else []
        scales = [f"{name}_scale_inv" for name in dense] if parameters["quant"] == "fp8_block" else []
        for name in [*dense, *scales]:
            checkpoint.header(name)
        shards = len(set(checkpoint.files.values()))
        if shards != parameters["shards"]:
            raise CheckpointError(directory, f"its tensors lie in {shards} files, not {parameters['shards']}")
    except (CheckpointError, UnsupportedError, ConfigError) as error:
        rule = f"holds a synthetic checkpoint that is not whole any more ({error}); name another directory or remove it"
        raise ConfigError("directory", str(directory), rule) from error


def _publish(partial: Path, directory: Path, parameters: dict[str, Any]) -> None:
    try:
        partial.rename(directory)  # replaces an empty directory, never one that holds something
    except OSError:
        if not _made_already(directory, parameters):  # another process was faster: fine if it made the same
            raise


def _write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int) -> None:
    directory.mkdir(parents=True)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if shards == 1:
        save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})
        return
    files = {
        name: f"model-{number * shards // len(tensors) + 1:05d}-of-{shards:05d}.safetensors"
        for number, name in enumerate(tensors)
    }
    for file in dict.fromkeys(files.values()):
        held = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(held, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": files}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _config(spec: MoESpec, model_type: str, layers: int) -> dict[str, Any]:
    """config.json with the keys that the model family's own has, as far as they concern the MLPs."""
    config: dict[str, Any] = {
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "intermediate_size": _dense_width(spec),
        "moe_intermediate_size": spec.intermediate,
        "norm_topk_prob": True,
        "num_experts_per_tok": spec.top_k,
        "num_hidden_layers": layers,
        "torch_dtype": "bfloat16",
    }
    if spec.quantized:
        config["quantization_config"] = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK],
        }  # fmt: skip
    if model_type == "qwen3_moe":
        names = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": spec.num_experts}
        return config | names | {"decoder_sparse_step": 1, "mlp_only_layers": []}
    num_groups, top_groups = _groups(spec.num_experts, spec.top_k)
    return config | {
        "architectures": ["DeepseekV3ForCausalLM"], "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "n_group": num_groups, "topk_group": top_groups, "n_routed_experts": spec.num_experts, "n_shared_experts": 1,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    }  # fmt: skip


def _groups(num_experts: int, top_k: int) -> tuple[int, int]:
    """Four groups where they come out even, of which a token may use half, or as many as its top_k needs."""
    if num_experts % 4 or num_experts < 8:
        return 1, 1
    return 4, max(2, cdiv(top_k * 4, num_experts))


def _dense_width(spec: MoESpec) -> int:
    return 2 * spec.intermediate


def _tensors(spec: MoESpec, layers: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its name on disk. Each expert is drawn from (seed, layer, expert)."""
    deepseek = spec.shared_intermediate > 0
    dense = spec.with_changes(intermediate=_dense_width(spec), num_experts=1, top_k=1)
    for layer in range(layers):
        mlp = f"model.layers.{layer}.mlp"
        if deepseek and layer == 0:
            yield from _projections(mlp, random_expert(dense, 0, seed, layer=layer))
            continue
        yield from _router(mlp, spec, Stream("router", seed, layer), biased=deepseek)
        for expert in range(spec.num_experts):
            yield from _projections(f"{mlp}.experts.{expert}", random_expert(spec, expert, seed, layer=layer))
        if deepseek:
            shared = random_expert(spec.shared_spec(), spec.num_experts, seed, layer=layer)
            yield from _projections(f"{mlp}.shared_experts", shared)


def _projections(prefix: str, expert: ExpertWeights) -> Iterator[tuple[str, Tensor]]:
    """One expert as its tensors on disk. Cloned, because safetensors refuses tensors that share memory."""
    parts = dict(zip(("gate_proj", "up_proj"), expert.w13_eFH[0].chunk(2), strict=True)) | {
        "down_proj": expert.w2_eHi[0]
    }
    for projection, values in parts.items():
        yield f"{prefix}.{projection}.weight", values.clone()
    if expert.s13 is not None and expert.s2 is not None:
        for projection, scales in zip(parts, (*expert.s13[0].chunk(2), expert.s2[0]), strict=True):
            yield f"{prefix}.{projection}.weight_scale_inv", scales.clone()


def _router(mlp: str, spec: MoESpec, stream: Stream, biased: bool) -> Iterator[tuple[str, Tensor]]:
    """Gate rows of log-spaced norms, dealt to the experts at random: a longer row's logit varies more and is in the
    top k more often. bf16, as stored by both families; the correction bias is float32."""
    E, H = spec.num_experts, spec.hidden
    ratio = ROUTER_NORMS[1] / ROUTER_NORMS[0]
    norms = torch.logspace(0, 1, E, ratio, dtype=torch.float32, device="cpu") * ROUTER_NORMS[0]
    dealt = norms[stream.permutation(E)]
    gate = stream.normal(E, H) * dealt[:, None] / H**0.5
    yield f"{mlp}.gate.weight", gate.to(torch.bfloat16)
    if biased:
        yield f"{mlp}.gate.e_score_correction_bias", 0.1 * stream.normal(E)
